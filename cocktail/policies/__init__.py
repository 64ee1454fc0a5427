"""Policies: scores, sizes and budget -> Plan. A policy returns data and keeps none.

    fp16      every chunk at 16 bits
    cocktail  the paper's thresholds on the scores (cocktail.policies.thresholds)
    budget    rank the chunks, spend a number of bits or bytes (cocktail.policies.budget); the default

What they share: the first `sink` chunks (default 1) stay FP16 whatever their score, and chunks that a sliding window
hides from every decoded token are not stored (width 0), the sink included.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from cocktail.scorers import Scores, finite_scores
from runtime.errors import PlanError
from runtime.plan import FP16, DocumentShape, Layout, Plan, Tier

DEFAULT_POLICY = "budget"
DEFAULT_SINK = 1  # chunks; the first tokens draw attention from everywhere, whatever they say

POLICIES = {
    "fp16": ("cocktail.policies.fp16", "Fp16Policy"),
    "cocktail": ("cocktail.policies.thresholds", "CocktailPolicy"),
    "budget": ("cocktail.policies.budget", "BudgetPolicy"),
}


class Policy(ABC):
    """Two steps, so that the arena can be sized, and prefill begun, before there are scores where the policy allows it.

    uses_scores: False means that scoring is a waste. layout_needs_scores: True means that scoring comes first.
    """

    name: str
    uses_scores: bool
    layout_needs_scores: bool

    @abstractmethod
    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        """How many chunks each tier gets. Raises PlanError."""

    @abstractmethod
    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        """Which chunk sits where; scores (N,) as in the first step, scorer for the Plan's record. Raises PlanError."""

    def plan(self, shape: DocumentShape, scores: Scores | None = None, scorer: str = "none") -> Plan:
        """Both steps at once."""
        return self.assign(self.layout(shape, scores), scores, scorer)


def load_policy(name: str = DEFAULT_POLICY, **options: Any) -> Policy:
    """The policy of that name. Raises PlanError, for unknown options too."""
    if name not in POLICIES:
        raise PlanError(f"there is no policy {name!r}; expected one of {', '.join(POLICIES)}")
    module, cls = POLICIES[name]
    factory = getattr(import_module(module), cls)
    known = inspect.signature(factory).parameters
    if unknown := sorted(options.keys() - known.keys()):
        raise PlanError(f"policy {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    policy: Policy = factory(**options)
    return policy


def default_query(instruction: str | None, end: str) -> str:
    """What to score chunks against when there is no query (summaries, code completion): the instruction (system
    message), else the prompt's last 64 tokens, decoded, which is what the model continues."""
    return instruction if instruction and instruction.strip() else end


# What the policies share.

def check_sink(sink: int) -> int:
    if type(sink) is not int or sink < 0:
        raise PlanError(f"sink is {sink!r}; expected a number of chunks, 0 or more")
    return sink


def sink_chunks(shape: DocumentShape, sink: int) -> range:
    """The chunks that stay FP16 as the sink: the first ones, unless a sliding window hides them."""
    first = len(shape.hidden_chunks())
    return range(first, max(first, min(sink, shape.n_chunks)))


def checked_scores(policy: str, shape: DocumentShape, scores: Scores | None) -> Scores:
    """scores as finite float32 (N,). Raises PlanError when there are none or not one per chunk."""
    if scores is None and shape.n_chunks == 0:
        scores = np.zeros(0, np.float32)
    if scores is None:
        raise PlanError(f"policy {policy} needs one score per chunk; give a scorer")
    if np.shape(scores) != (shape.n_chunks,):
        raise PlanError(f"scores have shape {np.shape(scores)}; expected ({shape.n_chunks},), one per chunk")
    return finite_scores(scores, f"policy {policy}")


def layout_of(shape: DocumentShape, counts: Mapping[Tier, int]) -> Layout:
    """The Layout with the tiers of `counts` that hold a chunk, in that order; the same in every layer."""
    used = {tier: count for tier, count in counts.items() if count} or {FP16: 0}
    return shape.layout(used.keys(), used.values())


def plan_of(layout: Layout, chunks: npt.NDArray[np.int64], policy: str, scorer: str, scores: Scores | None,
            notes: tuple[str, ...] = ()) -> Plan:
    """The Plan with the tier indices `chunks` (N,) in every layer."""
    shared = tuple(chunks.tolist())
    return Plan(layout, (shared,) * layout.n_layers, policy, scorer,
                None if scores is None else tuple(scores.tolist()), notes)
