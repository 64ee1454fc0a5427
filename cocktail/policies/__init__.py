"""Policies: scores, sizes and budget -> Plan. A policy returns data and keeps none.

    fp16      every chunk at 16 bits
    uniform   every chunk at one pair of K and V bits (cocktail.policies.uniform)
    kvtuner   every chunk at its layer's pair, from a file (cocktail.policies.pairs)
    kivi      KIVI: plain min-max, the last tokens FP16 (cocktail.policies.baselines)
    atom      Atom: 4 bits per token and head, K before RoPE (the same)
    kvquant   KVQuant: non-uniform levels and kept outliers, K before RoPE (the same)
    cocktail  the paper's thresholds on the scores (cocktail.policies.thresholds)
    budget    rank the chunks, spend a number of bits or bytes (cocktail.policies.budget); the default

What they share: the first `sink` chunks stay FP16 whatever their score (by default one, but none where a chat header,
which is FP16 anyway, comes before them, nor under the three baselines), and chunks that a sliding window hides from
every decoded token are not stored (width 0), the sink included.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cocktail.scorers import Scores, finite_scores
from runtime.errors import PlanError
from runtime.plan import FP16, DocumentShape, Layout, Plan, Tier

if TYPE_CHECKING:
    from cocktail.policies.formats import Formats
    from cocktail.policies.pairs import LayerPairs
    from runtime.model import Model as Engine

DEFAULT_POLICY = "budget"
# The first tokens draw attention from everywhere, whatever they say. Those of a chat header stay FP16 anyway; behind
# one, a first chunk at FP16 gains nothing (bench/LOG.md): it is kept only where the header is shorter than this.
SINK_TOKENS = 4

POLICIES = {
    "fp16": ("cocktail.policies.fp16", "Fp16Policy"),
    "uniform": ("cocktail.policies.uniform", "UniformPolicy"),
    "kvtuner": ("cocktail.policies.uniform", "KVTunerPolicy"),
    "kivi": ("cocktail.policies.baselines", "KiviPolicy"),
    "atom": ("cocktail.policies.baselines", "AtomPolicy"),
    "kvquant": ("cocktail.policies.baselines", "KvquantPolicy"),
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

    def pinned(self, chunks: Sequence[int]) -> Policy:
        """The same policy, but these chunks get its top tier whatever their scores. Raises PlanError where the policy
        does not choose by chunk."""
        raise PlanError(f"policy {self.name} does not choose by chunk, so it can pin none; use policy budget "
                        "or cocktail")

    def check_model(self, engine: Engine) -> None:  # noqa: B027 (most policies fit every model)
        """Raises PlanError where the policy was made for another model than this one."""

    def plan(self, shape: DocumentShape, scores: Scores | None = None, scorer: str = "none") -> Plan:
        """Both steps at once."""
        return self.assign(self.layout(shape, scores), scores, scorer)


class LayerPolicy(Policy):
    """A policy that ranks chunks, and can do so in each layer anew: for scores that come layer by layer."""

    @abstractmethod
    def ranked(self, shape: DocumentShape) -> range:
        """The chunks whose scores matter."""

    @abstractmethod
    def assign_layer(self, layout: Layout, layer: int, scores: Scores) -> npt.NDArray[np.int64]:
        """Index into layout.tiers of every chunk (N,) in one layer. Raises PlanError."""

    @abstractmethod
    def plan_of_layers(self, layout: Layout, chunks: Sequence[Sequence[int]], scores: Scores, scorer: str) -> Plan:
        """The Plan of what assign_layer gave in all layers; scores (N,), one per chunk, for its record."""


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

def check_sink(sink: int | None) -> int | None:
    if sink is not None and (type(sink) is not int or sink < 0):
        raise PlanError(f"sink is {sink!r}; expected a number of chunks, 0 or more")
    return sink


def sink_chunks(shape: DocumentShape, sink: int | None) -> range:
    """The chunks that stay FP16 as the sink: the first ones, unless a sliding window hides them. None: one chunk where
    the prefix has less than SINK_TOKENS tokens, else none."""
    first = len(shape.hidden_chunks())
    if sink is None:
        sink = int(shape.prefix < SINK_TOKENS)
    return range(first, max(first, min(sink, shape.n_chunks)))


def check_pins(shape: DocumentShape, pins: Sequence[int]) -> None:
    """Raises PlanError where a pinned chunk is not in the document, or hidden from the answer."""
    hidden = len(shape.hidden_chunks())
    for chunk in pins:
        if not 0 <= chunk < shape.n_chunks:
            raise PlanError(f"chunk {chunk} is pinned; the document's chunks are 0 to {shape.n_chunks - 1}")
        if chunk < hidden:
            raise PlanError(f"chunk {chunk} is pinned, but the model's sliding window of {shape.window} tokens hides "
                            f"all chunks before {hidden} from the answer; leave this pin out")


def pin_notes(pins: Sequence[int], tier: Tier) -> tuple[str, ...]:
    """For a Plan's record."""
    return (f"pinned at {tier}: chunk{'s' * (len(pins) > 1)} {', '.join(map(str, pins))}",) if pins else ()


def checked_scores(policy: str, shape: DocumentShape, scores: Scores | None) -> Scores:
    """scores as finite float32 (N,). Raises PlanError when there are none or not one per chunk."""
    if scores is None and shape.n_chunks == 0:
        scores = np.zeros(0, np.float32)
    if scores is None:
        raise PlanError(f"policy {policy} needs one score per chunk; give a scorer")
    if np.shape(scores) != (shape.n_chunks,):
        raise PlanError(f"scores have shape {np.shape(scores)}; expected ({shape.n_chunks},), one per chunk")
    return finite_scores(scores, f"policy {policy}")


def labelled(name: str, **marks: object) -> str:
    """The policy's name for a Plan's record, with the marks that hold: "cocktail (pairs, no search)"."""
    held = [mark.replace("_", " ") for mark, holds in marks.items() if holds]
    return f"{name} ({', '.join(held)})" if held else name


def layout_of(shape: DocumentShape, counts: Mapping[Tier, int], pairs: LayerPairs | None = None,
              formats: Formats | None = None) -> Layout:
    """The Layout in which every layer has these counts; with pairs each layer lifts the tiers to its own pair. formats:
    None for this project's own."""
    if pairs is None:
        return layout_of_layers(shape, [counts], formats)
    pairs.check(shape)
    layers = []
    for layer in range(shape.n_layers):
        lifted: Counter[Tier] = Counter()
        for tier, count in counts.items():
            lifted[pairs.lift(tier, layer)] += count
        layers.append(lifted)
    return layout_of_layers(shape, layers, formats)


def layout_of_layers(shape: DocumentShape, layers: Sequence[Mapping[Tier, int]],
                     formats: Formats | None = None) -> Layout:
    """The Layout of each layer's counts, or of one for all, with the tiers that hold a chunk anywhere, most bits first:
    of two tiers of which one has no fewer bits of K and of V, it comes first."""
    if formats is not None:
        formats.check_shape(shape)
    family: dict[str, Any] = {} if formats is None else {"formats": formats.family, "calibration": formats.file}
    used = {tier for counts in layers for tier, count in counts.items() if count} or {FP16}
    tiers = sorted(used, key=lambda tier: (tier.k_bits + tier.v_bits, tier.k_bits), reverse=True)
    rows = [tuple(counts.get(tier, 0) for tier in tiers) for counts in layers]
    alike = shape.layout(tiers, rows[0], **family)
    return alike if len(rows) == 1 else replace(alike, counts=tuple(rows))


def indices_of(layout: Layout, tiers: Sequence[Tier], pairs: LayerPairs | None = None) -> npt.NDArray[np.int64]:
    """Indices into layout.tiers of these tiers (N,), lifted to each layer's pair where there are pairs: (1 or L, N).

    Raises PlanError where the layout has no such tier: it was made from something else.
    """
    index = {tier: i for i, tier in enumerate(layout.tiers)}
    layers = [tiers] if pairs is None else [[pairs.lift(tier, i) for tier in tiers] for i in range(layout.n_layers)]
    try:
        return np.array([[index[tier] for tier in layer] for layer in layers], np.int64).reshape(len(layers), -1)
    except KeyError as error:
        raise PlanError(f"the layout has no tier {error}; it was made from other scores or options") from None


def plan_of(layout: Layout, chunks: npt.NDArray[np.int64], policy: str, scorer: str, scores: Scores | None,
            notes: tuple[str, ...] = ()) -> Plan:
    """The Plan with the tier indices `chunks`: (L, N), or (1, N) or (N,) for every layer the same."""
    layers = [tuple(layer) for layer in np.atleast_2d(chunks).tolist()]
    assignment = tuple(layers) if len(layers) == layout.n_layers else (layers[0],) * layout.n_layers
    return Plan(layout, assignment, policy, scorer, None if scores is None else tuple(scores.tolist()), notes)
