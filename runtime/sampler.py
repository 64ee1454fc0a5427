"""How the next id is drawn: parameters, a seeded stream of uniform numbers, and the ids seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from runtime.backend import Array, Backend
from runtime.errors import PromptError


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 leave the distribution as it is.

    In this order: the penalty (as in CTRL, Keskar et al. 2019, over prompt and answer), temperature, top-k, min-p
    (relative to the best), top-p (the smallest set whose mass reaches it). The same seed draws the same ids.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
                                ("repetition_penalty", 0.01, 100.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not isfinite(value) or not low <= value <= high:
                raise PromptError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
        if self.top_p == 0.0:
            raise PromptError("top_p is 0; expected more than 0 (1 turns it off)")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
                raise PromptError(f"{name} is {value!r}; expected an integer of at least 0")


class Sampler:
    """Draws ids for one sequence. The prompt's ids count as seen."""

    def __init__(self, backend: Backend, params: SamplingParams, prompt: Sequence[int], max_new: int):
        self._backend, self._params = backend, params
        self._random = np.random.default_rng(params.seed)
        # Only the penalty reads what was seen; without it nothing is kept.
        self._keeps_seen = params.repetition_penalty != 1.0
        seen = np.zeros(len(prompt) + max_new if self._keeps_seen else 1, np.int32)
        self._n_seen = len(prompt) if self._keeps_seen else 0
        seen[: self._n_seen] = prompt[: self._n_seen]
        self._seen = backend.upload(seen)

    def draw(self, logits: Array) -> int:
        """The next id from logits (1, V)."""
        p = self._params
        uniform = float(self._random.random()) if p.temperature > 0 else 0.0
        token = self._backend.sample(logits, p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty,
                                     self._seen, self._n_seen, uniform)
        if self._keeps_seen and self._n_seen < self._seen.shape[0]:
            self._seen[self._n_seen : self._n_seen + 1] = self._backend.upload(np.array([token], np.int32))
            self._n_seen += 1
        return token
