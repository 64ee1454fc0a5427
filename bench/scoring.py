"""Scoring time of each scorer by itself: `python -m bench.scoring`. Its share of TTFT: bench.shapes, bench.prefill.

BM25, and encoders of known sizes with random weights, whose speed is that of trained ones, on our own kernels and, with
--library, by sentence-transformers beside them.

An encoder gets a WordPiece vocabulary from the very text that it scores, small enough to split words about as often
as a trained one does, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.prompts import build_text
from bench.report import describe_run, emit, print_table, progress, some_of
from cocktail.scorers import Scorer, load_scorer
from runtime.encoder import load_encoder_backend
from runtime.errors import BackendError

QUERY = "How are the attributes of a class looked up?"
ENCODERS = {  # hidden size, layers, heads
    "minilm": (384, 6, 12),  # all-MiniLM-L6-v2, 22M parameters
    "contriever": (768, 12, 12),  # BERT base, 110M parameters
}
SCORERS = ("bm25", "minilm", "hybrid", "contriever")  # hybrid: bm25 and minilm
LIBRARY = ("library:minilm", "library:contriever")  # by sentence-transformers
CHARACTERS = 128  # of a chunk of 32 tokens
VOCABULARY = 8000
EMBEDDINGS = 30522  # rows of the encoders' tables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1024, help="of 32 tokens (1024, which is 32K tokens)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of the encoders; default: their choice")
    parser.add_argument("--scorers", type=some_of((*SCORERS, *LIBRARY)), default=[*SCORERS],
                        help=f"of {','.join((*SCORERS, *LIBRARY))}")
    parser.add_argument("--library", action="store_true", help="sentence-transformers beside our own kernels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    args = parser.parse_args(arguments)
    names = dict.fromkeys([*args.scorers, *(LIBRARY if args.library else ())])
    check_scorers(names)
    texts, found = chunk_texts(args.chunks), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            scorer = make_scorer(name, texts, Path(folder), args.device)
            found[name] = scorer.name.replace(folder, ""), score_seconds(scorer, texts, args.rounds)
            progress(f"{name}: {1e3 * found[name][1]:.1f} ms")
    print(f"{args.chunks} chunks of 32 tokens, median of {args.rounds}")
    print_table(("scorer", "what ran", "ms", "us a chunk"),
                [(name, ran, f"{1e3 * seconds:.1f}", f"{1e6 * seconds / args.chunks:.0f}")
                 for name, (ran, seconds) in found.items()])
    emit({"bench": "scoring", "run": describe_run(), "chunks": args.chunks,
          "seconds": {name: seconds for name, (_, seconds) in found.items()}}, args.json)


def chunk_texts(n: int) -> list[str]:
    """n consecutive pieces of documentation; the text begins anew where it is too short."""
    text = build_text(n * CHARACTERS, len)
    text *= -(-n * CHARACTERS // len(text))
    return [text[i * CHARACTERS : (i + 1) * CHARACTERS] for i in range(n)]


def check_scorers(names: Iterable[str]) -> None:
    """Ends the program where one of SCORERS or LIBRARY cannot run on this machine: before anything is measured."""
    own = [name for name in names if name in ENCODERS or name == "hybrid"]
    try:
        if own:
            load_encoder_backend()
    except BackendError as error:
        raise SystemExit(f"error: {', '.join(own)}: {error}; or give --scorers bm25,{','.join(LIBRARY)}") from error


def make_scorer(name: str, texts: Sequence[str], folder: Path, device: str | None = None) -> Scorer:
    """One of SCORERS or LIBRARY; an encoder's files go to `folder`, once. device: of an encoder; None: its choice."""
    if name == "bm25":
        return load_scorer("bm25")
    by, _, size = name.rpartition(":")
    encoder = folder / ("minilm" if name == "hybrid" else size)
    if not encoder.exists():
        _save_encoder(encoder, *ENCODERS[encoder.name], texts)
    by = "hybrid" if name == "hybrid" else by
    return load_scorer(f"{by}:{encoder}" if by else str(encoder), device=device)


def score_seconds(scorer: Scorer, texts: Sequence[str], rounds: int = 5) -> float:
    """Median of `rounds` scorings by itself, after two to warm up."""
    seconds = []
    for _ in range(2 + rounds):
        begin = time.perf_counter()
        scorer.score(texts, QUERY)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[2:]))


def _save_encoder(folder: Path, hidden: int, layers: int, heads: int, texts: Sequence[str]) -> None:
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = BertWordPieceTokenizer()
    words.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    tokenizer: Any = BertTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=EMBEDDINGS, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=4 * hidden)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        BertModel(config).save_pretrained(folder)
    os.sync()  # what is still being written to disk would slow down what is measured next


if __name__ == "__main__":
    main()
