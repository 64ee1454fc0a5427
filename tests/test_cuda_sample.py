"""Sampling on the GPU against plain float64 NumPy; skipped where there is none."""

import numpy as np
import pytest
from cuda_backend import BACKEND, LARGE, OTHERS
from dense_ref import drawn
from hypothesis import strategies as st
from strategies import seeds, spread

from kernels_cu.errors import KernelError

pytestmark = pytest.mark.usefixtures("compiled")


@spread(
    V=st.one_of(st.integers(1, 300), st.sampled_from([32000, 49152, 128256] if LARGE else [3000])),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05]),
    penalty=st.sampled_from([1.0, 1.3]),
    n_seen=st.integers(0, 40),
    uniform=st.floats(0, 1, exclude_max=True),
    levels=st.sampled_from([0, 3, 50]),  # 0: all logits differ; else there are ties
    seed=seeds,
    examples=OTHERS,
)
def test_sample(V, temperature, top_k, top_p, min_p, penalty, n_seen, uniform, levels, seed):
    """The id is the one at which the reference's running probability passes uniform, up to float32's rounding."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((1, V)) * 3).astype(np.float32)
    if levels:
        x = np.round(x * levels / 10).astype(np.float32)
    x[0, rng.integers(0, V)] = [np.nan, -np.inf, np.inf][seed % 3] if V > 1 else 0.5
    seen = rng.integers(0, V, 40).astype(np.int32)
    got = drawn(BACKEND, x, (temperature, top_k, top_p, min_p, penalty), seen[:n_seen], uniform)
    values = np.where(np.isnan(x[0]), -np.inf, np.minimum(x[0], np.finfo(np.float32).max)).astype(np.float32)
    ids = np.unique(seen[:n_seen])
    values[ids] = np.where(values[ids] > 0, values[ids] / np.float32(penalty), values[ids] * np.float32(penalty))
    if temperature == 0:
        assert got == np.argmax(values)
        return
    scaled = (values.astype(np.float64) - values.max()) / temperature
    order = np.lexsort((np.arange(V), -scaled))
    p = np.exp(scaled[order])
    slack = 1e-5
    keep = p >= min_p * (1 - slack) if min_p else p > 0
    p = np.where(keep, p, 0)
    ranked = bool(0 < top_k < keep.sum()) or top_p < 1
    if top_k:
        p[top_k:] = 0
    through = np.cumsum(p)
    mass = through[-1]
    if top_p < 1:
        last = np.searchsorted(through, top_p * mass * (1 + slack) + 0)
        p[min(last + 1, V) :] = 0
        mass = p.sum()
    rank = int(np.flatnonzero(order == got)[0])
    assert p[rank] > 0, "drew what the filters exclude"
    if not ranked:
        by_id = np.empty(V)
        by_id[order] = p
        p, rank = by_id, got
    through = np.cumsum(p)
    # min_p, top_k and top_p have edges: near them the reference's mass may differ by one candidate.
    edge = p[p > 0].min() / mass if ranked or min_p else 0
    low, high = (through[rank] - p[rank]) / mass, through[rank] / mass
    assert low * (1 - edge) - slack - edge <= uniform <= high * (1 + 2 * edge) + slack + edge


def test_sampling_follows_the_distribution():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 50)).astype(np.float32)
    none, n = np.zeros(0, np.int32), 4000 if LARGE else 40
    for top_k in (0, 20):
        ids = [drawn(BACKEND, x, (1.0, top_k, 1.0, 0.0, 1.0), none, (i + 0.5) / n) for i in range(n)]
        p = np.exp(x[0].astype(np.float64))
        if top_k:
            p[np.argsort(-p)[top_k:]] = 0
        counts = np.bincount(ids, minlength=50)
        assert (np.abs(counts - n * p / p.sum()) <= 1.01).all()  # uniform was spaced evenly


def test_what_sampling_finds_wrong_is_an_error():
    none, plain = np.zeros(0, np.int32), (1.0, 0, 1.0, 0.0, 1.0)
    for bad in (np.nan, -np.inf):
        with pytest.raises(KernelError, match="damaged"):
            drawn(BACKEND, np.full((1, 100), bad, np.float32), plain, none, 0.5)
    zeros = np.zeros((1, 4), np.float32)
    with pytest.raises(KernelError, match="those seen lies outside"):
        drawn(BACKEND, zeros, (1.0, 0, 1.0, 0.0, 1.1), np.array([4], np.int32), 0.5)
    for options in ((-1.0, 0, 1.0, 0.0, 1.0), (1.0, -1, 1.0, 0.0, 1.0), (1.0, 0, 1.0, 0.0, 0.0)):
        with pytest.raises(KernelError, match="sample: needs"):
            drawn(BACKEND, zeros, options, none, 0.5)
    assert drawn(BACKEND, zeros, plain, none, 0.4) == 1  # and nothing of it remains
