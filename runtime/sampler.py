"""How ids are drawn: parameters, a seeded stream of uniform numbers, and the ids seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from runtime.backend import Backend, Draws
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
    """Draws up to max_new ids for one sequence, again and again. The prompt's ids count as seen.

    draws: what Backend.sample takes; ids: (max_new,) int32, the host's view of what was drawn.
    """

    def __init__(self, backend: Backend, prompt: Sequence[int], max_new: int):
        self._backend, self._max_new = backend, max_new
        visible, self.ids = backend.visible(max_new)
        seen = np.array([*prompt, *[0] * max_new], np.int32)
        self.draws = Draws(backend.empty((5,), np.float64), backend.empty((max_new,), np.float64),
                           backend.upload(seen), visible)

    def start(self, params: SamplingParams) -> None:
        """Begin an answer: the same seed draws the same ids."""
        options = params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty
        uniforms = np.random.default_rng(params.seed).random(self._max_new)
        self.draws.options[:] = self._backend.upload(np.array(options, np.float64))
        self.draws.uniforms[:] = self._backend.upload(uniforms)
