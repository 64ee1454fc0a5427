"""Sampling on every instruction set: the frequencies of an even sweep of draws are the filtered probabilities."""

import numpy as np
import pytest
from dense_ref import drawn
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels_c import CpuBackend, KernelError, available_isas
from runtime.backend import Draws

ISAS = available_isas()
BACKENDS = {isa: CpuBackend(threads=1, isa=isa) for isa in ISAS}
DRAWS = 400


def probabilities(logits, temperature, top_k, top_p, min_p, penalty, seen):
    """float64 (V,) after Hugging Face's filters in their order (ids break ties, lowest first), and whether one of them
    cuts so close to a value that rounding decides.
    """
    x = logits.astype(np.float64)
    once = np.unique(seen)
    x[once] = np.where(x[once] > 0, x[once] / penalty, x[once] * penalty)
    order = np.lexsort((np.arange(len(x)), -x))
    p = np.exp((x[order] - x[order[0]]) / temperature)
    if top_k:
        p[top_k:] = 0
    close = (np.abs(p - min_p) < 1e-5).any() and min_p > 0
    p[p < min_p] = 0
    p /= p.sum()
    below = np.cumsum(p) - p
    if top_p < 1:
        close = close or (np.abs(below[1:] - top_p) < 1e-5).any()
        p[below >= top_p] = 0
    out = np.empty(len(x))
    out[order] = p / p.sum()
    return out, close


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    V = draw(st.integers(1, 60))
    logits = (rng.standard_normal(V) * draw(st.sampled_from([0.0, 1.0, 4.0, 50.0]))).astype(np.float32)
    logits = np.round(logits, 3 if draw(st.booleans()) else 0)  # coarse logits have many ties
    seen = rng.integers(0, V, draw(st.integers(0, 12))).astype(np.int32)
    options = (
        draw(st.sampled_from([0.1, 0.7, 1.0, 3.0])),
        draw(st.sampled_from([0, 1, 2, 7, 60, 1000])),
        draw(st.sampled_from([0.01, 0.3, 0.9, 1.0])),
        draw(st.sampled_from([0.0, 0.05, 0.5])),
        draw(st.sampled_from([1.0, 1.3, 0.8])),
    )
    return logits, options, seen


def sample(isa, logits, options, seen, uniform=0.0):
    return drawn(BACKENDS[isa], logits[None], options, seen, uniform)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(cases())
def test_frequencies_are_the_filtered_probabilities(isa, case):
    logits, options, seen = case
    expected, close = probabilities(logits, *options, seen)
    assume(not close)
    ids = [sample(isa, logits, options, seen, (i + 0.5) / DRAWS) for i in range(DRAWS)]
    share = np.bincount(ids, minlength=len(logits)) / DRAWS
    assert (share[expected == 0] == 0).all(), "drew a filtered id"
    # An interval of length p holds p * DRAWS evenly spaced points, give or take one.
    assert (np.abs(share - expected) <= 1.01 / DRAWS + 1e-5).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(cases())
def test_greedy_is_the_lowest_of_the_best(isa, case):
    logits, (_, *rest), seen = case
    x = logits.copy()
    once = np.unique(seen)
    penalty = np.float32(rest[-1])
    x[once] = np.where(x[once] > 0, x[once] / penalty, x[once] * penalty)
    assert sample(isa, logits, (0.0, *rest), seen) == int(np.argmax(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [(1.0, 0, 1.0, 0.0, 1.0), (0.8, 50, 0.9, 0.05, 1.0), (0.6, 0, 0.95, 0.0, 1.1)])
def test_large_vocabulary(isa, options):
    rng = np.random.default_rng(0)
    logits, seen = (rng.standard_normal(50001) * 3).astype(np.float32), rng.integers(0, 50001, 500).astype(np.int32)
    expected, _ = probabilities(logits, *options, seen)
    ids = np.array([sample(isa, logits, options, seen, (i + 0.5) / 100) for i in range(100)])
    assert (expected[ids] > 0).all()
    share = np.bincount(ids, minlength=50001) / 100
    assert (np.abs(share - expected) <= 0.0101).all()


@pytest.mark.parametrize("isa", ISAS)
def test_hostile_logits(isa):
    none, plain = np.zeros(0, np.int32), (1.0, 0, 1.0, 0.0, 1.0)
    bad = np.array([np.nan, -np.inf, 2, np.nan, np.inf, 1, 0, 0, 0], np.float32)
    assert sample(isa, bad, plain, none, 0.99) == 4
    assert sample(isa, bad, (0.0, *plain[1:]), none) == 4
    assert sample(isa, bad, (0.0, 0, 1.0, 0.0, 2.0), np.array([0, 1, 3], np.int32)) == 4  # a seen NaN stays unlikely
    assert sample(isa, np.array([1, 2, 3], np.float32), (1e-45, 0, 1.0, 0.0, 1.0), none, 0.9999) == 2
    for dead in (np.full(9, np.nan, np.float32), np.full(70, -np.inf, np.float32)):
        with pytest.raises(KernelError, match="every logit is NaN or -infinity"):
            sample(isa, dead, plain, none)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [(-1.0, 0, 1.0, 0.0, 1.0), (1.0, -1, 1.0, 0.0, 1.0), (1.0, 0, 1.0, 0.0, 0.0)])
def test_options_out_of_range_are_refused(isa, options):
    with pytest.raises(KernelError, match="sample: needs"):
        sample(isa, np.zeros(4, np.float32), options, np.zeros(0, np.int32))
    with pytest.raises(KernelError, match="outside its table"):
        sample(isa, np.zeros(4, np.float32), (1.0, 0, 1.0, 0.0, 1.1), np.array([4], np.int32))


@pytest.mark.parametrize("isa", ISAS)
def test_no_more_draws_than_uniform_numbers(isa):
    backend = BACKENDS[isa]
    ids, _ = backend.visible(2)
    draws = Draws(backend.upload(np.array([0.0, 0, 1, 0, 1])), backend.upload(np.zeros(2)), ids, ids)
    logits = backend.upload(np.zeros((1, 4), np.float32))
    state = backend.upload(np.array([0, 0, 0, 2, 0, 0, 0, 0], np.int32))
    with pytest.raises(KernelError, match="less than 2 ids drawn"):
        backend.sample(logits, draws, state)


def test_advance_moves_position_and_slot():
    backend = CpuBackend(threads=1)
    state = backend.upload(np.array([7, 3, 11, 0, 5, 0, 0, 0], np.int32))
    backend.advance(state, 42)
    assert state.tolist() == [8, 4, 42, 0, 5, 0, 0, 0]
