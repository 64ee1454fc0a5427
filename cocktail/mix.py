"""A plan as people look at it: how many bits each chunk keeps, on one short scale of marks and colours.

A chunk's bits are the mean of its K and V bits over all layers. Where layers differ, that mean falls between the tiers;
the nearest step of the scale, by ratio, stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.plan import Plan, Tier


@dataclass(frozen=True)
class Step:
    """One step of the scale. The colours run from cold to warm and keep apart from one another where red and green look
    alike; the mark says the same without them."""

    bits: float
    mark: str
    colour: str


SCALE = (Step(0, "_", "#b9bec7"), Step(2, ".", "#8a94a6"), Step(2.5, ":", "#6d9dc5"), Step(3, "-", "#43a5bd"),
         Step(3.5, "=", "#3fae95"), Step(4, "+", "#86b34a"), Step(6, "*", "#e3b23c"), Step(8, "%", "#ec7f37"),
         Step(16, "#", "#ee5260"))


def step(bits: float) -> Step:
    """The nearest step; 0 is only for what is not stored at all."""
    return min(SCALE[1:], key=lambda one: abs(log2(one.bits) - log2(bits))) if bits else SCALE[0]


def tier_bits(tier: Tier) -> float:
    """The mean of K's and V's bits."""
    return (tier.k_bits + tier.v_bits) / 2


def tier_name(tier: Tier) -> str:
    return str(tier) if tier.k_bits else "not stored"


def layers_differ(plan: Plan) -> bool:
    return len(set(plan.assignment)) > 1


def chunk_bits(plan: Plan) -> list[float]:
    """Per chunk, the mean over layers of its K and V bits."""
    bits = [tier_bits(tier) for tier in plan.layout.tiers]
    layers = [(bits_of, plan.assignment.count(bits_of)) for bits_of in dict.fromkeys(plan.assignment)]
    return [sum(bits[chunks[i]] * times for chunks, times in layers) / plan.layout.n_layers
            for i in range(plan.layout.n_chunks)]


def legend(plan: Plan, bits: Sequence[float]) -> list[tuple[Step, str, int]]:
    """(step, what it stands for, how many chunks), poorest first, for the steps in use; bits as chunk_bits has them."""
    found = [step(value) for value in bits]
    names = {one: f"{one.bits:g} bits" for one in SCALE}
    if not layers_differ(plan):
        for one in set(found):
            tiers = {tier for tier in map(plan.layout.tiers.__getitem__, set(plan.assignment[0]))
                     if step(tier_bits(tier)) == one}
            names[one] = ", ".join(tier_name(tier) for tier in sorted(tiers, key=lambda t: (t.k_bits, t.v_bits)))
    return [(one, names[one], found.count(one)) for one in SCALE if one in found]
