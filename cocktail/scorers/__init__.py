"""Scorers: (chunk texts, query) -> one similarity per chunk. Higher means more relevant; only the order and the
relative distances matter, never the scale.

    bm25      words in common (cocktail.scorers.bm25); needs no model
    hybrid    bm25 and an encoder, z-scores added; option `encoder` names the model, or "hybrid:FOLDER"
    attention the model's own, layer by layer in prefill (cocktail.scorers.attention); policy budget only
    random    noise, the control that shows what relevance is worth; option `seed`, or "random:7"
    none      all equal
    endpoint  an OpenAI-compatible embeddings endpoint (cocktail.scorers.endpoint); option `model`, or "endpoint:MODEL"
    llm-embedder  that model's instructions before queries and passages; option `model`, or "llm-embedder:FOLDER"
    library   sentence-transformers, for encoders that our own kernels refuse; option `model`, or "library:FOLDER"
    anything else is a BERT encoder on our own kernels: a folder, or a name in the local Hugging Face cache
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import ScorerError

Scores = npt.NDArray[np.float32]

# name -> (module, class); imported only when asked for, since some need an extra and all cost start-up time.
SCORERS = {
    "bm25": ("cocktail.scorers.bm25", "Bm25Scorer"),
    "hybrid": ("cocktail.scorers.hybrid", "HybridScorer"),
    "attention": ("cocktail.scorers.attention", "AttentionScorer"),
    "random": ("cocktail.scorers.random", "RandomScorer"),
    "none": ("cocktail.scorers.random", "EqualScorer"),
    "endpoint": ("cocktail.scorers.endpoint", "EndpointScorer"),
    "llm-embedder": ("cocktail.scorers.llm_embedder", "LlmEmbedderScorer"),
    "library": ("cocktail.scorers.library", "LibraryScorer"),
}
# The option that "name:value" sets.
_VALUES = {"hybrid": "encoder", "random": "seed", "endpoint": "model", "llm-embedder": "model", "library": "model"}
_ENCODER = ("cocktail.scorers.encoder", "EncoderScorer")


class Scorer(Protocol):
    """name goes into plans and reports."""

    name: str

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        """float32 (N,), finite. Deterministic. Raises ScorerError."""


def load_scorer(name_or_path: str, *, device: str | None = None, threads: int | None = None, **options: Any) -> Scorer:
    """The scorer of that name, or the encoder in that folder. Raises ScorerError, for unknown options too.

    device: "cpu" or "cuda", where an encoder runs; threads: of our own kernels on the CPU. None: its own choice. What
    runs no encoder has no use for either.
    """
    name, _, value = name_or_path.partition(":")
    if name in _VALUES and value:
        name_or_path, options = name, {_VALUES[name]: value, **options}
    module, cls = SCORERS.get(name_or_path, _ENCODER)
    if (module, cls) == _ENCODER:
        options = {"model": name_or_path, **options}
    factory = getattr(import_module(module), cls)
    known = inspect.signature(factory).parameters
    where = {"device": device, "threads": threads}
    options |= {key: value for key, value in where.items() if value is not None and key in known}
    if unknown := sorted(options.keys() - known.keys()):
        raise ScorerError(f"scorer {name_or_path} has no option {', '.join(unknown)}; "
                          f"it has {', '.join(known) or 'none'}")
    scorer: Scorer = factory(**options)
    return scorer


def finite_scores(scores: npt.ArrayLike, source: str) -> Scores:
    """scores (N,) as float32 with NaN and infinities replaced by the lowest finite score, and a warning.

    The lowest that occurs, not the lowest possible: a broken embedding must not move the paper's thresholds, which
    depend on the smallest score (Eq. 2, 3).
    """
    result = np.array(scores, np.float32)
    finite = np.isfinite(result)
    if not finite.all():
        result[~finite] = result[finite].min() if finite.any() else 0
        warnings.warn(f"{source}: {np.count_nonzero(~finite)} of {result.size} scores were not finite and count as "
                      "the lowest", stacklevel=2)
    return result
