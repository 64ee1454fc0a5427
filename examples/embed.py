"""Cocktail in a script of your own: read a document once, ask it several questions, see what each answer took.

    python examples/embed.py MODEL DOCUMENT QUESTION...

The second and later questions find the document read: compare their times to the first token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cocktail


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help=".safetensors file or Hugging Face folder")
    parser.add_argument("document", help="UTF-8 text")
    parser.add_argument("question", nargs="+")
    arguments = parser.parse_args()
    try:
        model = cocktail.load(arguments.model)
        with model.read(Path(arguments.document).read_text(encoding="utf-8")) as document:
            for question in arguments.question:
                print(question)
                ask(document, question)
    except (cocktail.CocktailError, OSError) as error:  # of every kind that is no bug
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def ask(document: cocktail.Document, question: str) -> None:
    """Prints the answer as it comes, then what it took."""
    stream = document.ask(question, kv_bits=3.5, max_tokens=64, stream=True)
    for piece in stream:
        print(piece, end="", flush=True)
    stats = stream.answer.stats
    print(f"\n  {stats.ttft_s:.2f} s to the first of {stats.generated_tokens} tokens; "
          f"cache {stats.cache_bytes / 2**20:.1f} MiB, {stats.context_bits_per_value:.2f} bits per value")
    print(f"  chunks {stats.chunks}")


if __name__ == "__main__":
    sys.exit(main())
