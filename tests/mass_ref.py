"""Attention mass for the tests of both backends: what is drawn, and the float64 reference."""

import numpy as np
from hypothesis import strategies as st
from strategies import seeds


@st.composite
def mass_cases(draw, head_dims, large=True):
    """The arguments of `mass_arrays`; one case in eight is longer than 8K keys."""
    long = large and draw(st.integers(0, 7)) == 5
    T, group = draw(st.one_of(st.integers(1, 8), st.integers(1, 40), st.integers(60, 130))), draw(st.integers(1, 16))
    G, before = draw(st.integers(1, 3)), draw(st.one_of(st.just(0), st.integers(0, 700)))
    if not large:
        T, group, before = T % 70 + 1, group % 4 + 1, before % 200
    if long:
        T, group, G, before = min(T, 40), group % 4 + 1, 1, before + 8200
    chunk = draw(st.sampled_from((8, 16, 24, 32, 40, 64, 96, 256)))
    first = draw(st.integers(0, 40))
    room = (before + T - first) // chunk
    return {"T": T, "before": before, "G": G, "group": group, "D": draw(head_dims), "spare": draw(st.integers(0, 300)),
            "window": draw(st.one_of(st.none(), st.integers(1, 900), st.integers(1, before + T + 9))),
            "first": first, "chunk": chunk, "N": max(1, room - draw(st.sampled_from((0, 0, 1, 3)))),
            "scale": draw(st.sampled_from((0.0, 0.01, 1.0, 4.0))), "seed": draw(seeds)}


def mass_arrays(T, before, G, group, D, spare, window, first, chunk, N, scale, seed):
    """q (T, H, D), k (G, S, D) and the shape of the output; rows beyond the last key are NaN and must not matter."""
    rng, keys = np.random.default_rng(seed), before + T
    q = (rng.standard_normal((T, G * group, D)) * scale).astype(np.float32)
    k = rng.standard_normal((G, max(keys + spare, first + N * chunk), D)).astype(np.float16)
    k[:, keys:] = np.nan
    return q, k, (G, N)


def mass_reference(q, k, start, window, first, chunk, shape, score_error):
    """(masses, bound), float64 (G, N). score_error(q (T, D), k (S, D)): how far a score may be off, (T, S).

    Weights are off by a factor e^error each, and so is the sum they are divided by.
    """
    (_, H, D), (G, N), keys = q.shape, shape, start + len(q)
    age = np.arange(start, keys)[:, None] - np.arange(keys)
    visible = (age >= 0) & (age < (window or keys))
    masses, bound = np.zeros(shape), np.zeros(shape)
    chunk_of = (np.arange(keys) - first) // chunk
    inside = (chunk_of >= 0) & (chunk_of < N)
    for head in range(H):
        g = head * G // H
        x, y = q[:, head].astype(np.float64) * D**-0.5, k[g, :keys].astype(np.float64)
        scores = np.where(visible, x @ y.T, -np.inf)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        off = np.where(visible, np.expm1(score_error(x, y)), 0)
        moved = p * (off + (p * off).sum(1, keepdims=True)) * 1.1
        for sums, values in ((masses, p), (bound, moved)):
            sums[g] += np.bincount(chunk_of[inside], values.sum(0)[inside], N)
    return masses, bound
