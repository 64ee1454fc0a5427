"""The paper's policy: two thresholds on the similarity scores (section III-B, Eq. 1-3). Named "cocktail".

The scores' shape alone decides the bytes; for a given number of bytes see cocktail.policies.budget. Where the paper is
silent:

- All scores equal, or one chunk: both inequalities are strict and nothing exceeds itself, so INT4 throughout.
- No whole chunk: there is nothing to quantize, everything is in the FP16 tail.
- alpha + beta >= 1 puts T_low at or above T_high: refused.
- A score that is not finite counts as the lowest finite one, with a warning, and moves no threshold.
- The sink (first chunk) stays FP16 although the paper has none; sink=0 is the paper's. Its score still counts in Eq. 2
  and 3.
- Sliding window: hidden chunks are not stored, and their scores do not count.
- Text scores only: with scores that arrive layer by layer the Layout would be unknown when the arena is allocated.
"""

from __future__ import annotations

from math import isfinite

import numpy as np

from cocktail.policies import DEFAULT_SINK, Policy, check_sink, checked_scores, layout_of, plan_of, sink_chunks
from cocktail.scorers import Scores
from runtime.errors import PlanError
from runtime.plan import FP16, HIDDEN, DocumentShape, Layout, Plan, Tier

ALPHA, BETA = 0.6, 0.1  # paper, section IV-B
LOW, MIDDLE = Tier(2, 2), Tier(4, 4)
_TIERS = (FP16, MIDDLE, LOW, HIDDEN)


class CocktailPolicy(Policy):
    """score < T_low: INT2; score > T_high: FP16; else INT4, with
    T_low = s_min + (s_max - s_min) * alpha (Eq. 2) and T_high = s_max - (s_max - s_min) * beta (Eq. 3)."""

    name = "cocktail"
    uses_scores = True
    layout_needs_scores = True

    def __init__(self, alpha: float = ALPHA, beta: float = BETA, sink: int = DEFAULT_SINK):
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not isfinite(value) or value < 0:
                raise PlanError(f"policy cocktail: {name} is {value}; expected a number from 0 to 1")
        if alpha + beta > 1 - 1e-9:
            raise PlanError(f"policy cocktail: alpha + beta is {alpha + beta:g}; expected less than 1, "
                            "else the INT2 threshold reaches the FP16 threshold")
        self.alpha, self.beta, self.sink = alpha, beta, check_sink(sink)

    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        tiers = self._tiers(shape, checked_scores(self.name, shape, scores))
        return layout_of(shape, {tier: tiers.count(tier) for tier in _TIERS})

    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        """Raises PlanError when the layout was made from other scores."""
        checked = checked_scores(self.name, layout, scores)
        tiers = self._tiers(layout, checked)
        if not set(tiers) <= set(layout.tiers):
            raise PlanError("policy cocktail: the layout was not made from these scores; expected the same in both")
        chunks = np.array([layout.tiers.index(tier) for tier in tiers], np.int64)
        return plan_of(layout, chunks, self.name, scorer, checked)

    def _tiers(self, shape: DocumentShape, scores: Scores) -> list[Tier]:
        hidden = shape.hidden_chunks()
        exact = scores[len(hidden):].astype(np.float64)
        if not exact.size:
            return [HIDDEN] * len(hidden)
        low, high = exact.min(), exact.max()
        t_low = low + (high - low) * self.alpha
        t_high = high - (high - low) * self.beta
        tiers = [HIDDEN] * len(hidden) + [LOW if s < t_low else FP16 if s > t_high else MIDDLE for s in exact]
        for chunk in sink_chunks(shape, self.sink):
            tiers[chunk] = FP16
        return tiers
