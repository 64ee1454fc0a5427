"""The same width for every chunk: `uniform`, one pair of K and V bits everywhere, and `kvtuner`, one pair per layer.

Neither looks at the question. The sink stays FP16, and chunks that a sliding window hides are not stored, as under
every policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cocktail.policies import Policy, check_sink, indices_of, labelled, layout_of, plan_of, sink_chunks
from cocktail.policies.formats import Formats
from cocktail.policies.pairs import LayerPairs, load_pairs
from cocktail.scorers import Scores
from runtime.errors import PlanError
from runtime.plan import FP16, HIDDEN, DocumentShape, Layout, Plan, Tier

if TYPE_CHECKING:
    from runtime.model import Model as Engine


class UniformPolicy(Policy):
    """tier: bits of K and V of every chunk behind the sink, as "K4V2". formats, calibration: cocktail.policies.formats.
    Raises PlanError."""

    name = "uniform"
    uses_scores = False
    layout_needs_scores = False
    _pairs: LayerPairs | None = None

    def __init__(self, tier: str | Tier | None = None, sink: int | None = None, formats: str = "rotated",
                 calibration: str | Path | None = None):
        if tier is None:
            raise PlanError(f"policy {self.name} needs a tier: the bits of K and of V, such as K4V2 or K8V8")
        self.tier = tier if isinstance(tier, Tier) else Tier.parse(tier.strip())
        if self.tier == HIDDEN:
            raise PlanError(f"policy {self.name}: tier {self.tier} stores nothing; expected widths from 2 to 16")
        self.sink = check_sink(sink)
        self.formats = Formats.load(self.name, formats, calibration)
        self.formats.check(self.name, self.tier)

    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        tiers = self._tiers(shape)
        return layout_of(shape, {tier: tiers.count(tier) for tier in (FP16, self.tier, HIDDEN)}, self._pairs,
                         self.formats)

    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        chunks = indices_of(layout, self._tiers(layout), self._pairs)
        return plan_of(layout, chunks, labelled(self.name, **self.formats.mark), scorer, None)

    def check_model(self, engine: Engine) -> None:
        self.formats.check_model(engine)

    def _tiers(self, shape: DocumentShape) -> list[Tier]:
        hidden, sink = len(shape.hidden_chunks()), len(sink_chunks(shape, self.sink))
        return [HIDDEN] * hidden + [FP16] * sink + [self.tier] * (shape.n_chunks - hidden - sink)


class KVTunerPolicy(UniformPolicy):
    """pairs: a file of one pair per layer (cocktail.policies.pairs). pairs_bits: take the file's most accurate
    trade-off with at most so many bits per value instead of its own choice. Raises PlanError."""

    name = "kvtuner"

    def __init__(self, pairs: str | Path | LayerPairs | None = None, pairs_bits: float | None = None,
                 sink: int | None = None):
        super().__init__(Tier(2, 2), sink)  # the lowest: every layer lifts it to its pair
        if pairs is None:
            raise PlanError("policy kvtuner needs pairs: a file made by python -m cocktail.tune")
        self._pairs = load_pairs(pairs, pairs_bits)

    def check_model(self, engine: Engine) -> None:
        if self._pairs is not None:
            self._pairs.check_model(engine)
