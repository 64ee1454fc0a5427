"""The model's own attention from the query's tokens to the chunks: every layer ranks them by what it looks at itself.

No encoder and no words: what counts is the attention that a chunk gets from the query's rows in the exact prefill,
summed over the query heads. It is there only once a layer has been computed, so the Plan comes layer by layer
(runtime.layerwise), and only a policy whose Layout needs no scores can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from cocktail.policies import LayerPolicy, Policy
from cocktail.scorers import Scores, finite_scores
from runtime.errors import PlanError, ScorerError
from runtime.layerwise import Chunks, LayerwisePlan, Masses
from runtime.plan import Layout, Plan

DEFAULT_ROWS = 64  # of the prompt's end, where there is no query


class AttentionScorer:
    """Named "attention". It scores no texts; `plan` says what prefill has to do instead."""

    name = "attention"

    def score(self, chunks: Sequence[str], query: str) -> NoReturn:
        raise ScorerError("scorer attention knows no texts: it reads the model's own attention while the document is "
                          "read; ask or plan with it, or take another scorer")

    def checked(self, policy: Policy) -> LayerPolicy:
        """The policy. Raises PlanError where it has no use for scores that come layer by layer."""
        if not policy.uses_scores:
            raise PlanError(f"policy {policy.name} looks at no scores; leave out scorer {self.name}")
        if policy.layout_needs_scores or not isinstance(policy, LayerPolicy):
            raise PlanError(f"policy {policy.name} sizes the cache by the scores, and those of scorer {self.name} come "
                            "layer by layer once it is allocated; use policy budget, or a scorer of texts")
        return policy

    def plan(self, policy: Policy, layout: Layout, rows: range) -> LayerwisePlan:
        """The plan to come; rows: the query's in the prompt. Raises PlanError as `checked`.

        The finished Plan's scores are each chunk's share of the attention to all ranked chunks, averaged over the
        layers; chunks that are not ranked (the sink, what a window hides) have 0.
        """
        ranking = self.checked(policy)

        def choose(layer: int, masses: Masses) -> Sequence[int]:
            chunks: list[int] = ranking.assign_layer(layout, layer, _scores(masses, layer)).tolist()
            return chunks

        def make(chunks: tuple[Chunks, ...], masses: Sequence[Masses]) -> Plan:
            return ranking.plan_of_layers(layout, chunks, _mean_shares(masses, ranking.ranked(layout)), self.name)

        return LayerwisePlan(layout, rows, choose, make)


def query_rows(prompt_tokens: int, suffix: int, query: range) -> range:
    """The rows whose attention counts. query: where the query's ids are in the suffix; those behind it belong to the
    chat template. Without a query the end of the prompt asks, as far as DEFAULT_ROWS."""
    if not query:
        return range(max(0, prompt_tokens - DEFAULT_ROWS), prompt_tokens)
    begin = prompt_tokens - suffix
    return range(begin + query.start, begin + query.stop)


def _scores(masses: Masses, layer: int) -> Scores:
    return finite_scores(masses.sum(axis=0), f"attention of layer {layer}")


def _mean_shares(masses: Sequence[Masses], ranked: range) -> Scores:
    shares = np.zeros((len(masses), masses[0].shape[1]))
    for layer, found in enumerate(masses):
        scores = _scores(found, layer)[ranked.start : ranked.stop].astype(np.float64)
        shares[layer, ranked.start : ranked.stop] = scores / (scores.sum() or 1.0)
    return np.asarray(shares.mean(axis=0), np.float32)
