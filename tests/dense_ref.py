"""Inputs and float64 references of the dense operations, shared by the tests of both backends."""

import numpy as np


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
