"""In which order policy budget spends: all its steps, those that save most per byte first.

Every layer begins with all ranked chunks at the lowest tier. A step lifts one rank, in one layer, to the next tier of
that layer's chain. It saves the loss of the tier before, less that of the tier behind, times the weight of the rank;
per byte, a layer's later steps never save more than its earlier ones, nor a worse rank's more than a better one's. So
any first part of all steps, in this order, leaves every rank at its own point of each layer's chain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cocktail.policies.pairs import LayerLosses
from runtime.formats import block_bytes
from runtime.plan import DocumentShape, Tier

# All layers alike, where no file tells them apart: the sums over the layers of a 135M model (D = 64) of what each
# layer's K, V costs alone, in nats (bench/LOG.md). Only the proportions matter.
ALIKE = LayerLosses({2: (0.1,), 3: (0.017,), 4: (0.0025,), 8: (1e-5,)},
                    {2: (0.015,), 3: (0.0025,), 4: (0.0006,), 8: (2.3e-6,)}, {}, "all layers alike")
# A rank has (rank + 1/2) ** -STEEPNESS of the loss. Measured by rank on that model, chunks ranked by BM25 and MiniLM:
# the best 3% lose .39 per share of the chunks, then (7, 10, 15, 25, 40% of them) .048, .030, .009, .007, .004.
STEEPNESS = 1.2


class SpendingPath:
    """steps: how many there are. spent: bytes of all ranked chunks after each number of steps, before alignment,
    int64 (steps + 1,).

    losses: of each layer, or a single row for all layers, which then take every step together.
    """

    def __init__(self, shape: DocumentShape, ranked: int, tiers: Sequence[Tier], losses: LayerLosses = ALIKE):
        self._ranked = ranked
        nbytes = np.array([_chunk_bytes(shape, tier) for tier in tiers], np.int64)
        lost = [losses.of(tiers, row) for row in range(losses.layers)]
        self._chains = [_chain(tiers, nbytes, row) for row in lost]
        self._begins = np.cumsum([0, *(len(chain) - 1 for chain in self._chains)])  # first boundary of each chain
        together = shape.n_layers // losses.layers
        steps = [(before, after) for chain in self._chains for before, after in pairwise(chain)]
        costs = np.array([nbytes[after] - nbytes[before] for before, after in steps], np.int64) * together
        saves = np.array([rate for chain, row in zip(self._chains, lost, strict=True)
                          for rate in _rates(chain, nbytes, row)])
        weights = (np.arange(ranked) + 0.5) ** -STEEPNESS
        order = np.argsort(-(saves[:, None] * weights).ravel(), kind="stable")  # equal: as along the chain
        self._boundaries = order // max(ranked, 1)
        self.steps = len(order)
        self.spent = np.cumsum([nbytes[0] * ranked * shape.n_layers, *costs[self._boundaries]])
        self._tiers = tuple(tiers)

    def counts(self, steps: int) -> list[Counter[Tier]]:
        """How many ranked chunks are at each tier after so many steps, one Counter per layer, or one for all."""
        lifted = np.bincount(self._boundaries[:steps], minlength=self._begins[-1])
        counts = []
        for chain, (begin, end) in zip(self._chains, pairwise(self._begins), strict=True):
            bounds = (self._ranked, *lifted[begin:end].tolist(), 0)
            counts.append(Counter({self._tiers[tier]: here - above
                                   for tier, (here, above) in zip(chain, pairwise(bounds), strict=True)}))
        return counts


def _chain(tiers: Sequence[Tier], nbytes: npt.NDArray[np.int64], losses: npt.NDArray[np.float64]) -> list[int]:
    """Indices of the tiers that a layer goes through: from the first always to the one that saves most per byte and
    takes bits from neither K nor V; of equal ones the first. This is the lower hull of loss against bytes."""
    widths = np.array([(tier.k_bits, tier.v_bits) for tier in tiers])
    chain = [0]
    while True:
        now = chain[-1]
        better = np.flatnonzero((widths >= widths[now]).all(axis=1) & (losses < losses[now]))
        if not better.size:
            return chain
        chain.append(int(better[np.argmax(_rate(nbytes, losses, now, better))]))


def _rates(chain: Sequence[int], nbytes: npt.NDArray[np.int64], losses: npt.NDArray[np.float64]) -> list[float]:
    """What each step of a chain saves per byte: never more than the one before, whatever rounding does."""
    rates = [float(_rate(nbytes, losses, before, after)) for before, after in pairwise(chain)]
    return list(accumulate(rates, min))


def _rate(nbytes: npt.NDArray[np.int64], losses: npt.NDArray[np.float64], before: int, after: Any) -> Any:
    """Loss saved per byte. Words that codes do not fill can make a wider tier as small: then it is as good as free."""
    return (losses[before] - losses[after]) / np.maximum(nbytes[after] - nbytes[before], 1e-3)


def _chunk_bytes(shape: DocumentShape, tier: Tier) -> int:
    """Codes and metadata of one chunk in one layer, all KV heads, before alignment, and its position."""
    k = block_bytes("K", tier.k_bits, shape.chunk, shape.head_dim)
    v = block_bytes("V", tier.v_bits, shape.chunk, shape.head_dim)
    return 4 + shape.n_kv_heads * (sum(k) + sum(v))
