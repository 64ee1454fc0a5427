"""Where the time to the first token goes. `python -m bench.prefill --shape mistral-7b [--peers]`

TTFT as bench.gpu measures it, without anything in between; then one prefill with device events around its parts.

    attention       prefill attention of all layers
    products        cuBLAS alone: the linear layers' multiply-adds
    around them     norms, conversions, RoPE, SiLU: the rest of the linear layers
    pack            encoding the context's chunks, copying the tail
    host and other  TTFT less those: buffers, tables, what the GPU waits for, sampling
    floor           the part's multiply-adds over the rate of a large FP16 matrix product in this run

Then what scoring adds: each scorer of bench.scoring by itself, and behind the first layer (bench.shapes).
Beside the attention: torch's SDPA, causal, over the whole prompt at once, once per layer that attends to all tokens.
--peers adds the TTFT of transformers (bench.peer_transformers).
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from bench import gpu
from bench.report import describe_run, emit, print_table, progress
from bench.scoring import SCORERS, check_scorers
from bench.shapes import ATTENTION, model_of, model_options, print_scorers, record_of, run_peers, run_scorers
from kernels_cu.backend import CudaBackend
from kernels_cu.blas import Blas
from runtime.config import ModelConfig
from runtime.engine import read
from runtime.model import Model
from runtime.plan import Plan

LINEAR = ("qkv", "linear_add", "gate_up", "logits")
SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION")  # torch.nn.attention.SDPBackend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser, (*SCORERS, ATTENTION))
    parser.add_argument("--policy", choices=gpu.POLICIES, default="mix")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    check_scorers(args.scorers)

    backend = CudaBackend()
    rate = gpu.measure_rates(backend)["matrix product"]
    gpu.release()
    before = cupy.cuda.runtime.memGetInfo()[0]
    name, model = model_of(args, backend)
    config = model.config
    gpu.release()
    plan = gpu.plan_of(gpu.shape_of(config, args.context_tokens, 8), args.policy)
    tokens = plan.layout.prompt_tokens
    warm = gpu.plan_of(gpu.shape_of(config, min(args.context_tokens, 2 * backend.prefill_tile), 8), args.policy)
    gpu.run_case(model, warm, "warm", 1, 1, before)
    ttft = float(np.median(gpu.run_case(model, plan, args.policy, args.rounds, 1, before).ttft))
    progress(f"TTFT {ttft:.3f} s")
    scored = run_scorers(model, args.context_tokens, args.scorers, before)
    shares = measure_shares(model, plan)  # last: the events stay in the backend
    del model
    gpu.release()
    others = run_peers(config, args.context_tokens) if args.peers else {}
    peers = {f"attention by torch, {name}": ms * (config.n_layers - 1) / 1e3
             for name, ms in sdpa_ms(config, tokens).items()}

    products, attention = adds(config, tokens)
    shares["host and other"] = ttft - sum(shares.values())
    work = {"attention": attention, "products": products, "TTFT": attention + products}
    rows = []
    theirs = {f"TTFT of transformers, {cache}": found.ttft for cache, found in others.items()
              if not isinstance(found, str)}
    for part, seconds in {"TTFT": ttft, **shares, **peers, **theirs}.items():
        flops = 2 * work.get(re.split(" by | of ", part)[0], 0)
        rates = (f"{flops / seconds / 1e12:.0f}", f"{flops / rate:.3f}", f"{flops / rate / seconds:.0%}")
        rows.append((part, f"{seconds:.3f} s", f"{seconds / ttft:.1%}", *(rates if flops else ("", "", ""))))
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{name}, {tokens} tokens of prompt, {args.policy}, {device}; tiles of {backend.prefill_tile}; matrix "
          f"product {rate / 1e12:.0f} TFLOP/s")
    print_table(("part", "time", "of TTFT", "TFLOP/s", "floor s", "floor / time"), rows)
    if scored:
        print_scorers(scored)
    emit({"bench": "prefill", "run": describe_run(), "device": device, "model": name, "tokens": tokens,
          "policy": args.policy, "tile": backend.prefill_tile, "matrix_product": rate, "ttft": ttft, "shares": shares,
          "sdpa": peers, "adds": {"products": products, "attention": attention},
          **record_of(scored, others)}, args.json)


def adds(config: ModelConfig, tokens: int) -> tuple[int, int]:
    """Multiply-adds of the matrix products and of the attention of a prefill."""
    total = gpu.multiply_adds(config, tokens)
    one = gpu.multiply_adds(config, 1)  # attention over a single key in all layers but the last
    products = tokens * (one - (config.n_layers - 1) * 2 * config.n_heads * config.head_dim)
    return products, total - products


def measure_shares(model: Model, plan: Plan) -> dict[str, float]:
    """Device seconds of each part of one prefill."""
    spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            result = call(*arguments, **options)
            end.record()
            spans[name].append((begin, end))
            return result

        return run

    backend, gemm = model.backend, Blas.gemm
    for name in ("prefill_attention", "pack", "copy_tail", *LINEAR):
        setattr(backend, name, timed(name, getattr(backend, name)))
    Blas.gemm = timed("products", gemm)  # type: ignore[method-assign]
    try:
        read(model, gpu.prompt_of(model.config, plan.layout.prompt_tokens), [plan])
    finally:
        Blas.gemm = gemm  # type: ignore[method-assign]
    cupy.cuda.Device().synchronize()
    seconds = {name: sum(cupy.cuda.get_elapsed_time(*span) for span in taken) / 1e3 for name, taken in spans.items()}
    return {"attention": seconds["prefill_attention"], "products": seconds["products"],
            "around them": sum(seconds[name] for name in LINEAR) - seconds["products"],
            "pack": seconds["pack"] + seconds["copy_tail"]}  # fmt: skip


def sdpa_ms(config: ModelConfig, tokens: int) -> dict[str, float]:
    """Median milliseconds of one layer's causal attention over the whole prompt, for each backend that torch has."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def tensor(heads: int) -> Any:
        return torch.randn(1, heads, tokens, config.head_dim, device="cuda", dtype=torch.float16)

    group = config.n_heads // config.n_kv_heads
    q, k, v = tensor(config.n_heads), *(tensor(config.n_kv_heads).repeat_interleave(group, 1) for _ in "kv")
    found = {}
    for name in SDPA:
        times = []
        with sdpa_kernel(getattr(SDPBackend, name)):
            for _ in range(6):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end))
        found[name] = float(np.median(times[1:]))
    return found


if __name__ == "__main__":
    main()
