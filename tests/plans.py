"""Plans to test with: any valid one, and small ones with given tiers."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from strategies import tiers_of

from runtime.formats import FAMILIES
from runtime.plan import FP16, HIDDEN, CalibrationFile, DocumentShape, Layout, Plan, Tier

LINES = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    chunk, family = 8 * draw(st.integers(1, 32)), draw(st.sampled_from(FAMILIES))
    tiers = tuple(draw(st.lists(st.one_of(tiers_of(family), st.just(HIDDEN)), min_size=1, max_size=26, unique=True)))
    flush = draw(st.none() | st.integers(0, 300)) if set(tiers) - {FP16, HIDDEN} else None
    if flush is not None and min(tier.k_bits + tier.v_bits for tier in tiers if tier != HIDDEN) == 32:
        flush = None
    n = draw(st.integers(0, 40))
    kinds = [tuple(draw(st.lists(st.integers(0, len(tiers) - 1), min_size=n, max_size=n)))
             for _ in range(draw(st.integers(1, 3)))]
    assignment = tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6)))
    layout = Layout(
        n_layers=len(assignment), n_kv_heads=draw(st.integers(1, 9)), head_dim=draw(st.integers(1, 256)), chunk=chunk,
        n_chunks=n, prefix=draw(st.integers(0, 99)),
        remainder=draw(st.integers(0, chunk - 1 if flush is None else 4 * chunk)),
        suffix=draw(st.integers(0, 99)), max_new=draw(st.integers(0, 99)),
        window=draw(st.none() | st.integers(1, 5000)), tiers=tiers,
        counts=tuple(tuple(layer.count(tier) for tier in range(len(tiers))) for layer in assignment), formats=family,
        flush=flush, digest=draw(st.none() | LINES),
        calibration=draw(st.none() | st.builds(CalibrationFile, LINES, LINES)) if family == "kvquant"
        else None)
    return Plan(layout, assignment, draw(LINES), draw(LINES),
                draw(st.none() | st.lists(FLOATS, min_size=n, max_size=n).map(tuple)),
                tuple(draw(st.lists(LINES, max_size=2))), draw(st.none() | st.permutations(range(n)).map(tuple)))


def plan_of_layers(*layers: tuple[int, ...]) -> Plan:
    """Each layer's chunks as indices of K4V4, FP16, K3V2."""
    shape = DocumentShape(n_layers=len(layers), n_kv_heads=1, head_dim=8, chunk=32, n_chunks=len(layers[0]), prefix=0,
                          remainder=0, suffix=1, max_new=1, window=None)
    layout = shape.layout((Tier(4, 4), FP16, Tier(3, 2)), (0, 0, len(layers[0])))
    counts = tuple(tuple(layer.count(tier) for tier in range(3)) for layer in layers)
    return Plan(replace(layout, counts=counts), layers, policy="budget", scorer="bm25")
