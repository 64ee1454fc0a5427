"""Scorers to be timed: BM25, and encoders of known sizes with random weights, whose speed is that of trained ones.

An encoder gets a WordPiece vocabulary from the very text that it scores, small enough to split words about as often
as a trained one does, so nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.prompts import build_text
from cocktail.scorers import Scorer, load_scorer

QUERY = "How are the attributes of a class looked up?"
ENCODERS = {  # hidden size, layers, heads
    "minilm": (384, 6, 12),  # all-MiniLM-L6-v2, 22M parameters
    "contriever": (768, 12, 12),  # BERT base, 110M parameters
}
SCORERS = ("bm25", "minilm", "hybrid", "contriever")  # hybrid: bm25 and minilm
CHARACTERS = 128  # of a chunk of 32 tokens
VOCABULARY = 8000
EMBEDDINGS = 30522  # rows of the encoders' tables


def chunk_texts(n: int) -> list[str]:
    """n consecutive pieces of documentation; the text begins anew where it is too short."""
    text = build_text(n * CHARACTERS, len)
    text *= -(-n * CHARACTERS // len(text))
    return [text[i * CHARACTERS : (i + 1) * CHARACTERS] for i in range(n)]


def make_scorer(name: str, texts: Sequence[str], folder: Path) -> Scorer:
    """One of SCORERS; an encoder's files go to `folder`, once."""
    if name == "bm25":
        return load_scorer("bm25")
    encoder = folder / ("minilm" if name == "hybrid" else name)
    if not encoder.exists():
        _save_encoder(encoder, *ENCODERS[encoder.name], texts)
    return load_scorer(f"hybrid:{encoder}" if name == "hybrid" else str(encoder))


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
