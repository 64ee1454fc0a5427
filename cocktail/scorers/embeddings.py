"""Scores from embeddings, wherever they come from: cosine or dot product of the query's and each chunk's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from cocktail.scorers import Scores, finite_scores
from runtime.errors import ScorerError

Similarity = Literal["cosine", "dot"]
Embed = Callable[[Sequence[str], bool], npt.ArrayLike]  # (texts, whether they are queries) -> (N, size)


class EmbeddingScorer:
    """Cosine (the paper, Eq. 1) or dot product. Contriever was trained with the dot product; the paper scores it by
    cosine, and so does this by default."""

    def __init__(self, name: str, embed: Embed, similarity: Similarity = "cosine"):
        if similarity not in ("cosine", "dot"):
            raise ScorerError(f"encoder similarity is {similarity!r}; expected 'cosine' or 'dot'")
        self.name = name
        self._embed = embed
        self._cosine = similarity == "cosine"

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        """A chunk whose embedding is zero or not finite gets the lowest score, with a warning."""
        if not chunks:
            return np.zeros(0, np.float32)
        wanted = self._prepared(self._embed([query], True))[0]
        found = self._prepared(self._embed(chunks, False))
        if found.shape != (len(chunks), wanted.size):
            raise ScorerError(f"{self.name}: embeddings of {len(chunks)} chunks have shape {found.shape}; expected "
                              f"{(len(chunks), wanted.size)}, as many numbers as the query's")
        # Not found @ wanted: BLAS would take threads to it, which keep the cores busy for some 0.1 s behind the product
        # of a millisecond: just when the next texts are tokenized, or the prompt is read.
        return finite_scores(np.einsum("ne,e->n", found, wanted), f"encoder {self.name}")

    def _prepared(self, embeddings: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(N, size), of unit length for cosine; NaN rows where the embedding is zero or not finite."""
        rows = np.array(embeddings, np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows[~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)] = np.nan
        return rows / norms if self._cosine else rows
