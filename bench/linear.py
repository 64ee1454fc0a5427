"""Products of a decode step on the GPU against their floor and cuBLAS. `python -m bench.linear [--rows 1] [--quick]`

One row of activations, or --rows of as many sequences; FP16 weights, every shape that a 7B model's step has: each over
at least 1 GB of distinct weights, so that no cache helps, as one CUDA graph; then all of a model's layers in the order
of the step, without its attention. From two rows on what converts them to the weights' type is part of a product.

    floor     bytes of the weights over the device-to-device copy rate of this run (read + written)
    in order  every kernel starts when the one before has ended
    early     as the product runs them: a kernel's first weights are read while the one before ends
    cuBLAS    through torch, as a CUDA graph of its own
    share     floor / time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from bench.attention import DISTINCT, copy_rate, median_ms
from bench.gpu import SHAPES, random_matrix, release
from bench.report import describe_run, emit, print_table, progress, verdict
from kernels_cu.backend import CudaBackend
from kernels_cu.build import in_order

MODELS = ("llama-2-7b", "mistral-7b")
GOAL, LARGE = 0.93, 64e6  # share of the copy rate, for matrices of so many bytes


@dataclass
class Product:
    """`runs` launches, each over weights of its own; rows x columns of all the weights of one launch together."""

    name: str
    rows: int
    columns: int
    runs: list[Callable[[], None]]

    @property
    def nbytes(self) -> int:
        return 2 * self.rows * self.columns


class Shape:
    """The products of one model. Activations are shared: each product depends on the one before, as in a step."""

    def __init__(self, backend: CudaBackend, model: str, rows: int) -> None:
        config = SHAPES[model]
        self.backend, self.layers, self.rows = backend, config["num_hidden_layers"], rows
        self.E, self.I, self.V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        self.H, self.G = config["num_attention_heads"], config["num_key_value_heads"]
        self.D, self.rng = self.E // self.H, cupy.random.default_rng(0)
        self.x, self.hidden = (self.rng.standard_normal((rows, n), dtype=np.float32) for n in (self.E, self.I))
        self.q, self.logits = cupy.empty((rows, self.H, self.D), np.float32), cupy.empty((rows, self.V), np.float32)
        self.k, self.v = (cupy.empty((self.G, max(rows, 64), self.D), np.float16) for _ in "kv")
        self.table, self.norm = cupy.ones((rows, self.D // 2), np.float32), cupy.ones(self.E, np.float32)
        self.at = cupy.arange(rows, dtype=np.int32)

    def products(self) -> Iterator[Product]:
        """One at a time: the weights of one are gone when the next is made, if the caller keeps none."""
        for name, rows, columns, make in self._kinds():
            count = int(DISTINCT // (2 * rows * columns)) + 1
            yield Product(name, rows, columns, [make() for _ in range(count)])

    def step(self) -> Product:
        """Every layer's products and the head's, in the order of a step."""
        *layer, (_, rows, columns, head) = self._kinds()
        runs = [make() for _ in range(self.layers) for *_, make in layer] + [head()]
        values = self.layers * sum(rows * columns for _, rows, columns, _ in layer) + rows * columns
        return Product("step", values // self.E, self.E, runs)

    def _kinds(self) -> list[tuple[str, int, int, Callable[[], Callable[[], None]]]]:
        qkv = (self.H + 2 * self.G) * self.D
        return [("qkv", qkv, self.E, self._qkv), ("wo", self.E, self.E, self._wo),
                ("gate_up", 2 * self.I, self.E, self._gate_up), ("down", self.E, self.I, self._down),
                ("head", self.V, self.E, self._head)]  # fmt: skip

    def _qkv(self) -> Callable[[], None]:
        wq, wk, wv = (self._matrix(heads * self.D, self.E) for heads in (self.H, self.G, self.G))
        return lambda: self.backend.qkv(self.x, self.norm, 1e-5, wq, wk, wv, None, None, None, self.table, self.table,
                                        self.at, self.at, self.q, self.k, self.v)  # fmt: skip

    def _wo(self) -> Callable[[], None]:
        weight = self._matrix(self.E, self.E)
        return lambda: self.backend.linear_add(self.q.reshape(self.rows, self.E), weight, None, self.x)

    def _gate_up(self) -> Callable[[], None]:
        gate, up = (self._matrix(self.I, self.E) for _ in range(2))
        return lambda: self.backend.gate_up(self.x, self.norm, 1e-5, gate, up, None, None, self.hidden)

    def _down(self) -> Callable[[], None]:
        weight = self._matrix(self.E, self.I)
        return lambda: self.backend.linear_add(self.hidden, weight, None, self.x)

    def _head(self) -> Callable[[], None]:
        weight = self._matrix(self.V, self.E)
        return lambda: self.backend.logits(self.x, self.norm, 1e-5, weight, self.logits)

    def _matrix(self, rows: int, columns: int) -> Any:
        return random_matrix(self.rng, rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1, help="of activations (1)")
    parser.add_argument("--quick", action="store_true", help="llama-2-7b only")
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args()
    backend, rate = CudaBackend(), copy_rate()
    rows, record, seen = [], [], set()

    def report(model: str, product: Product, peer: float | None) -> None:
        floor = product.nbytes / rate * 1e6
        plain, early = (time(backend, product, early) for early in (False, True))
        progress(f"{model} {product.name}: {plain:.2f} in order, {early:.2f} early, floor {floor:.2f} us")
        share = floor / early
        size = "" if product.name == "step" else f"{product.rows} x {product.columns}"
        rows.append((model, product.name, size, f"{floor:.1f}", *cells(floor, plain), *cells(floor, early),
                     *(cells(floor, peer) if peer else ("", "")),
                     verdict(share, GOAL) if product.nbytes >= LARGE else ""))  # fmt: skip
        record.append({"model": model, "name": product.name, "rows": product.rows, "columns": product.columns,
                       "floor_us": floor, "in_order_us": plain, "early_us": early, "cublas_us": peer})

    for model in MODELS[: 1 if args.quick else None]:
        shape = Shape(backend, model, args.rows)
        for product in shape.products():
            if (product.rows, product.columns) not in seen:
                seen.add((product.rows, product.columns))
                report(model, product, cublas(args.rows, product.rows, product.columns))
            del product
            release()
        report(model, shape.step(), None)
        release()
    print(f"copy rate {rate / 1e12:.3f} TB/s; {args.rows} row{'s' * (args.rows > 1)}, FP16 weights; us")
    print_table(("model", "product", "rows x columns", "floor", "in order", "share", "early", "share", "cuBLAS",
                 "share", "goal: early"), rows)  # fmt: skip
    emit({"bench": "linear", "run": describe_run(), "activations": args.rows, "copy_rate": rate, "figures": record},
         args.json)  # fmt: skip


def cells(floor: float, us: float) -> tuple[str, str]:
    return f"{us:.1f}", f"{floor / us:.1%}"


def time(backend: CudaBackend, product: Product, early: bool) -> float:
    """Microseconds of one launch, or of the whole step."""
    launches = product.runs * (1 if product.name == "step" else max(1, 60 // len(product.runs)))

    def step() -> None:
        for run in launches:
            run()

    captured = backend.captured(step)
    with nullcontext() if early else in_order():
        us = median_ms(captured, 12) * 1e3
    return us if product.name == "step" else us / len(launches)


def cublas(activations: int, rows: int, columns: int) -> float:
    """Microseconds of torch's product of so many FP16 rows of activations with weights (rows, columns)."""
    import torch

    count = int(DISTINCT // (2 * rows * columns)) + 1
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.float16) for _ in range(count)]
    x = torch.randn(activations, columns, device="cuda", dtype=torch.float16)

    def step() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for turn in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn > 2:
            times.append(begin.elapsed_time(end) / count)
    del graph
    weights.clear()
    torch.cuda.empty_cache()
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    main()
