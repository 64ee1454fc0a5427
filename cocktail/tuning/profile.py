"""How much each layer's attention output suffers from each pair of widths (KVTuner, step 1).

Measured where it happens: one decode over the exact cache, and in every layer the same query also attends over a cache
of each candidate, through the runtime's own packing and kernels. Layers do not see one another's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cocktail.policies import load_policy
from cocktail.tuning.calibration import Calibration, Sample
from runtime.backend import Array, Backend
from runtime.cache import Cache
from runtime.model import StepBuffers, decode_step
from runtime.plan import Tier


def profile(calibration: Calibration, candidates: Sequence[Tier],
            progress: Callable[[int, int], None] | None = None) -> npt.NDArray[np.float64]:
    """Relative error of each layer's attention output, (L, candidates): the root of the sum of squared differences from
    the exact output over that of its squares, over all answer tokens but the first. progress(samples done, in all)."""
    errors = norms = np.zeros(())
    for done, sample in enumerate(calibration.samples):
        if progress is not None:
            progress(done, len(calibration.samples))
        more_errors, more_norms = _squares(sample, candidates, calibration.sink)
        errors, norms = errors + more_errors, norms + more_norms
    return np.asarray(np.sqrt(errors / np.maximum(norms, np.finfo(np.float64).tiny)[:, None]))


def _squares(sample: Sample, candidates: Sequence[Tier],
             sink: int | None) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums over one sample's answer: squared errors (L, candidates) and squared outputs (L,)."""
    engine = sample.model.engine
    policies = [load_policy("fp16"), *(load_policy("uniform", tier=tier, sink=sink) for tier in candidates)]
    exact, *others = sample.reading(*[policy.plan(sample.shape) for policy in policies]).caches
    watched = _Watched(engine.backend, others)
    model = replace(engine, backend=watched)
    buffers = StepBuffers.allocate(engine.config, engine.backend, 1)
    logits = engine.backend.empty((1, engine.config.vocab_size), np.float32)
    exact.start()
    for token in sample.answer[:-1]:
        engine.backend.advance(exact.state, token)
        watched.layer = 0
        decode_step(model, exact, sample.rope, buffers, logits)
    return watched.errors, watched.norms


class _Watched:
    """A backend whose decode steps also write K and V to, and attend over, other caches of the same shape."""

    def __init__(self, backend: Backend, caches: Sequence[Cache]) -> None:
        self._backend, self._caches = backend, caches
        self.layer = 0  # of the step that runs
        layers = len(caches[0].k)
        self.errors, self.norms = np.zeros((layers, len(caches))), np.zeros(layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def qkv(self, *arguments: Any) -> None:
        """K and V go to the exact cache's tail, then to that of every other."""
        project: Any = self._backend.qkv
        project(*arguments)
        for cache in self._caches:
            project(*arguments[:-2], cache.k[self.layer], cache.v[self.layer])

    def decode_attention(self, q: Array, bound: Any, state: Array, out: Array) -> None:
        """The others first: `out` is left with the exact output, which the model goes on with."""
        outputs = []
        for cache in self._caches:
            self._backend.decode_attention(q, cache.bound[self.layer], state, out)
            outputs.append(self._backend.download(out).astype(np.float64))
        self._backend.decode_attention(q, bound, state, out)
        exact = self._backend.download(out).astype(np.float64)
        self.errors[self.layer] += [np.square(output - exact).sum() for output in outputs]
        self.norms[self.layer] += np.square(exact).sum()
        self.layer += 1
