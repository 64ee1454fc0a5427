"""Inputs and float64 references of the dense operations, shared by the tests of both backends."""

import numpy as np

from runtime.backend import Draws


def stored(rng, shape, dtype, scale=1.0):
    """(array as stored, its exact float64 values) for random weights of one dtype."""
    values = (rng.standard_normal(shape) * scale).astype(np.float32)
    if dtype == "BF16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    data = values.astype(np.float16 if dtype == "F16" else np.float32)
    return data, data.astype(np.float64)


def hostile(rng, shape):
    """Activations with outliers, zeros and denormals among ordinary values."""
    x = rng.standard_normal(shape).astype(np.float32)
    kind = rng.integers(0, 40, shape)
    x[kind == 0] = 1e4
    x[kind == 1] = -1e4
    x[kind == 2] = 0
    x[kind == 3] = 1e-40
    return x


def norm64(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight.astype(np.float64)


def drawn(backend, logits, options, seen, uniform):
    """The id that a backend draws from logits (1, V), which must not change; options: temperature, top_k, top_p, min_p,
    penalty. The state moves on, and the id joins those seen."""
    (ids, host), room = backend.visible(1), backend.upload(np.append(seen, 0).astype(np.int32))
    row, options, uniforms = map(backend.upload, (logits, np.array(options, np.float64), np.array([uniform])))
    state = backend.upload(np.array([7, 3, 11, 0], np.int32))
    backend.sample(row, Draws(options, uniforms, room, ids), state)
    backend.launched()()
    chosen = int(host[0])
    assert backend.download(state).tolist() == [8, 4, chosen, 1] and backend.download(room)[-1] == chosen
    assert np.array_equal(backend.download(row), logits, equal_nan=True), "sampling changed the logits"
    return chosen
