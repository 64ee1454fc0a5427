"""What an answer would take, before anything is read or run: the plan, the bytes, the least time of a token.

Only the checkpoint's config and tokenizer are opened. Its weights are opened where a policy asks about them (a file of
pairs or levels that names the model it was made for).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cocktail.document import Document
from cocktail.fit import prefill_bytes, step_bytes
from cocktail.model import Model, open_model
from runtime.arena import ArenaLayout
from runtime.backend import Backend
from runtime.chat import ChatTemplate
from runtime.checkpoint import Checkpoint
from runtime.diagnosis.measure import read_rate
from runtime.engine import PendingPlan, Planned
from runtime.model import Model as Engine
from runtime.plan import Layout, Plan
from runtime.tokenizer import Tokenizer
from runtime.weights import Weights, load_weights


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds. Layout, plan and cache_bytes are exact. Estimated are weights_bytes, as the file stores them,
    and prefill_bytes, from the sizes.

    plan: None where it depends on the model's attention, which only a prefill knows. free_bytes: on the backend's
    device; None where the system does not say. read_rate: bytes per second, measured now; None where too little memory
    is free to measure it. step_bytes: what the first decoded token has to read.
    """

    layout: Layout
    plan: Plan | None
    weights_bytes: int
    step_bytes: int
    prefill_bytes: int
    free_bytes: int | None
    read_rate: float | None
    backend: str

    @property
    def cache_bytes(self) -> int:
        """The whole arena."""
        return ArenaLayout(self.layout).nbytes

    @property
    def cache_fp16_bytes(self) -> int:
        """The same tokens at 16 bits."""
        return ArenaLayout(self.layout).fp16_bytes

    @property
    def context_bits_per_value(self) -> float:
        """All metadata and the sink counted."""
        return ArenaLayout(self.layout).context_bits_per_value

    @property
    def total_bytes(self) -> int:
        """Weights, cache and what prefill needs besides."""
        return self.weights_bytes + self.cache_bytes + self.prefill_bytes

    @property
    def tpot_floor_s(self) -> float | None:
        """No token can take less: everything it has to read, over the read rate."""
        return None if self.read_rate is None else self.step_bytes / self.read_rate

    def to_dict(self) -> dict[str, Any]:
        """For a line of JSON; the plan is left out."""
        return {"backend": self.backend, "prompt_tokens": self.layout.prompt_tokens, "max_new": self.layout.max_new,
                "context_bits_per_value": self.context_bits_per_value, "cache_bytes": self.cache_bytes,
                "cache_fp16_bytes": self.cache_fp16_bytes, "weights_bytes": self.weights_bytes,
                "prefill_bytes": self.prefill_bytes, "total_bytes": self.total_bytes, "free_bytes": self.free_bytes,
                "read_rate": self.read_rate, "step_bytes": self.step_bytes, "tpot_floor_s": self.tpot_floor_s}


class Outline(Model):
    """A model without its weights: to read documents and make plans, not to answer. step_bytes: what of the weights
    every token has to read, all but an embedding that is not the head too."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, step_bytes: int):
        super().__init__(engine, tokenizer, template)
        self.step_bytes = step_bytes


def outline(path: str | Path, backend: str = "auto", threads: int | None = None) -> Outline:
    """The model of a checkpoint. Raises as cocktail.load."""
    with open_model(path, backend, threads) as (checkpoint, tokenizer, template, chosen):
        weights = cast(Weights, _Unread(Path(path), chosen, checkpoint.nbytes))
        return Outline(Engine(checkpoint.config, weights, chosen), tokenizer, template, step_bytes(checkpoint))


def estimate(model: Outline, document: Document, query: str, options: Mapping[str, Any]) -> Estimate:
    """document: read by the model. options: of Document.pending, or a plan. Raises PromptError, PlanError, ScorerError.
    """
    free = model.backend.free_bytes()  # before a policy has weights read: on a GPU they would count twice
    planned: Planned
    if "plan" in options:
        planned = options["plan"]
        document.check_plan(planned, query)
    else:
        planned = document.pending(query, **options)
    layout = planned.layout
    token = 4 * layout.n_layers * layout.n_kv_heads * layout.head_dim  # K and V of one in the tail, FP16
    rate = read_rate(model.backend, free)
    return Estimate(
        layout=layout,
        plan=planned if isinstance(planned, Plan) else planned.make() if isinstance(planned, PendingPlan) else None,
        weights_bytes=model.weights_bytes,
        step_bytes=model.step_bytes + ArenaLayout(layout).nbytes - token * layout.max_new,
        prefill_bytes=prefill_bytes(model.config, layout.prompt_tokens, layout.max_new), free_bytes=free,
        read_rate=None if rate is None else 1e9 * rate, backend=model.backend.name)


class _Unread:
    """Stands for weights, which are read when any is asked for."""

    def __init__(self, path: Path, backend: Backend, nbytes: int) -> None:
        self._path, self._backend, self.nbytes = path, backend, nbytes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for
            raise AttributeError(name)
        with Checkpoint.open(self._path) as checkpoint:
            self.__dict__.update(vars(load_weights(checkpoint, self._backend)))
        return self.__dict__[name]
