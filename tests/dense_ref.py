"""Inputs and float64 references of the dense operations, shared by the tests of both backends."""

import numpy as np

from runtime.backend import Draws

EPS = 2.0**-24  # float32's unit roundoff


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


class Qkv:
    """One call of qkv on random inputs, and what it must give. parts: of wq, wk, wv what `stored` returns."""

    def __init__(self, rng, T, E, G, group, D, dtype, bias, scale):
        heads, P = (G * group, G, G), T + 9
        self.D, self.slots_count = D, T + 5
        self.parts = [stored(rng, (n * D, E), dtype) for n in heads]
        self.x, self.norm = hostile(rng, (T, E)), (rng.standard_normal(E) * scale).astype(np.float32)
        self.biases = [rng.standard_normal(n * D).astype(np.float32) if bias else None for n in heads]
        angles = rng.uniform(-3, 3, (P, D // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.positions, self.slots = (rng.permutation(n)[:T].astype(np.int32) for n in (P, self.slots_count))

    def outputs(self, guarded):
        """q (T, H, D), k and v (G, slots, D), made by guarded(shape, dtype)."""
        T, G, D = len(self.x), len(self.parts[1][1]) // self.D, self.D
        H = len(self.parts[0][1]) // D
        return (guarded((T, H, D), np.float32), *(guarded((G, self.slots_count, D), np.float16) for _ in "kv"))

    def check(self, q, k, v, dot_bound):
        """dot_bound(a, b): how far the backend's product of a (T, E) and b (E, N) may be from the exact one."""
        n, T, D = norm64(self.x, self.norm, 1e-5), len(self.x), self.D
        c, s = (np.tile(table[self.positions].astype(np.float64), 2)[:, None] for table in (self.cos, self.sin))

        def project(part):
            (_, w), b = self.parts[part], self.biases[part]
            y = n @ w.T + (0 if b is None else b)
            error = 2 * dot_bound(n, w.T) + 4 * EPS * np.abs(y)
            return y.reshape(T, -1, D), error.reshape(T, -1, D)

        def turn(y, error):
            half = np.concatenate([-y[..., D // 2 :], y[..., : D // 2]], -1)
            half_error = np.concatenate([error[..., D // 2 :], error[..., : D // 2]], -1)
            return y * c + half * s, error + half_error + 4 * EPS * (np.abs(y) + np.abs(half))

        expected, bound = turn(*project(0))
        assert (np.abs(q - expected) <= bound).all()
        for got, (expected, bound) in ((k, turn(*project(1))), (v, project(2))):
            unwritten = np.setdiff1d(np.arange(self.slots_count), self.slots)
            assert np.isnan(got[:, unwritten]).all(), "wrote a slot that is not in slots"
            expected, bound = np.clip(expected, -65504, 65504).swapaxes(0, 1), bound.swapaxes(0, 1)
            rounding = np.maximum(2.0**-11 * (np.abs(expected) + bound), 2.0**-25)  # FP16, subnormals
            assert (np.abs(got[:, self.slots] - expected) <= bound + rounding).all()


def drawn(backend, logits, options, seen, uniform):
    """The id that a backend draws from logits (1, V), which must not change; options: temperature, top_k, top_p, min_p,
    penalty. The state moves on, and the id joins those seen."""
    (ids, host), room = backend.visible(1), backend.upload(np.append(seen, 0).astype(np.int32))
    row, options, uniforms = map(backend.upload, (logits, np.array(options, np.float64), np.array([uniform])))
    state = backend.upload(np.array([7, 3, 11, 0, 5, 0, 0, 0], np.int32))
    backend.sample(row, Draws(options, uniforms, room, ids), state)
    backend.launched()()
    chosen = int(host[0])
    assert backend.download(state).tolist() == [8, 4, chosen, 1, 5, 0, 0, 0] and backend.download(room)[-1] == chosen
    assert np.array_equal(backend.download(row), logits, equal_nan=True), "sampling changed the logits"
    return chosen
