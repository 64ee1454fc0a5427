"""What the search chooses from: each layer's Pareto front, and clusters of layers that share a choice (KVTuner, steps 2
and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod

import numpy as np
import numpy.typing as npt

from runtime.errors import PlanError, TuneError
from runtime.formats import block_bytes
from runtime.plan import HIDDEN, Tier

# KVTuner's K8V8, K8V4, K4V4, K4V2, K2V2 and those that some layers prefer (K4V8, K2V4, K8V2); 3 bits are our own.
CANDIDATES = "K2V2,K3V2,K2V3,K2V4,K3V3,K3V4,K4V2,K4V3,K4V4,K4V8,K8V2,K8V4,K8V8"
SIMILAR = 1.5  # neighbours in a cluster differ by at most this factor in the error of every pair


@dataclass(frozen=True)
class Space:
    """candidates: all pairs, and bits, what each takes per value. errors: (L, candidates), whose squares add up over
    the layers: the root of what a layer loses at a pair, or the error of its attention output.

    clusters: the layers of each. choices: the pairs on each cluster's front, fewest bits first.
    """

    candidates: tuple[Tier, ...]
    bits: tuple[float, ...]
    errors: npt.NDArray[np.float64]
    clusters: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[Tier, ...], ...]

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return prod(map(len, self.choices))

    def pairs(self, chosen: Sequence[Tier]) -> tuple[Tier, ...]:
        """One pair per cluster -> one per layer."""
        by_layer = {layer: tier for layers, tier in zip(self.clusters, chosen, strict=True) for layer in layers}
        return tuple(by_layer[layer] for layer in range(len(by_layer)))

    def bits_of(self, tier: Tier) -> float:
        return self.bits[self.candidates.index(tier)]

    def mean_bits(self, pairs: Sequence[Tier]) -> float:
        """Bits per value of one pair per layer; a document's sink and 64-byte boundaries are not in it."""
        return sum(map(self.bits_of, pairs)) / len(pairs)

    def beginnings(self, count: int, max_bits: float) -> list[tuple[Tier, ...]]:
        """Combinations to try first, one pair per cluster: the nearest to each candidate everywhere, and `count` along
        the way from the cheapest to the cap on which each step buys the largest fall in squared error per bit."""
        even = [tuple(max((tier for tier in choices if self.bits_of(tier) <= limit), key=self.bits_of,
                          default=choices[0]) for choices in self.choices) for limit in self.bits if limit <= max_bits]
        path = [tuple(choices[0] for choices in self.choices)]
        while steps := [step for step in self._steps(path[-1]) if self.mean_bits(self.pairs(step[1])) <= max_bits]:
            path.append(max(steps, key=lambda step: step[0])[1])
        places = np.linspace(0, len(path) - 1, min(count, len(path))).round().astype(int)
        return list(dict.fromkeys([*even, *(path[place] for place in places)]))

    def _steps(self, chosen: tuple[Tier, ...]) -> list[tuple[float, tuple[Tier, ...]]]:
        """Every upgrade of one cluster: fall in its mean squared error per bit, and what is chosen then. The number of
        its layers weighs on both sides alike."""
        return [((self._square(cluster, now) - self._square(cluster, better))
                 / (self.bits_of(better) - self.bits_of(now)),
                 (*chosen[:cluster], better, *chosen[cluster + 1 :]))
                for cluster, (now, choices) in enumerate(zip(chosen, self.choices, strict=True))
                for better in choices[choices.index(now) + 1 :]]

    def _square(self, cluster: int, tier: Tier) -> float:
        column = self.errors[list(self.clusters[cluster]), self.candidates.index(tier)]
        return float(np.square(column).mean())


def build_space(candidates: Sequence[Tier], errors: npt.NDArray[np.float64], chunk: int, head_dim: int,
                similar: float = SIMILAR) -> Space:
    """Fronts and clusters by each layer's errors (L, candidates), see Space.

    Layers with the same front are clustered by DBSCAN on the logarithms of their errors, at most log(similar) apart in
    each; a layer unlike all others is a cluster of its own.
    """
    from sklearn.cluster import DBSCAN

    bits = tuple(pair_bits(tier, chunk, head_dim) for tier in candidates)
    by_front: dict[tuple[int, ...], list[int]] = {}
    for layer, row in enumerate(errors):
        by_front.setdefault(pareto(bits, row), []).append(layer)
    clusters: dict[tuple[int, ...], tuple[int, ...]] = {}  # layers -> their front
    for front, layers in by_front.items():
        features = np.log(np.maximum(errors[np.ix_(layers, front)], np.finfo(np.float64).tiny))
        labels = DBSCAN(eps=log(similar), min_samples=1, metric="chebyshev").fit_predict(features)
        for label in sorted(set(labels)):
            clusters[tuple(layer for layer, own in zip(layers, labels, strict=True) if own == label)] = front
    ordered = sorted(clusters)
    return Space(tuple(candidates), bits, errors, tuple(ordered),
                 tuple(tuple(candidates[i] for i in clusters[layers]) for layers in ordered))


def pareto(costs: Sequence[float], errors: Sequence[float] | npt.NDArray[np.float64]) -> tuple[int, ...]:
    """Indices that no other beats in one and equals in the other, cheapest first; of equals the first."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], errors[i], i)):
        if not front or errors[i] < errors[front[-1]]:
            front.append(i)
    return tuple(front)


def pair_bits(tier: Tier, chunk: int, head_dim: int) -> float:
    """Bits per value of a chunk stored at that tier, metadata in."""
    nbytes = sum(block_bytes("K", tier.k_bits, chunk, head_dim) + block_bytes("V", tier.v_bits, chunk, head_dim))
    return 8 * nbytes / (2 * chunk * head_dim)


def parse_candidates(text: str) -> tuple[Tier, ...]:
    """Two or more different pairs, as "K2V2,K4V2". Raises TuneError."""
    try:
        tiers = tuple(Tier.parse(part.strip()) for part in text.split(","))
    except PlanError as error:
        raise TuneError(f"candidates are {text!r}: {error}") from None
    if len(set(tiers)) != len(tiers) or len(tiers) < 2 or HIDDEN in tiers:
        raise TuneError(f"candidates are {text!r}; expected two or more different pairs such as {CANDIDATES}")
    return tiers
