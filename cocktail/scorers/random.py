"""Controls: scores that know nothing of the query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cocktail.scorers import Scores
from runtime.errors import ScorerError


class RandomScorer:
    """Uniform noise; the same for the same seed and number of chunks."""

    def __init__(self, seed: int | str = 0):
        if not str(seed).isdecimal():
            raise ScorerError(f"scorer random: seed is {seed!r}; expected an integer, 0 or more")
        self.seed = int(seed)
        self.name = f"random:{self.seed}"

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        return np.random.default_rng(self.seed).random(len(chunks), np.float32)


class EqualScorer:
    """All zero: a policy that ranks keeps document order, the paper's thresholds give INT4 throughout."""

    name = "none"

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        return np.zeros(len(chunks), np.float32)
