"""Attention mass on the GPU beside its floor. `python -m bench.mass`

The query tokens' attention over the chunks of one layer at 32K and 128K, cycling over at least 1 GB of distinct layers.
Two passes over K are what keeps the probabilities out of memory:

    floor   two reads of K over the device-to-device copy rate of this run (read + written)
"""

from __future__ import annotations

import argparse

import cupy
import numpy as np

from bench.attention import DISTINCT, copy_rate, median_ms
from bench.report import describe_run, emit, print_table
from kernels_cu.attention_mass import compile_cover
from kernels_cu.backend import CudaBackend
from kernels_cu.build import compile_all

HEADS, HEAD_DIM, CHUNK = 32, 128, 32
SHAPES = ((32, 32768, 32), (8, 32768, 32), (8, 131072, 32), (32, 32768, 128))  # KV heads, context tokens, query tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args()
    compile_all(compile_cover())
    backend, rate, rows, record = CudaBackend(), copy_rate(), [], []
    for kv_heads, tokens, queries in SHAPES:
        us, nbytes = measure(backend, kv_heads, tokens, queries), 2 * 2 * kv_heads * tokens * HEAD_DIM
        floor = nbytes / rate * 1e6
        rows.append((kv_heads, f"{tokens // 1024}K", queries, f"{nbytes / 1e6:.0f}", f"{us:.0f}", f"{floor:.0f}",
                     f"{floor / us:.0%}"))  # fmt: skip
        record.append({"kv_heads": kv_heads, "tokens": tokens, "queries": queries, "us": us, "floor_us": floor})
    print(f"copy rate {rate / 1e12:.3f} TB/s; {HEADS} query heads, D = {HEAD_DIM}, chunks of {CHUNK}")
    print_table(("KV heads", "context", "query tokens", "MB", "us", "floor us", "share"), rows)
    emit({"bench": "mass", "run": describe_run(), "copy_rate": rate, "figures": record}, args.json)


def measure(backend: CudaBackend, kv_heads: int, tokens: int, queries: int) -> float:
    """Microseconds per layer."""
    rng = cupy.random.default_rng(0)
    S = tokens + queries
    layers = int(DISTINCT // (2 * kv_heads * S * HEAD_DIM)) + 1
    k = [rng.standard_normal((kv_heads, S, HEAD_DIM), dtype=np.float32).astype(np.float16) for _ in range(layers)]
    q = rng.standard_normal((queries, HEADS, HEAD_DIM), dtype=np.float32)
    out = cupy.full((kv_heads, tokens // CHUNK), np.nan, np.float32)

    def run() -> None:
        for layer in k:
            backend.attention_mass(q, layer, tokens, None, 0, CHUNK, out)

    us = median_ms(run, 12) * 1e3 / layers
    if not bool((out > 0).all()):
        raise RuntimeError("attention mass left outputs unwritten")
    return us


if __name__ == "__main__":
    main()
