"""Two policies, or more, on your own document: how much of the cache each takes, and what it does to the answer.

    python examples/compare.py MODEL DOCUMENT QUESTION
    python examples/compare.py MODEL DOCUMENT QUESTION --policies "budget kv_bits=3" "kivi bits=2" "uniform tier=K4V2"

The document is read once for all of them. KL is the mean divergence of the next token's distribution from the FP16
cache's, in nats, along the FP16 cache's own answer; the first token comes from the exact prefill and does not count.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import cocktail

F32 = npt.NDArray[np.float32]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help=".safetensors file or Hugging Face folder")
    parser.add_argument("document", help="UTF-8 text")
    parser.add_argument("question")
    parser.add_argument("--policies", nargs="+", default=["budget kv_bits=3.3", "uniform tier=K3V2"],
                        help='a name and options each, such as "budget kv_bits=4"')
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    try:
        document = cocktail.load(arguments.model).read(Path(arguments.document).read_text(encoding="utf-8"))
        plans = {text: document.pending(arguments.question, policy=policy(text), max_tokens=arguments.max_tokens)
                 for text in ("fp16", *arguments.policies)}
        compared = document.compare(arguments.question, plans, max_tokens=arguments.max_tokens)
    except (cocktail.CocktailError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    exact = compared["fp16"].logits
    for name, one in compared.items():
        print(f"{name}: {one.context_bits_per_value:.2f} bits per value, {one.arena_bytes / 2**20:.2f} MiB, "
              f"KL {divergence(exact, one.logits):.4f}\n  {' '.join(one.text.split())}")
    return 0


def policy(text: str) -> cocktail.Policy:
    """From a name and its options, as "budget kv_bits=4"."""
    name, *options = text.split()
    return cocktail.load_policy(name, **dict(map(option, options)))


def option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, value


def divergence(exact: F32, other: F32) -> float:
    """Mean KL(exact || other) over the rows (T, V) of logits behind the first."""
    p, q = (log_softmax(logits[1:].astype(np.float64)) for logits in (exact, other))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean()) if len(p) else 0.0


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


if __name__ == "__main__":
    sys.exit(main())
