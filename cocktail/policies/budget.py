"""Rank the chunks by score and spend a given number of bits or bytes on them. The default policy.

Every layer begins with all ranked chunks at the lowest tier. A step lifts one rank to the next tier of one layer; the
steps are taken in the order of the loss that they save per byte, the layer's times the rank's (cocktail.policies.path).
So every layer has a way of its own from the lowest tier to FP16, on which each rank has a place, the better the
further. A budget buys as many steps as fit. Hence

- the bytes never exceed the budget and fall short of it by less than the next step costs;
- they are the arena's true bytes: all metadata, positions and alignment, the sink in, the tail out;
- the counts depend on no score, so the arena is sized, and prefill begun, before scoring;
- more budget never gives any chunk fewer bits of K or of V in any layer.

With a pairs file, which says how much each layer loses at each width, this is Cocktail and KVTuner in one: what a chunk
is worth and what a layer needs are weighed against each other, step by step. Without one all layers are alike, and a
step lifts a rank in all of them at once.

Equal scores: the earlier chunk first.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from fractions import Fraction
from itertools import pairwise
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cocktail.policies import (
    LayerPolicy,
    check_pins,
    check_sink,
    checked_scores,
    labelled,
    layout_of_layers,
    pin_notes,
    plan_of,
    sink_chunks,
)
from cocktail.policies.pairs import LOSS_WIDTHS, LayerLosses
from cocktail.policies.path import ALIKE, SpendingPath
from cocktail.scorers import Scores
from runtime.arena import ArenaLayout
from runtime.errors import PlanError
from runtime.plan import FP16, HIDDEN, DocumentShape, Layout, Plan, Tier

if TYPE_CHECKING:
    from runtime.model import Model as Engine

DEFAULT_KV_BITS = 3.3
DEFAULT_TIERS = tuple(Tier(k, v) for k in (*LOSS_WIDTHS, 16) for v in (*LOSS_WIDTHS, 16))
# Without any budget of the user's the ranked chunks get at least so many bits per value: a short document, whose FP16
# sink alone takes most of 3.3 bits, is not pressed to 2.
LEAST_BY_DEFAULT = 3.1


class BudgetPolicy(LayerPolicy):
    """Give at most one of kv_bits, kv_budget and shares; none of them means kv_bits = 3.3, or somewhat more where the
    document is so short that the FP16 sink would press all else to 2 bits (said in the plan's notes).

    kv_bits: bits per value = context bytes * 8 / values of the stored context chunks (the sink in, the tail out;
        chunks hidden by a sliding window count on neither side).
    kv_budget: bytes of the whole arena, tail included; a number or text such as "200MiB".
    tiers: low to high, as "K3V2,K4V4,K8V8": the only ones that a chunk may have; by default every pair of widths.
    shares: no budget but fixed shares of the ranked chunks for each of `tiers` but the first, as (0.1, 0.03).
    sink: leading chunks at FP16, outside the ranking but inside the budget; None as cocktail.policies says.
    pairs: a file with what each layer loses at each width (cocktail.policies.pairs); None for all layers alike.

    Raises PlanError, naming the minimum where a budget is below it.
    """

    name = "budget"
    uses_scores = True
    layout_needs_scores = False

    def __init__(self, kv_bits: float | None = None, kv_budget: int | str | None = None,
                 tiers: str | Sequence[Tier] | None = None, shares: str | Sequence[float] | None = None,
                 sink: int | None = None, pairs: str | Path | LayerLosses | None = None):
        given = [name for name, value in (("kv_bits", kv_bits), ("kv_budget", kv_budget), ("shares", shares))
                 if value is not None]
        if len(given) > 1:
            raise PlanError(f"policy budget: {' and '.join(given)} each fix the bytes; give one of them")
        if kv_bits is not None and not (isfinite(kv_bits) and kv_bits > 0):
            raise PlanError(f"policy budget: kv_bits is {kv_bits}; expected bits per value, such as {DEFAULT_KV_BITS}")
        if shares is not None and pairs is not None:
            raise PlanError("policy budget: shares fix every layer's tiers, so pairs would change nothing; give "
                            "one of them")
        if shares is not None and tiers is None:
            raise PlanError("policy budget: there are shares but no tiers; give both, as tiers K3V2,K4V4,K8V8 and "
                            "shares 0.1,0.03")
        self._by_default = not given
        self.kv_bits = kv_bits
        self.kv_budget = None if kv_budget is None else parse_bytes(kv_budget)
        self.tiers = DEFAULT_TIERS if tiers is None else _tiers(tiers)
        self.shares = None if shares is None else _shares(shares, self.tiers)
        self.sink, self.pins = check_sink(sink), tuple[int, ...]()
        self.losses = LayerLosses.load(pairs) if isinstance(pairs, str | Path) else pairs

    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        check_pins(shape, self.pins)
        ranked = self._by_score(shape)
        if self.shares is not None:
            bounds = [int(ranked * sum(self.shares[i:]) + 0.5) for i in range(len(self.shares))]
            return self._layout(shape, [Counter({tier: here - above for tier, (here, above) in zip(
                self.tiers, pairwise((ranked, *bounds, 0)), strict=True)})])
        if self.losses is not None:
            self.losses.check(shape)
        path = SpendingPath(shape, ranked, self.tiers, self.losses or ALIKE)
        steps = self._affordable(shape, path)
        if self._by_default:
            least = LEAST_BY_DEFAULT * _values(shape, ranked) // 8
            steps = max(0, steps, int(np.searchsorted(path.spent, least, "right")) - 1)
        if steps < 0:
            raise self._below_minimum(shape, path)
        return self._layout(shape, path.counts(steps))

    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        checked = checked_scores(self.name, layout, scores)
        layers = range(1 if self.losses is None else layout.n_layers)
        return self.plan_of_layers(layout, [self.assign_layer(layout, layer, checked) for layer in layers], checked,
                                   scorer)

    def check_model(self, engine: Engine) -> None:
        if self.losses is not None:
            self.losses.check_model(engine)

    def assign_layer(self, layout: Layout, layer: int, scores: Scores) -> npt.NDArray[np.int64]:
        """The sink, the pins, then the ranks, best first, fill the tiers in order. `assign` gives all layers the same
        scores."""
        sink, pinned = sink_chunks(layout, self.sink), self._pinned(layout)
        ranked = sink.stop + np.argsort(-scores[sink.stop:], kind="stable")
        ranked = ranked[~np.isin(ranked, pinned)]
        order = [np.array(chunks, np.int64) for chunks in (sink, pinned, ranked, layout.hidden_chunks())]
        chunks = np.empty(layout.n_chunks, np.int64)
        chunks[np.concatenate(order)] = np.repeat(np.arange(len(layout.tiers)), layout.counts[layer])
        return chunks

    def plan_of_layers(self, layout: Layout, chunks: Sequence[Sequence[int]] | Sequence[npt.NDArray[np.int64]],
                       scores: Scores, scorer: str) -> Plan:
        """One layer's chunks stand for all of them."""
        return plan_of(layout, np.array(chunks, np.int64), labelled(self.name, pairs=self.losses is not None), scorer,
                       scores, self._notes(layout) + pin_notes(self.pins, self.tiers[-1]))

    def ranked(self, shape: DocumentShape) -> range:
        return range(sink_chunks(shape, self.sink).stop, shape.n_chunks)

    def with_bits(self, kv_bits: float) -> BudgetPolicy:
        """The same policy with another budget."""
        policy = copy(self)
        policy.kv_bits, policy.kv_budget, policy.shares, policy._by_default = kv_bits, None, None, False
        return policy

    def pinned(self, chunks: Sequence[int]) -> BudgetPolicy:
        policy = copy(self)
        policy.pins = tuple(chunks)
        return policy

    def _pinned(self, shape: DocumentShape) -> list[int]:
        """The pins that are not in the sink, which is FP16 anyway."""
        return [chunk for chunk in self.pins if chunk in self.ranked(shape)]

    def _by_score(self, shape: DocumentShape) -> int:
        """How many chunks have their place by rank."""
        return len(self.ranked(shape)) - len(self._pinned(shape))

    def _layout(self, shape: DocumentShape, ranked: Sequence[Mapping[Tier, int]]) -> Layout:
        """ranked: how many ranked chunks are at each tier, one for each layer or one for all."""
        others = Counter({FP16: len(sink_chunks(shape, self.sink)), HIDDEN: len(shape.hidden_chunks())})
        others[self.tiers[-1]] += len(self._pinned(shape))
        return layout_of_layers(shape, [others + Counter(counts) for counts in ranked])

    def _affordable(self, shape: DocumentShape, path: SpendingPath) -> int:
        """A number of steps whose context bytes fit while one more step's do not, -1 where none fits.

        Alignment makes true bytes not quite monotone in the steps. By bisection more budget buys no fewer steps all the
        same: what fits it still does at every place that is looked at. It takes about 10 arenas, arithmetic only.
        """
        budget = self._context_budget(shape)
        sink = _values(shape, len(sink_chunks(shape, self.sink))) * 2  # bytes

        def fits(steps: int) -> bool:
            if path.spent[steps] + sink > budget:  # alignment only adds to them
                return False
            return ArenaLayout(self._layout(shape, path.counts(steps))).context_bytes <= budget

        return bisect_left(range(path.steps + 1), True, key=lambda steps: not fits(steps)) - 1

    def _context_budget(self, shape: DocumentShape) -> int:
        """Bytes that the context may take."""
        if self.kv_budget is not None:
            return self.kv_budget - self._tail_bytes(shape)
        return _bytes_of_bits(shape, DEFAULT_KV_BITS if self.kv_bits is None else self.kv_bits)

    def _tail_bytes(self, shape: DocumentShape) -> int:
        arena = ArenaLayout(self._layout(shape, [{FP16: self._by_score(shape)}]))
        return arena.nbytes - arena.context_bytes  # the same whatever the tiers: every part is aligned by itself

    def _below_minimum(self, shape: DocumentShape, path: SpendingPath) -> PlanError:
        least = ArenaLayout(self._layout(shape, path.counts(0)))
        kept = {"sink": len(sink_chunks(shape, self.sink)), "pinned": len(self._pinned(shape))}
        but = " and ".join(f"{count} {name} chunks" for name, count in kept.items() if count)
        lowest = f"{self.tiers[0]} " + (f"for all but {but}" if but else "throughout")
        if self.kv_bits is not None:
            bits = ceil(Fraction(8000 * least.context_bytes, _values(shape, _stored(shape)))) / 1000
            return PlanError(f"policy budget: kv_bits is {self.kv_bits:g}; expected at least {bits:.3f}, "
                             f"which is {lowest} in this document")
        return PlanError(f"policy budget: kv_budget is {self.kv_budget:,} bytes; expected at least {least.nbytes:,}, "
                         f"which is {lowest} and the FP16 tail in this document")

    def _notes(self, layout: Layout) -> tuple[str, ...]:
        bits = Fraction(8 * ArenaLayout(layout).context_bytes, _values(layout, _stored(layout)) or 1)
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


# Sizes.

def _stored(shape: DocumentShape) -> int:
    """Chunks that a window hides are not."""
    return shape.n_chunks - len(shape.hidden_chunks())


def _values(shape: DocumentShape, chunks: int) -> int:
    """K and V values of so many chunks in all layers."""
    return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * shape.chunk * chunks


def _bytes_of_bits(shape: DocumentShape, bits: float) -> int:
    return _decimal(bits) * _values(shape, _stored(shape)) // 8


def _decimal(bits: float) -> Fraction:
    """Exactly what was written: 9.6 bits are meant, not 9.5999999999999996, which may miss a chunk by one byte."""
    return Fraction(str(float(bits)))


# Options.

def _tiers(tiers: str | Sequence[Tier]) -> tuple[Tier, ...]:
    parsed = tuple(Tier.parse(part.strip()) for part in tiers.split(",")) if isinstance(tiers, str) else tuple(tiers)
    names = ",".join(map(str, parsed))
    if not parsed or any(a == b or a.k_bits > b.k_bits or a.v_bits > b.v_bits for a, b in pairwise(parsed)):
        raise PlanError(f"policy budget: tiers are {names}; expected low to high, no step taking bits from K or V")
    if HIDDEN in parsed:
        raise PlanError(f"policy budget: tiers are {names}; width 0 is not for choosing, only for hidden chunks")
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
