"""Blocked causal prefill attention on every instruction set, against a plain float64 softmax."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_c import CpuBackend, KernelError, available_isas

EPS = 2.0**-24
ISAS = available_isas()
BACKENDS = {isa: CpuBackend(threads=1, isa=isa) for isa in ISAS}
GUARD = 64


def attend(backend, q, k, v, start, window):
    """The kernel's output (T, H * D), after checking that it wrote all of it and nothing else."""
    T, H, D = q.shape
    whole = np.full(T * H * D + 2 * GUARD, np.nan, np.float32)
    out = whole[GUARD:-GUARD].reshape(T, H * D)
    backend.prefill_attention(q, k, v, start, window, out)
    assert np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all(), "wrote outside the output"
    return out


def reference(q, k, v, start, window):
    """(out, bound), float64 (T, H * D). The bound follows the roundings: key j's score is off by at most ds[j], so its
    weight p[j] by a factor e^ds[j] and the normalizer by the weighted mean of those. Numerator and normalizer are sums
    of sums over 128 keys, so each adds 128 + n / 128 roundings, which constant rows all push the same way.
    """
    (T, H, D), G, n = q.shape, len(k), start + len(q)
    q = q.astype(np.float64) / np.sqrt(D)
    out, bound = np.empty((T, H, D)), np.empty((T, H, D))
    distance = start + np.arange(T)[:, None] - np.arange(n)
    hidden = (distance < 0) | (distance >= (window or n))
    for h in range(H):
        K, V = (x[h // (H // G), :n].astype(np.float64) for x in (k, v))
        scores = np.where(hidden, -np.inf, q[:, h] @ K.T)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        ds = np.expm1(4 * (np.sqrt(D) + 4) * EPS * (np.abs(q[:, h]) @ np.abs(K).T) + 8 * EPS)
        ds[p == 0] = 0
        factor = ds + (p * ds).sum(1, keepdims=True) + 2 * (min(n, 128) + n / 128 + 16) * EPS
        out[:, h] = p @ V
        bound[:, h] = (p * factor) @ np.abs(V) * 1.01 + 1e-30
    return out.reshape(T, -1), bound.reshape(T, -1)


def cache(rng, G, S, D, used, kind):
    """K and V (G, S, D) FP16; rows from `used` on are NaN, as memory that nobody wrote may be."""
    k, v = rng.standard_normal((2, G, S, D))
    if kind == "outlier channels":
        k[..., rng.integers(D)] *= 30
        v[rng.random(v.shape) < 0.01] = 1e4
    elif kind == "constant":
        k[...], v[...] = 0.5, -3
    elif kind == "denormal":
        k, v = k * 2.0**-20, v * 2.0**-22
    k, v = k.astype(np.float16), v.astype(np.float16)
    k[:, used:] = v[:, used:] = np.nan
    return k, v


@st.composite
def cases(draw):
    G, group = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    D = draw(st.sampled_from([8, 24, 64, 80, 96, 128, 256]))
    T, start = draw(st.integers(1, 150)), draw(st.sampled_from([0, 1, 127, 128, 300]))
    if draw(st.integers(0, 19)) == 0:  # one case in twenty is longer than 8K tokens
        G, group, T, start = 1, min(group, 4), draw(st.integers(1, 8)), draw(st.integers(8200, 8500))
    window = draw(st.sampled_from([None, 1, 5, 128, 200, 100000]))
    kind = draw(st.sampled_from(["plain", "outlier channels", "constant", "denormal"]))
    sharpness = draw(st.sampled_from([0.0, 1.0, 20.0]))
    return T, G * group, G, D, start, window, kind, sharpness, draw(st.integers(0, 2**32 - 1))


def build(case):
    T, H, G, D, start, window, kind, sharpness, seed = case
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((T, H, D)) * sharpness).astype(np.float32)
    return q, *cache(rng, G, start + T + int(rng.integers(0, 9)), D, start + T, kind), start, window


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80, deadline=None)
@given(cases())
@example((1, 1, 1, 8, 0, None, "plain", 1.0, 0))  # a single token sees itself only
@example((9, 9, 3, 64, 8300, 4096, "plain", 1.0, 0))
@example((1, 1, 1, 8, 8200, None, "constant", 1.0, 0))  # one chain of 8200 equal additions drifted by 2e-5
def test_equals_reference(isa, case):
    q, k, v, start, window = build(case)
    expected, bound = reference(q, k, v, start, window)
    assert (np.abs(attend(BACKENDS[isa], q, k, v, start, window) - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 60))
def test_any_tile_agrees(isa, case, tile):
    """Queries attended tile by tile, as the engine pauses between tiles, against all at once: within both bounds."""
    q, k, v, start, window = build(case)
    whole = attend(BACKENDS[isa], q, k, v, start, window)
    parts = [attend(BACKENDS[isa], q[t : t + tile], k, v, start + t, window) for t in range(0, len(q), tile)]
    _, bound = reference(q, k, v, start, window)
    assert (np.abs(whole - np.concatenate(parts)) <= 2 * bound).all()


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_stays_from_an_earlier_call(isa):
    """Scratch is kept between calls: one full of NaN must not reach the next, shorter one through 0 * NaN."""
    q, k, v, start, window = build((70, 4, 2, 80, 0, None, "plain", 1.0, 2))
    expected = attend(BACKENDS[isa], q, k, v, start, window).copy()
    nan = np.full((2, 400, 80), np.nan, np.float16)
    attend(BACKENDS[isa], q, nan, nan, 300, window)
    assert np.array_equal(attend(BACKENDS[isa], q, k, v, start, window), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa):
    q, k, v, start, window = build((400, 6, 2, 64, 77, None, "plain", 3.0, 1))
    results = {attend(CpuBackend(threads=n, isa=isa), q, k, v, start, window).tobytes() for n in (1, 2, 3, 1)}
    assert len(results) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_scores_beyond_exponents_range(isa):
    """Scores of +-1e6: the running maximum must keep every power in range, and the best key takes everything."""
    T, D = 300, 64
    k = np.zeros((1, T, D), np.float16)
    k[0, :, 0] = np.where(np.arange(T) == 150, 4000, -4000)
    v = np.arange(T)[None, :, None] + np.zeros((1, T, D))
    q = np.full((T, 1, D), 2000, np.float32)
    out = attend(BACKENDS[isa], q, k, v.astype(np.float16), 0, None)
    assert (out[150:] == 150).all()
    np.testing.assert_allclose(out[:150, 0], np.arange(150) / 2, atol=1e-4)  # all equally bad: the mean


def test_mismatches_are_named():
    backend = CpuBackend(threads=1)
    q, k, out = np.zeros((4, 6, 16), np.float32), np.zeros((2, 9, 16), np.float16), np.zeros((4, 96), np.float32)
    for heads, start, window in ((6, 6, None), (6, 0, 0), (5, 0, None), (6, -1, None)):
        with pytest.raises(KernelError, match="do not fit"):
            backend.prefill_attention(q[:, :heads].copy(), k, k, start, window, out[:, : heads * 16].copy())
    with pytest.raises(KernelError, match="head_dim must be a multiple of 8 up to 256, but is 12"):
        backend.prefill_attention(q[..., :12].copy(), k[..., :12].copy(), k[..., :12].copy(), 0, None, out)
