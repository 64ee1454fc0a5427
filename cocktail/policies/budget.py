"""Rank the chunks by score and spend a given number of bits or bytes on them. The default policy.

One path leads from every ranked chunk at the lowest tier to every chunk at the highest: a fixed list of steps, each
lifting one rank by one tier (MILESTONES). A budget buys the longest prefix of it whose arena fits. Hence

- the bytes never exceed the budget and fall short of it by less than the next step costs;
- they are the arena's true bytes: all metadata, positions and alignment, the sink in, the tail out;
- the counts depend on no score, so the arena is sized, and prefill begun, before scoring;
- more budget never gives any chunk fewer bits of K or of V.

With a pairs file (cocktail.policies.pairs) the path begins with every layer at its own pair, and a step lifts a rank
only in the layers whose pair is below the tier. All of the above holds, and each layer has counts of its own. Where the
file leaves several trade-offs to choose from, the most accurate is taken with which the budget still lifts the best
chunks (FIRST_LIFTS); a larger budget may then come to other pairs, which may take bits from some layer.

Equal scores: the earlier chunk first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cocktail.policies import (
    LayerPolicy,
    check_sink,
    checked_scores,
    labelled,
    layout_of,
    plan_of,
    sink_chunks,
)
from cocktail.policies.pairs import LayerPairs, load_pairs
from cocktail.scorers import Scores
from runtime.arena import ArenaLayout
from runtime.errors import PlanError
from runtime.formats import block_bytes
from runtime.plan import FP16, HIDDEN, DocumentShape, Layout, Plan, Tier

if TYPE_CHECKING:
    from runtime.model import Model as Engine

DEFAULT_KV_BITS = 3.3

LADDER = (Tier(2, 2), Tier(3, 2), Tier(4, 2), Tier(4, 3), Tier(4, 4), Tier(8, 4), Tier(8, 8), FP16)
DEFAULT_TIERS = tuple(tier for tier in LADDER if tier != Tier(4, 2))  # nothing is gained by stopping there

# Share of the ranked chunks at or above each tier of LADDER but the first, at points along the path; linear in between.
# What each rank loses at each width of K and of V was measured by itself on a 135M model with D = 64, the ranks by BM25
# and MiniLM, and the bits were given where they save most KL (bench/LOG.md): the KL per bit of neighbouring ranks and
# tiers is about equal at each point. The best 3% lose 50 times as much as the median, and K several times as much as V.
MILESTONES = (
    # K3V2 K4V2 K4V3 K4V4 K8V4 K8V8 FP16          bits per value at D = 64 and chunks of 32
    (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.0),  # 2.4: K2V2 throughout, the minimum
    (0.35, 0.10, 0.10, 0.03, 0.00, 0.00, 0.0),  # 2.7: a little at the top pays more at first than a better base
    (1.00, 0.15, 0.12, 0.03, 0.03, 0.00, 0.0),  # 3.1
    (1.00, 0.33, 0.25, 0.04, 0.03, 0.00, 0.0),  # 3.3
    (1.00, 0.70, 0.60, 0.07, 0.05, 0.01, 0.0),  # 3.7
    (1.00, 1.00, 1.00, 0.10, 0.07, 0.02, 0.0),  # 4.1: K4V3 loses no more than twice what K4V4 does
    (1.00, 1.00, 1.00, 0.35, 0.12, 0.03, 0.0),  # 4.4
    (1.00, 1.00, 1.00, 1.00, 0.25, 0.05, 0.0),  # 5.0
    (1.00, 1.00, 1.00, 1.00, 1.00, 0.20, 0.0),
    (1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 0.0),  # 8 bits are as good as 16 and cost half, so they come first
    (1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.0),
)
# Without any budget of the user's, a short document, whose FP16 sink alone takes most of 3.3 bits, still gets this mix.
LEAST_BY_DEFAULT = 2
# Pairs are affordable as a floor when the lifts up to here are too: half way to the mix of 3.1 bits. A floor that takes
# the lifts of the best ranks costs up to 1.7 times the KL at 3.3 bits; one that leaves more loses what pairs gain.
FIRST_LIFTS = 1.5


class BudgetPolicy(LayerPolicy):
    """Give at most one of kv_bits, kv_budget and shares; none of them means kv_bits = 3.3, or somewhat more where the
    document is so short that the FP16 sink would press all else to 2 bits (said in the plan's notes).

    kv_bits: bits per value = context bytes * 8 / values of the stored context chunks (the sink in, the tail out;
        chunks hidden by a sliding window count on neither side).
    kv_budget: bytes of the whole arena, tail included; a number or text such as "200MiB".
    tiers: low to high, as "K3V2,K4V4,K8V8", by default DEFAULT_TIERS; where a tier of LADDER is left out, its chunks go
        one higher.
    shares: no budget but fixed shares of the ranked chunks for each of `tiers` but the first, as (0.1, 0.03).
    sink: leading chunks at FP16, outside the ranking but inside the budget; None as cocktail.policies says.
    pairs, pairs_bits: a floor for every layer (cocktail.policies.pairs): with pairs_bits the file's most accurate
        trade-off of at most so many bits, without it the one that suits the budget, with shares the file's choice.

    Raises PlanError, naming the minimum where a budget is below it.
    """

    name = "budget"
    uses_scores = True
    layout_needs_scores = False

    def __init__(self, kv_bits: float | None = None, kv_budget: int | str | None = None,
                 tiers: str | Sequence[Tier] | None = None, shares: str | Sequence[float] | None = None,
                 sink: int | None = None, pairs: str | Path | LayerPairs | None = None,
                 pairs_bits: float | None = None):
        given = [name for name, value in (("kv_bits", kv_bits), ("kv_budget", kv_budget), ("shares", shares))
                 if value is not None]
        if len(given) > 1:
            raise PlanError(f"policy budget: {' and '.join(given)} each fix the bytes; give one of them")
        if kv_bits is not None and not (isfinite(kv_bits) and kv_bits > 0):
            raise PlanError(f"policy budget: kv_bits is {kv_bits}; expected bits per value, such as {DEFAULT_KV_BITS}")
        self._by_default = not given
        self.kv_bits = kv_bits
        self.kv_budget = None if kv_budget is None else parse_bytes(kv_budget)
        self.tiers = _tiers(tiers, ladder_only=shares is None)
        self.shares = None if shares is None else _shares(shares, self.tiers)
        self.sink = check_sink(sink)
        self.floors: tuple[LayerPairs | None, ...] = (load_pairs(pairs, pairs_bits),)  # most accurate first
        if isinstance(pairs, str | Path) and pairs_bits is None and shares is None:
            self.floors = LayerPairs.load_all(pairs)

    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        ranked = len(self.ranked(shape))
        if self.shares is not None:
            return self._layout(shape, [int(ranked * sum(self.shares[i:]) + 0.5) for i in range(len(self.shares))],
                                self.floors[0])
        boundaries, times = _path(self.tiers, ranked)
        budget, first = self._context_budget(shape), int(np.searchsorted(times, FIRST_LIFTS, "right"))
        for floor in self.floors:
            step = self._affordable(shape, boundaries, budget, floor)
            if step >= first:
                break
        if self._by_default:
            step = max(step, int(np.searchsorted(times, LEAST_BY_DEFAULT, "right")))
        if step < 0:
            raise self._below_minimum(shape)
        return self._layout(shape, _lifted(self.tiers, boundaries[:step]), floor)

    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        checked = checked_scores(self.name, layout, scores)
        layers = range(1 if self.floors == (None,) else layout.n_layers)
        return self.plan_of_layers(layout, [self.assign_layer(layout, layer, checked) for layer in layers], checked,
                                   scorer)

    def check_model(self, engine: Engine) -> None:
        if self.floors[0] is not None:
            self.floors[0].check_model(engine)

    def assign_layer(self, layout: Layout, layer: int, scores: Scores) -> npt.NDArray[np.int64]:
        """The sink, then the ranks, best first, fill the tiers in order. `assign` gives all layers the same scores."""
        hidden, sink = layout.hidden_chunks(), sink_chunks(layout, self.sink)
        ranked = sink.stop + np.argsort(-scores[sink.stop:], kind="stable")
        chunks = np.empty(layout.n_chunks, np.int64)
        chunks[np.concatenate([np.array(sink, np.int64), ranked, np.array(hidden, np.int64)])] = np.repeat(
            np.arange(len(layout.tiers)), layout.counts[layer])
        return chunks

    def plan_of_layers(self, layout: Layout, chunks: Sequence[Sequence[int]] | Sequence[npt.NDArray[np.int64]],
                       scores: Scores, scorer: str) -> Plan:
        """One layer's chunks stand for all of them."""
        return plan_of(layout, np.array(chunks, np.int64), labelled(self.name, pairs=self.floors != (None,)), scorer,
                       scores, self._notes(layout))

    def ranked(self, shape: DocumentShape) -> range:
        return range(sink_chunks(shape, self.sink).stop, shape.n_chunks)

    def _layout(self, shape: DocumentShape, lifted: Sequence[int], floor: LayerPairs | None) -> Layout:
        """lifted[i]: how many of the ranked chunks are at tiers[i + 1] or above. Tiers come out highest first."""
        bounds = (len(self.ranked(shape)), *lifted, 0)
        counts = {FP16: len(sink_chunks(shape, self.sink))}
        for tier, (here, above) in reversed(list(zip(self.tiers, pairwise(bounds), strict=True))):
            counts[tier] = counts.get(tier, 0) + here - above
        return layout_of(shape, counts | {HIDDEN: len(shape.hidden_chunks())}, floor)

    def _affordable(self, shape: DocumentShape, boundaries: npt.NDArray[np.int64], budget: int,
                    floor: LayerPairs | None) -> int:
        """The largest number of steps whose context bytes fit, -1 when none does.

        Alignment makes true bytes not quite monotone, so the search begins at the last step that would fit without any
        and walks back; it seldom takes more than two arenas, which are arithmetic only.
        """
        if floor is not None:
            floor.check(shape)
        cost = [_chunk_bytes(shape, tier, floor) for tier in self.tiers]
        spent = np.concatenate([[0], np.cumsum(np.diff(cost)[boundaries])]) + cost[0] * len(self.ranked(shape))
        step = int(np.searchsorted(spent, budget, "right")) - 1
        while step >= 0 and self._arena(shape, boundaries[:step], floor).context_bytes > budget:
            step -= 1
        return step

    def _arena(self, shape: DocumentShape, boundaries: npt.NDArray[np.int64],
               floor: LayerPairs | None) -> ArenaLayout:
        return ArenaLayout(self._layout(shape, _lifted(self.tiers, boundaries), floor))

    def _context_budget(self, shape: DocumentShape) -> int:
        """Bytes that the context may take."""
        if self.kv_budget is not None:
            return self.kv_budget - self._tail_bytes(shape)
        return _bytes_of_bits(shape, DEFAULT_KV_BITS if self.kv_bits is None else self.kv_bits)

    def _tail_bytes(self, shape: DocumentShape) -> int:
        arena = self._arena(shape, np.zeros(0, np.int64), None)
        return arena.nbytes - arena.context_bytes  # the same whatever the tiers: every part is aligned by itself

    def _below_minimum(self, shape: DocumentShape) -> PlanError:
        least = self._arena(shape, np.zeros(0, np.int64), self.floors[-1])
        pair = "" if self.floors[-1] is None else " or the layer's pair"
        sink = len(sink_chunks(shape, self.sink))
        lowest = f"{self.tiers[0]}{pair} " + (f"for all but {sink} sink chunks" if sink else "throughout")
        if self.kv_bits is not None:
            bits = ceil(Fraction(8000 * least.context_bytes, _values(shape))) / 1000
            return PlanError(f"policy budget: kv_bits is {self.kv_bits:g}; expected at least {bits:.3f}, "
                             f"which is {lowest} in this document")
        return PlanError(f"policy budget: kv_budget is {self.kv_budget:,} bytes; expected at least {least.nbytes:,}, "
                         f"which is {lowest} and the FP16 tail in this document")

    def _notes(self, layout: Layout) -> tuple[str, ...]:
        bits = Fraction(8 * ArenaLayout(layout).context_bytes, _values(layout) or 1)
        if not self._by_default or bits <= _decimal(DEFAULT_KV_BITS):
            return ()
        return (f"{float(bits):.2f} bits per value, above the usual {DEFAULT_KV_BITS}: fewer would leave this document "
                "less than the default mix of tiers; kv_bits sets a limit",)


def parse_bytes(text: int | str) -> int:
    """200000000, "200MB" (10^6) or "200MiB" (2^20); also k, G and fractions. Raises PlanError."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?:([kmgt]?)(i?)b)?\s*", str(text), re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise PlanError(f"policy budget: kv_budget is {text!r}; expected bytes, such as 200000000 or 200MiB")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int(Fraction(number) * (1024 if binary else 1000) ** power)


# The path.

def _path(tiers: Sequence[Tier], ranked: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Which boundary each step lifts one rank across (i: from tiers[i] to tiers[i + 1]), and when on MILESTONES.

    Both (steps,), in order. Rank r crosses a boundary when the rounded share reaches it: (r + 1/2) / ranked. A tier of
    LADDER that is left out shares the fate of the next one present: whoever would rise above tiers[i] rises to
    tiers[i + 1].
    """
    shares = np.array(MILESTONES).T[np.array([LADDER.index(tier) for tier in tiers[:-1]], np.int64)]
    wanted = (np.arange(ranked) + 0.5) / max(ranked, 1)
    times = np.empty((len(tiers) - 1, ranked))
    for i, reached in enumerate(shares):
        after = np.searchsorted(reached, wanted, "left")  # first milestone where the share is reached
        times[i] = after - (reached[after] - wanted) / (reached[after] - reached[after - 1])
    times = np.minimum.accumulate(times[::-1], axis=0)[::-1]  # nobody crosses a boundary before the one below it
    boundary, rank = np.indices(times.shape).reshape(2, -1)
    order = np.lexsort((boundary, rank, times.ravel()))
    return boundary[order], times.ravel()[order]


def _lifted(tiers: Sequence[Tier], boundaries: npt.NDArray[np.int64]) -> list[int]:
    """How many ranks have crossed each boundary after these steps."""
    return [int(np.count_nonzero(boundaries == boundary)) for boundary in range(len(tiers) - 1)]


# Sizes.

def _values(shape: DocumentShape) -> int:
    """K and V values of the stored context chunks in all layers."""
    stored = shape.n_chunks - len(shape.hidden_chunks())
    return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * shape.chunk * stored


def _bytes_of_bits(shape: DocumentShape, bits: float) -> int:
    return _decimal(bits) * _values(shape) // 8


def _decimal(bits: float) -> Fraction:
    """Exactly what was written: 9.6 bits are meant, not 9.5999999999999996, which may miss a chunk by one byte."""
    return Fraction(str(float(bits)))


def _chunk_bytes(shape: DocumentShape, tier: Tier, pairs: LayerPairs | None) -> int:
    """Codes and metadata of one chunk in all layers and KV heads, before alignment."""
    stored = [tier if pairs is None else pairs.lift(tier, layer) for layer in range(shape.n_layers)]
    return shape.n_kv_heads * sum(sum(block_bytes("K", t.k_bits, shape.chunk, shape.head_dim)
                                      + block_bytes("V", t.v_bits, shape.chunk, shape.head_dim)) for t in stored)


# Options.

def _tiers(tiers: str | Sequence[Tier] | None, ladder_only: bool) -> tuple[Tier, ...]:
    if tiers is None:
        return DEFAULT_TIERS
    parsed = tuple(Tier.parse(part.strip()) for part in tiers.split(",")) if isinstance(tiers, str) else tuple(tiers)
    names = ",".join(map(str, parsed))
    if not parsed or any(a == b or a.k_bits > b.k_bits or a.v_bits > b.v_bits for a, b in pairwise(parsed)):
        raise PlanError(f"policy budget: tiers are {names}; expected low to high, no step taking bits from K or V")
    if HIDDEN in parsed:
        raise PlanError(f"policy budget: tiers are {names}; width 0 is not for choosing, only for hidden chunks")
    if ladder_only and not set(parsed) <= set(LADDER):
        raise PlanError(f"policy budget: tiers are {names}; with a budget expected some of "
                        f"{','.join(map(str, LADDER))}; other tiers need fixed shares")
    return parsed


def _shares(shares: str | Sequence[float], tiers: Sequence[Tier]) -> tuple[float, ...]:
    try:
        parsed = tuple(float(share) for share in (shares.split(",") if isinstance(shares, str) else shares))
    except ValueError:
        raise PlanError(f"policy budget: shares are {shares!r}; expected numbers such as 0.1,0.03") from None
    if len(parsed) != len(tiers) - 1:
        raise PlanError(f"policy budget: there are {len(parsed)} shares for {len(tiers)} tiers "
                        f"({','.join(map(str, tiers))}); expected one for each tier but the lowest")
    if not all(0 <= share <= 1 for share in parsed) or sum(parsed) > 1 + 1e-9:
        raise PlanError(f"policy budget: shares are {shares!r}; expected numbers from 0 to 1 with a sum of at most 1")
    return parsed
