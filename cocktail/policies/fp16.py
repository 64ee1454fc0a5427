"""Every chunk at 16 bits: the exact cache that everything else is compared with."""

from __future__ import annotations

import numpy as np

from cocktail.policies import Policy, layout_of, plan_of
from cocktail.scorers import Scores
from runtime.plan import FP16, HIDDEN, DocumentShape, Layout, Plan


class Fp16Policy(Policy):
    """Exact also with a sliding window, where hidden chunks are not stored: nothing ever looks at them."""

    name = "fp16"
    uses_scores = False
    layout_needs_scores = False

    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        hidden = len(shape.hidden_chunks())
        return layout_of(shape, {FP16: shape.n_chunks - hidden, HIDDEN: hidden})

    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        chunks = np.full(layout.n_chunks, layout.tiers.index(FP16) if FP16 in layout.tiers else 0)
        chunks[:len(layout.hidden_chunks())] = len(layout.tiers) - 1  # HIDDEN is the last tier where there is any
        return plan_of(layout, chunks, self.name, scorer, None)
