"""Teacher forcing of a whole answer in one pass, for those that try many caches: bench.quality, cocktail.tune.

A decode step takes one token because the next is not known yet; a forced answer is known. The K and V of all its tokens
go into their tail slots first, then every token attends with a state of its own, which hides the slots behind it: the
decode operations over a batch whose sequences are one. Reading.force takes a step per token and is what is measured
against (tests); on a GPU this is about as many launches for the whole answer as that takes for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backend import STATE_POSITION, STATE_SIZE, STATE_SLOT, STATE_TOKEN, Array
from runtime.cache import Cache
from runtime.engine import Reading
from runtime.errors import PromptError
from runtime.model import Model, StepBuffers, decode_step


def force(reading: Reading, answer: Sequence[int], cache: int) -> npt.NDArray[np.float32]:
    """As Reading.force: (len(answer), V) float32; row i predicts answer[i], row 0 from the exact prefill.

    The logits differ from a step's by the rounding of activations that go through a product for several rows. Caches
    that pack their tail while they decode are forced token by token.
    """
    target, backend = reading.caches[cache], reading.model.backend
    if len(answer) > target.layout.max_new + 1:
        raise PromptError(f"the answer to force has {len(answer)} ids; expected at most {target.layout.max_new + 1}")
    if len(answer) < 2 or target.layout.flush is not None:
        return reading.force(answer, cache)
    rows = _Rows.of(target, reading.model, answer[:-1])
    buffers = StepBuffers.allocate(reading.model.config, backend, len(rows.token))
    logits = backend.empty((len(rows.token), reading.first_logits.shape[1]), np.float32)
    decode_step(reading.model, rows, reading.rope, buffers, logits)
    return np.concatenate([reading.first_logits, backend.download(logits)])


@dataclass
class _Rows:
    """runtime.model.StepRows for T tokens of one sequence: k, v are its tail's; bound: T times the sequence's own."""

    token: Array
    position: Array
    slot: Array
    state: Array
    k: tuple[Array, ...]
    v: tuple[Array, ...]
    bound: tuple[Any, ...]
    staged: bool = False

    @classmethod
    def of(cls, cache: Cache, model: Model, ids: Sequence[int]) -> _Rows:
        backend, layout = model.backend, cache.layout
        state = np.zeros((len(ids), STATE_SIZE), np.int32)
        state[:, STATE_TOKEN] = ids
        state[:, STATE_POSITION] = layout.prompt_tokens + np.arange(len(ids))
        state[:, STATE_SLOT] = state[:, STATE_POSITION] - layout.n_chunks * layout.chunk
        token, position, slot = (backend.upload(np.ascontiguousarray(state[:, column]))
                                 for column in (STATE_TOKEN, STATE_POSITION, STATE_SLOT))
        return cls(token, position, slot, backend.upload(state), cache.k, cache.v,
                   tuple(backend.bind_batch([bound] * len(ids)) for bound in cache.bound))
