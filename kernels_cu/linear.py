"""Products of activations with weight matrices: which kernel runs, and how it is launched.

One row (decode): `gemv`, bound by reading the weights. Two to sixteen rows: `panel`, the same on tensor cores. More
rows (prefill, large batches), and float32 weights from two rows on: cuBLAS (kernels_cu.product). What is captured into
a graph keeps the addresses of its scratch: up to BATCH_ROWS rows have theirs, which never grows.

What a row gets from `panel` does not depend on the other rows, nor on how many there are up to sixteen: K is divided
among a block's warps in the same way, parts are added in the same order, and a row is a column of its own in every
matrix instruction. `gemv` adds in another order: who wants one row to get the bits that it gets among others gives two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kernels_cu import product
from kernels_cu.arrays import NULL, STORED
from kernels_cu.build import Spec, current_device, import_cupy, kernel
from kernels_cu.errors import KernelError
from kernels_cu.product import PAIR, Defines, Operation, Product

PANEL_ROWS, BATCH_ROWS = 16, 128
_GEMV_WARPS = 8
_GEMV_LOADS = {"F32": (4, 8), "F16": (2, 16), "BF16": (4, 8)}  # 16 bytes each: of one row, of all rows at a time
_GEMV_VALUES = 64  # activations that a lane can hold
_PANEL_WARPS, _PANEL_AHEAD = 8, 2


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and dynamic shared memory."""

    kernel: Any
    grid: int
    block: int
    shared: int = 0

    def __call__(self, *arguments: Any) -> None:
        self.kernel((self.grid,), (self.block,), arguments, shared_mem=self.shared)


class Linear:
    """Runs Operations on one GPU."""

    def __init__(self) -> None:
        device = import_cupy().cuda.runtime.getDeviceProperties(current_device())
        self._processors = int(device["multiProcessorCount"])
        self._product = Product()

    def run(self, operation: Operation, x: np.uint64, T: int, K: int, norm: np.uint64 | None = None,
            eps: float = 0.0, converted: bool = False) -> None:  # fmt: skip
        """operation of x (T, K) float32, RMS-normed with weights norm (K,) if given; converted: x, of more than
        PANEL_ROWS rows, is in the weights' type."""
        if T == 1:
            launch = _gemv(operation.defines, norm is not None, K, operation.units, self._processors)
            launch(x, NULL if norm is None else norm, np.float32(eps), np.int32(K), *operation.arguments)
            return
        few = T <= PANEL_ROWS and operation.dtype != "F32"
        room = PANEL_ROWS if few else BATCH_ROWS if T <= BATCH_ROWS else None
        activations = x if converted else self._product.converted(operation.dtype, x, T, K, norm, eps, room)
        if few:
            _panel(operation.defines, operation.units, T)(activations, np.int32(T), np.int32(K), *operation.arguments)
        else:
            self._product.run(operation, activations, T, room)


def compile_cover() -> Iterator[Spec]:
    """Specs that meet every (dtype, epilogue) and, over them, every shape of a team that models of 135M to 70B need."""
    dtypes, epilogues = ("F32", "F16", "BF16"), ("STORE", "ADD", "GATE_UP", "QKV")
    depths = (576, 960, 1536, 2048, 4096, 8192, 11008, 14336, 28672)
    heads = (64, 80, 96, 128, 256)
    for i, epilogue in enumerate(epilogues):
        for j, dtype in enumerate(dtypes):
            defines: Defines = (("EPILOGUE", epilogue), ("WEIGHT", dtype))
            if epilogue == "QKV":
                defines += (("D", heads[j]),)
            for depth in depths[(i + j) % 3 :: 3]:
                yield _gemv_spec(defines, epilogue != "ADD", depth)
            yield product.finish_spec(defines)
            if epilogue == "GATE_UP" and dtype != "F32":
                yield product.finish_spec(defines, narrow=True)
            if dtype != "F32":
                yield from (_panel_spec(defines, columns) for columns in (1, 2))
    for dtype in dtypes:
        yield from (product.convert_spec(dtype, norm, 4096) for norm in (False, True))


@cache
def _gemv(defines: Defines, norm: bool, K: int, units: int, processors: int) -> Launch:
    spec = _gemv_spec(defines, norm, K)
    chosen = dict(spec.defines)
    blocks = int(chosen["BLOCKS"]) * processors
    teams = blocks * int(chosen["WARPS"]) // int(chosen["TEAM"])
    shared = 4 * int(chosen["WARPS"]) * -(-units // teams) * PAIR[str(chosen["EPILOGUE"])]
    return Launch(kernel(spec, shared), blocks, 32 * int(chosen["WARPS"]), shared)


def _gemv_spec(defines: Defines, norm: bool, K: int) -> Spec:
    """As few warps to a team as hold K with so many loads a lane; as many rows as there are loads for."""
    chosen = dict(defines)
    of_row, loads = _GEMV_LOADS[str(chosen["WEIGHT"])]
    per_warp = 32 * 16 // STORED[str(chosen["WEIGHT"])].itemsize
    warps, blocks = (_GEMV_WARPS, 2) if K <= _GEMV_WARPS * 32 * _GEMV_VALUES else (2 * _GEMV_WARPS, 1)
    if warps * 32 * _GEMV_VALUES < K:
        raise KernelError(f"a decode step takes at most {warps * 32 * _GEMV_VALUES} inputs, but got {K}")
    team = 1
    while team < warps and team * per_warp * of_row < K:
        team *= 2
    chunks = -(-K // (team * per_warp))
    units = 1
    while 2 * units * PAIR[str(chosen["EPILOGUE"])] * chunks <= loads:
        units *= 2
    return Spec.of("gemv.cu", "gemv", NORM=int(norm), TEAM=team, CHUNKS=chunks, UNITS=units, WARPS=warps, BLOCKS=blocks,
                   **chosen)  # fmt: skip


@cache
def _panel(defines: Defines, units: int, T: int) -> Launch:
    spec = _panel_spec(defines, -(-T // 8))
    block_units = 16 // PAIR[str(dict(defines)["EPILOGUE"])]
    return Launch(kernel(spec), -(-units // block_units), 32 * _PANEL_WARPS)


def _panel_spec(defines: Defines, columns: int) -> Spec:
    return Spec.of("panel.cu", "panel", WARPS=_PANEL_WARPS, AHEAD=_PANEL_AHEAD, COLUMN_TILES=columns, **dict(defines))
