"""Decode attention on the GPU against its floor and torch's SDPA. `python -m bench.attention [--quick]`

One token each of one sequence, or of several in one launch, 32 query heads, D = 128, cycling over at least 1 GB of
distinct layers, so that no cache helps, as one CUDA graph. Chunks lie in shuffled order, packed by the project's own
kernel from random K and V. torch's attention reads the same shapes in FP16, in the same run.

    floor   bytes of codes, metadata and visible tail over the device-to-device copy rate of this run (read + written)
    share   floor / time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import numpy as np

from bench.report import describe_run, emit, print_table, progress, verdict
from kernels_cu.backend import CudaBackend
from kernels_cu.build import compile_all
from kernels_cu.cache_ops import attention_spec, merge_spec
from runtime.arena import ArenaLayout
from runtime.backend import STATE_POSITION, STATE_SIZE, STATE_SLOT, FormatData
from runtime.formats import PRE_ROPE, block_bytes
from runtime.plan import FP16, DocumentShape, Tier

HEADS, HEAD_DIM, CHUNK = 32, 128, 32
SHAPES = ((32, 32768), (8, 131072), (8, 32768))  # KV heads, context tokens
MIX = ((Tier(3, 2), 0.80), (Tier(4, 4), 0.15), (FP16, 0.05))
PURE = (FP16, Tier(8, 8), Tier(4, 4), Tier(4, 2), Tier(3, 2), Tier(2, 2))
TAIL = 96  # visible tokens of the tail
DISTINCT = 1.1e9  # bytes of layers that a run cycles over
GOALS = {("mix", 32, 32768): 58.5, ("mix", 8, 131072): 58.5}  # us
GOAL_FP16 = 0.95  # of the copy rate, 32 KV heads at 32K
# what --formats measures of each other family
BASELINES = {"kivi": (Tier(4, 4), Tier(2, 2)), "atom": (Tier(4, 4),), "kvquant": (Tier(4, 4),)}
GOAL_BASELINE = 0.44  # of the copy rate: BitDecoding's published INT4 kernels (bench/LOG.md)
BATCH, BATCH_SHAPE, GOAL_BATCH = 8, (8, 32768), 0.70  # sequences of one launch; of the copy rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the mix and FP16 only")
    parser.add_argument("--formats", nargs="+", choices=BASELINES, default=[],
                        help="only these families, at 32 KV heads and 32K and at 8 KV heads and 128K")
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args()

    backend = CudaBackend()
    rate = copy_rate()
    cases = [Case(f"{tier}", ((tier, 1.0),), *SHAPES[0]) for tier in PURE[: 1 if args.quick else None]]
    cases += [Case("mix", MIX, *shape) for shape in SHAPES] + [Case("mix", MIX, *BATCH_SHAPE, BATCH)]
    if args.formats:
        cases = [Case(f"{family} {tier}", ((tier, 1.0),), *shape, family=family)
                 for family in args.formats for tier in BASELINES[family] for shape in SHAPES[:2]]
    compile_all({merge_spec(HEAD_DIM)} | {attention_spec(
        HEAD_DIM, HEADS // case.kv_heads, CHUNK, frozenset((tier.k_bits, tier.v_bits) for tier, _ in case.tiers), False,
        case.family)[0] for case in cases})  # fmt: skip
    rows, record = [], []
    for case in cases:
        progress(f"{case.name}, {case.kv_heads} KV heads, {case.tokens} tokens, batch {case.batch}")
        layers = Layers(backend, case)
        us, floor = layers.time(), layers.nbytes / rate * 1e6
        rows.append((case.name, case.batch, case.kv_heads, f"{case.tokens // 1024}K", f"{layers.bpv:.2f}",
                     f"{layers.nbytes / 1e6:.1f}", f"{us:.1f}", f"{floor:.1f}", f"{floor / us:.1%}",
                     note(case, us, floor)))  # fmt: skip
        record.append({"name": case.name, "batch": case.batch, "kv_heads": case.kv_heads, "tokens": case.tokens,
                       "us": us, "floor_us": floor})  # fmt: skip
        del layers
        cupy.get_default_memory_pool().free_all_blocks()
    for kv_heads, tokens in SHAPES[: 0 if args.formats else None]:
        nbytes, us = 4 * kv_heads * tokens * HEAD_DIM, torch_sdpa(kv_heads, tokens)
        rows.append(("torch SDPA", 1, kv_heads, f"{tokens // 1024}K", "16.00", f"{nbytes / 1e6:.1f}", f"{us:.1f}",
                     f"{nbytes / rate * 1e6:.1f}", f"{nbytes / rate * 1e6 / us:.1%}", ""))  # fmt: skip
        record.append({"name": "torch SDPA", "batch": 1, "kv_heads": kv_heads, "tokens": tokens, "us": us})
    print(f"copy rate {rate / 1e12:.3f} TB/s; {HEADS} query heads, D = {HEAD_DIM}, chunks of {CHUNK}")
    print_table(("format", "batch", "KV heads", "context", "bpv", "MB", "us", "floor us", "share", "goal"), rows)
    emit({"bench": "attention", "run": describe_run(), "copy_rate": rate, "figures": record}, args.json)


class Case(NamedTuple):
    """One line of the table; tiers: each with its share of the chunks."""

    name: str
    tiers: tuple[tuple[Tier, float], ...]
    kv_heads: int
    tokens: int
    batch: int = 1
    family: str = "rotated"


def note(case: Case, us: float, floor: float) -> str:
    if case.family != "rotated":
        return f"share {verdict(floor / us, GOAL_BASELINE)}"
    if case.batch > 1:
        return f"share {verdict(floor / us, GOAL_BATCH)}"
    if case.name == "FP16":
        return f"share {verdict(floor / us, GOAL_FP16)}"
    goal = GOALS.get((case.name, case.kv_heads, case.tokens))
    return verdict(us, goal, at_most=True) if goal else ""


def format_data(family: str, kv_heads: int, tokens: int) -> FormatData | None:
    """What the family needs: RoPE's tables of base 1e4; for kvquant evenly spaced levels, and ranges that leave 1% of
    normal values outside."""
    if family not in PRE_ROPE:
        return None
    frequencies = 1e4 ** (-cupy.arange(0, HEAD_DIM, 2, dtype=np.float64) / HEAD_DIM)
    angles = cupy.arange(tokens)[:, None] * frequencies
    levels = cupy.concatenate([cupy.linspace(-1, 1, 2**bits, dtype=np.float32) for bits in (2, 3, 4)])
    channels = (kv_heads, HEAD_DIM)
    return FormatData(cupy.cos(angles).astype(np.float32), cupy.sin(angles).astype(np.float32), levels, levels,
                      cupy.zeros(channels, np.float32), cupy.full(channels, 2.576, np.float32))


class Layers:
    """Enough layers of `batch` sequences to fill DISTINCT bytes; nbytes: what one layer's attention must read."""

    def __init__(self, backend: CudaBackend, case: Case):
        tiers, kv_heads, tokens, batch = case.tiers, case.kv_heads, case.tokens, case.batch
        n = tokens // CHUNK
        counts = [round(share * n) for _, share in tiers[1:]]
        counts.insert(0, n - sum(counts))
        shape = DocumentShape(n_layers=1, n_kv_heads=kv_heads, head_dim=HEAD_DIM, chunk=CHUNK, n_chunks=n, prefix=4,
                              remainder=0, suffix=TAIL - 4, max_new=64, window=None)
        sizes = ArenaLayout(shape.layout([tier for tier, _ in tiers], counts, case.family))
        data = format_data(case.family, kv_heads, tokens + TAIL)
        spans, tail = [span for span in sizes.spans(0) if span.n], sizes.tail(0)
        rng = cupy.random.default_rng(0)
        rows = kv_heads, tokens + TAIL, HEAD_DIM
        k, v = (rng.standard_normal(rows, dtype=np.float32).astype(np.float16) for _ in "kv")
        first = backend.arena(sizes.nbytes)
        order, at = np.random.default_rng(0).permutation(n), 0
        for span in spans:
            backend.pack(k, v, first, span, (4 + CHUNK * order[at : at + span.n]).astype(np.int32), CHUNK, data=data)
            at += span.n
        rows = np.r_[:4, 4 + tokens : tokens + TAIL].astype(np.int32)
        backend.copy_tail(k, v, rows, first, tail, 0)
        del k, v
        self.backend, self.bpv = backend, sizes.context_bits_per_value
        sides = [(span.n, block_bytes(kind, bits, CHUNK, HEAD_DIM, case.family)) for span in spans
                 for kind, bits in (("K", span.k_bits), ("V", span.v_bits))]
        self.nbytes = batch * (4 * TAIL * HEAD_DIM * kv_heads + sum(
            n * (kv_heads * (one.codes + one.meta) + one.shared) for n, one in sides))
        arenas = [first] + [first.copy() for _ in range(batch * (int(DISTINCT // self.nbytes) + 1) - 1)]
        bound = [backend.bind(arena, spans, tail, HEADS, kv_heads, HEAD_DIM, CHUNK, None, data=data)
                 for arena in arenas]
        self.bound = [backend.bind_batch(bound[i : i + batch]) for i in range(0, len(bound), batch)]
        self.q = rng.standard_normal((batch, HEADS, HEAD_DIM), dtype=np.float32)
        self.out = cupy.full((batch, HEADS * HEAD_DIM), np.nan, np.float32)
        state = np.zeros((batch, STATE_SIZE), np.int32)
        state[:, STATE_POSITION], state[:, STATE_SLOT] = tokens + TAIL - 1, TAIL - 1
        self.state = backend.upload(state)

    def time(self) -> float:
        """Microseconds per layer."""
        cycles = max(1, 40 // len(self.bound))

        def step() -> None:
            for bound in self.bound * cycles:
                self.backend.decode_attention(self.q, bound, self.state, self.out)

        captured = self.backend.captured(step)
        us = median_ms(captured, 12) * 1e3 / (cycles * len(self.bound))
        if not bool(cupy.isfinite(self.out).all()):
            raise RuntimeError("decode attention left outputs unwritten")
        return us


def copy_rate(nbytes: int = 1 << 31) -> float:
    """Bytes per second, read plus written, of a device-to-device copy."""
    a, b = cupy.ones(nbytes, np.uint8), cupy.empty(nbytes, np.uint8)
    stream = cupy.cuda.get_current_stream()
    ms = median_ms(lambda: b.data.copy_from_device_async(a.data, nbytes, stream), 12)
    return 2 * nbytes / ms * 1e3


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds between device events around one call, after three calls to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end))
    return float(np.median(times))


def torch_sdpa(kv_heads: int, tokens: int) -> float:
    """Microseconds of torch's FP16 attention for the same shape, cycling over as many layers."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    layers = int(DISTINCT // (4 * kv_heads * tokens * HEAD_DIM)) + 1
    k, v = (torch.randn(layers, 1, kv_heads, tokens, HEAD_DIM, device="cuda", dtype=torch.float16) for _ in "kv")
    q = torch.randn(1, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.float16)
    times = []
    for turn in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for layer in range(layers):
            scaled_dot_product_attention(q, k[layer], v[layer], enable_gqa=kv_heads != HEADS)
        end.record()
        end.synchronize()
        if turn > 2:
            times.append(begin.elapsed_time(end) / layers)
    del k, v
    torch.cuda.empty_cache()
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    main()
