"""Peak memory of one answer against what it should need. `python -m bench.memory --model PATH [--context-tokens 6144]`

expected = weights + the planned arena + one layer's FP16 K and V + activations. measured = the process's peak resident
memory less what it held before the weights were touched (interpreter, libraries, tokenizer, text).

On a GPU: `--backend cuda` for a checkpoint, `--shape llama-2-7b` for random weights of known sizes (bench.shapes).
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
from collections.abc import Sequence
from pathlib import Path

import cocktail
from bench.report import on_gpu
from cocktail.answer import peak_memory
from runtime.checkpoint import Checkpoint
from runtime.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    if on_gpu(arguments, ("memory",), "memory"):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--context-tokens", type=int, default=6144)
    parser.add_argument("--kv-bits", type=float, default=3.3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu", help="cuda has options of its own")
    args = parser.parse_args(arguments)

    with Checkpoint.open(args.model) as checkpoint:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    text = tokenizer.decode(tokenizer.encode("\n\n".join(pydoc_data.topics.topics.values()))[: args.context_tokens])
    before = resident()

    model = cocktail.load(args.model, backend="cpu", threads=args.threads)
    doc = model.read(text, keep=False)
    answer = doc.ask("What does this document describe?", kv_bits=args.kv_bits, max_tokens=16)
    measured = peak_memory() - before

    config, tokens = model.config, answer.stats.prompt_tokens
    layer = 2 * 2 * config.n_kv_heads * config.head_dim * tokens
    per_row = config.hidden_size  # x of every token; the rest is per tile row
    tile_row = 2 * config.n_heads * config.head_dim + config.intermediate_size
    tile = model.backend.prefill_tile
    activations = 4 * (tokens * (per_row + config.head_dim) + tile * tile_row + 2 * config.vocab_size)
    parts = {"weights": model.weights_bytes, "arena": answer.stats.cache_bytes, "one layer's K and V": layer,
             "activations": activations}
    expected = sum(parts.values())
    mib = 2**20
    for name, size in parts.items():
        print(f"{name:22} {size / mib:8.1f} MiB")
    print(f"{'expected':22} {expected / mib:8.1f} MiB")
    print(f"{'measured':22} {measured / mib:8.1f} MiB   {measured / expected:.3f} of expected")
    print(f"{'FP16 cache instead':22} {answer.stats.cache_fp16_bytes / mib:8.1f} MiB   "
          f"{tokens} tokens at {answer.stats.context_bits_per_value:.2f} bits per context value")
    print(json.dumps({"bench": "memory", "tokens": tokens, "expected": expected, "measured": measured, **parts}))


def resident() -> int:
    """Resident memory now, in bytes (Linux)."""
    if not sys.platform.startswith("linux"):
        raise SystemExit("bench.memory reads /proc and runs on Linux only")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmRSS")


if __name__ == "__main__":
    main()
