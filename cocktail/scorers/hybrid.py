"""BM25 and an encoder together: they fail on different questions, and the sum of z-scores is at least as good as the
better one (exact names and numbers for the one, paraphrase for the other)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cocktail.scorers import Scorer, Scores, load_scorer
from cocktail.scorers.bm25 import Bm25Scorer
from cocktail.scorers.embeddings import Similarity
from runtime.errors import ScorerError


class HybridScorer:
    """encoder: any scorer of embeddings, such as a folder or endpoint:MODEL; it also gets the other options."""

    def __init__(self, encoder: str | None = None, similarity: Similarity | None = None, device: str | None = None,
                 threads: int | None = None):
        if encoder is None:
            raise ScorerError("scorer hybrid needs an encoder: a folder or a name in the local cache, as hybrid:FOLDER")
        given = {} if similarity is None else {"similarity": similarity}
        meaning = load_scorer(encoder, device=device, threads=threads, **given)
        self._parts: tuple[Scorer, Scorer] = (Bm25Scorer(), meaning)
        self.name = f"hybrid:{meaning.name}"

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        words, meaning = (z_scores(part.score(chunks, query)) for part in self._parts)
        return words + meaning


def z_scores(scores: Scores) -> Scores:
    """(scores - mean) / standard deviation, (N,) float32; zeros where all scores are equal."""
    if scores.size == 0 or np.ptp(scores) == 0:
        return np.zeros_like(scores)
    exact = scores.astype(np.float64)
    return np.asarray((exact - exact.mean()) / exact.std(), np.float32)
