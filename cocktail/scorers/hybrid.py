"""BM25 and an encoder together: they fail on different questions, and the sum of z-scores is at least as good as the
better one (exact names and numbers for the one, paraphrase for the other)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cocktail.scorers import Scorer, Scores
from cocktail.scorers.bm25 import Bm25Scorer
from cocktail.scorers.encoder import EncoderScorer
from runtime.errors import ScorerError


class HybridScorer:
    """encoder: a folder or name as for EncoderScorer, which also gets the other options."""

    def __init__(self, encoder: str | None = None, similarity: Any = "cosine", batch_size: int | None = None,
                 device: str | None = None):
        if encoder is None:
            raise ScorerError("scorer hybrid needs an encoder: a folder or a name in the local cache, as hybrid:FOLDER")
        self._parts: tuple[Scorer, Scorer] = (Bm25Scorer(), EncoderScorer(encoder, similarity, batch_size, device))
        self.name = f"hybrid:{encoder}"

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        words, meaning = (z_scores(part.score(chunks, query)) for part in self._parts)
        return words + meaning


def z_scores(scores: Scores) -> Scores:
    """(scores - mean) / standard deviation, (N,) float32; zeros where all scores are equal."""
    if scores.size == 0 or np.ptp(scores) == 0:
        return np.zeros_like(scores)
    exact = scores.astype(np.float64)
    return np.asarray((exact - exact.mean()) / exact.std(), np.float32)
