"""The paper's policy: two thresholds on the similarity scores (section III-B, Eq. 1-3). Named "cocktail".

The scores' shape alone decides the bytes; for a given number of bytes see cocktail.policies.budget. Where the paper is
silent:

- All scores equal, or one chunk: both inequalities are strict and nothing exceeds itself, so INT4 throughout.
- No whole chunk: there is nothing to quantize, everything is in the FP16 tail.
- alpha + beta >= 1 puts T_low at or above T_high: refused.
- A score that is not finite counts as the lowest finite one, with a warning, and moves no threshold.
- Where there is no chat header, the first chunk stays FP16 (the sink), which the paper has not; sink=0 is the paper's.
  Its score still counts in Eq. 2 and 3.
- Sliding window: hidden chunks are not stored, and their scores do not count.
- Text scores only: with scores that arrive layer by layer the Layout would be unknown when the arena is allocated.

The two modules can be switched off, as in the paper's Table V:

- no_search, without module I: the scores still say how many chunks each tier gets, a seed says which.
- no_reorder, without module II: the chunks stay where the document has them, mixed widths side by side; each run of
  neighbours of equal width is read by itself (runtime.arena). The answer is the same up to rounding, the time is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cocktail.policies import (
    Policy,
    check_pins,
    check_sink,
    checked_scores,
    indices_of,
    labelled,
    layout_of,
    pin_notes,
    plan_of,
    sink_chunks,
)
from cocktail.policies.formats import Formats
from cocktail.policies.pairs import LayerPairs, load_pairs
from cocktail.scorers import Scores
from runtime.errors import PlanError
from runtime.plan import FP16, HIDDEN, DocumentShape, Layout, Plan, Tier

if TYPE_CHECKING:
    from runtime.model import Model as Engine

ALPHA, BETA = 0.6, 0.1  # paper, section IV-B
LOW, MIDDLE = Tier(2, 2), Tier(4, 4)
_TIERS = (FP16, MIDDLE, LOW, HIDDEN)


class CocktailPolicy(Policy):
    """score < T_low: INT2; score > T_high: FP16; else INT4, with
    T_low = s_min + (s_max - s_min) * alpha (Eq. 2) and T_high = s_max - (s_max - s_min) * beta (Eq. 3).

    pairs, pairs_bits: a floor for every layer (cocktail.policies.pairs). seed: of no_search. formats, calibration: what
    INT2 and INT4 are (cocktail.policies.formats); "kivi" is plain min-max. Raises PlanError.
    """

    name = "cocktail"
    uses_scores = True
    layout_needs_scores = True

    def __init__(self, alpha: float = ALPHA, beta: float = BETA, sink: int | None = None,
                 pairs: str | Path | LayerPairs | None = None, pairs_bits: float | None = None,
                 no_search: bool = False, no_reorder: bool = False, seed: int = 0, formats: str = "rotated",
                 calibration: str | Path | None = None):
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not isfinite(value) or value < 0:
                raise PlanError(f"policy cocktail: {name} is {value}; expected a number from 0 to 1")
        if alpha + beta > 1 - 1e-9:
            raise PlanError(f"policy cocktail: alpha + beta is {alpha + beta:g}; expected less than 1, "
                            "else the INT2 threshold reaches the FP16 threshold")
        self.alpha, self.beta, self.sink, self.pins = alpha, beta, check_sink(sink), tuple[int, ...]()
        self.pairs = load_pairs(pairs, pairs_bits)
        self.no_search, self.no_reorder, self.seed = no_search, no_reorder, seed
        self.formats = Formats.load(self.name, formats, calibration)
        self.formats.check(self.name, LOW, MIDDLE)

    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        tiers = self._tiers(shape, checked_scores(self.name, shape, scores))
        layout = layout_of(shape, {tier: tiers.count(tier) for tier in _TIERS}, self.pairs, self.formats)
        if not self.no_reorder:
            return layout
        return plan_of(layout, indices_of(layout, tiers, self.pairs), "", "", None).without_reordering().layout

    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        """Raises PlanError when the layout was made from other scores."""
        checked = checked_scores(self.name, layout, scores)
        chunks = indices_of(layout, self._tiers(layout, checked), self.pairs)
        label = labelled(self.name, pairs=self.pairs, no_search=self.no_search, no_reorder=self.no_reorder,
                         **self.formats.mark)
        return plan_of(layout, chunks, label, scorer, checked, pin_notes(self.pins, FP16))

    def pinned(self, chunks: Sequence[int]) -> CocktailPolicy:
        """FP16 like the sink; what they score still counts in Eq. 2 and 3."""
        policy = copy(self)
        policy.pins = tuple(chunks)
        return policy

    def check_model(self, engine: Engine) -> None:
        self.formats.check_model(engine)
        if self.pairs is not None:
            self.pairs.check_model(engine)

    def _tiers(self, shape: DocumentShape, scores: Scores) -> list[Tier]:
        check_pins(shape, self.pins)
        hidden, sink = shape.hidden_chunks(), sink_chunks(shape, self.sink)
        exact = scores.astype(np.float64)
        if self.no_search:  # the same scores on other chunks: the thresholds, and with them the counts, stay
            exact[sink.stop:] = np.random.default_rng(self.seed).permutation(exact[sink.stop:])
        exact = exact[len(hidden):]
        if not exact.size:
            return [HIDDEN] * len(hidden)
        low, high = exact.min(), exact.max()
        t_low = low + (high - low) * self.alpha
        t_high = high - (high - low) * self.beta
        tiers = [HIDDEN] * len(hidden) + [LOW if s < t_low else FP16 if s > t_high else MIDDLE for s in exact]
        for chunk in (*sink, *self.pins):
            tiers[chunk] = FP16
        return tiers
