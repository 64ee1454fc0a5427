"""The Backend protocol in plain NumPy, float64 inside: the oracle for the engine and for every other backend.

Slow and obvious. Quantized chunks are kept as decoded values beside the arena, so attention sees exactly what
runtime.formats says it should see, with K of the pre-RoPE formats turned again. Positions lie in the arena as
everywhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from runtime.backend import STATE_DRAWN, STATE_FLUSHED, STATE_POSITION, STATE_SLOT, STATE_TOKEN
from runtime.formats import round_trip


@dataclass
class NumpyBackend:
    name: str = "numpy"
    prefill_tile: int = 512
    prefill_rows: int = 1
    asynchronous: bool = False
    turns_by_place: bool = False
    max_batch: int = 16
    exact_batch: int = 16
    least_batch: int = 1
    maps_weights: bool = False
    reserve: int = 0
    chunks: dict = field(default_factory=dict)  # arena, offset of its position -> decoded K and V (G, C, D)

    def kernels(self):
        return {"all": "numpy"}

    def check_model(self, heads, kv_heads, head_dim):
        pass

    def matrix(self, data, dtype):
        return (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if dtype == "BF16" else data.astype(
            np.float64)

    def activation_type(self, rows, weights):
        return np.dtype(np.float32)

    def vector(self, data, dtype):
        return self.matrix(data, dtype)

    def empty(self, shape, dtype):
        return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 77, dtype)

    def upload(self, data):
        return data.copy()

    def download(self, array):
        return array.copy()

    def host(self, shape, dtype):
        return np.empty(shape, dtype)

    def copy(self, source, target):
        target[...] = source

    def beside(self, copies):
        copies()
        return lambda: None

    def visible(self, n):
        ids = np.full(n, 77, np.int32)
        return ids, ids

    def launched(self):
        return lambda: None

    def arena(self, nbytes):
        return np.full(nbytes, 0xA5, np.uint8)

    def free_bytes(self):
        return None

    def captured(self, step):
        return step

    def mark(self):
        return time.perf_counter()

    def seconds(self, begin, end):
        return end - begin

    def prepare(self, layers, heads, kv_heads, head_dim, chunk, window, flushes):
        pass

    def bind(self, arena, spans, tail, heads, kv_heads, head_dim, chunk, window, flushed=None, data=None):
        half = np.float16
        size = 2 * kv_heads * tail.capacity * head_dim
        k = arena[tail.k : tail.k + size].view(half).reshape(kv_heads, tail.capacity, head_dim)
        v = arena[tail.v : tail.v + size].view(half).reshape(kv_heads, tail.capacity, head_dim)
        positions = arena[tail.positions : tail.positions + 4 * tail.capacity].view(np.int32)
        return arena, spans, k, v, positions, chunk, window, tail.head, flushed

    def batch_of(self, weights):
        return self.max_batch

    def bind_rows(self, states, ropes, draws):
        return None

    def bind_batch(self, bounds):
        return list(bounds)

    def embed(self, ids, table, out):
        out[:] = table[ids]

    def qkv(self, x, norm, eps, wq, wk, wv, bq, bk, bv, cos, sin, positions, slots, q, k, v):
        n = _rms(x, norm, eps)
        dim = q.shape[-1]
        q[:] = _rope(_linear(n, wq, bq).reshape(len(x), -1, dim), cos[positions], sin[positions])
        k[:, slots] = _rope(_linear(n, wk, bk).reshape(len(x), -1, dim), cos[positions], sin[positions]).swapaxes(0, 1)
        v[:, slots] = _linear(n, wv, bv).reshape(len(x), -1, dim).swapaxes(0, 1)

    def prefill_attention(self, q, k, v, start, window, out):
        rows = np.arange(start, start + len(q))
        keys = np.arange(start + len(q))
        age = rows[:, None] - keys[None]
        visible = (age >= 0) & (age < (window or len(keys) + 1))
        group = q.shape[1] // k.shape[0]
        for head in range(q.shape[1]):
            scores = q[:, head].astype(np.float64) @ k[head // group, keys].astype(np.float64).T * q.shape[-1] ** -0.5
            out[:, head * q.shape[-1] : (head + 1) * q.shape[-1]] = _softmax(
                np.where(visible, scores, -np.inf)) @ v[head // group, keys].astype(np.float64)

    def attention_mass(self, q, k, start, window, first, chunk, out):
        age = np.arange(start, start + len(q))[:, None] - np.arange(start + len(q))[None]
        visible = (age >= 0) & (age < (window or age.size))
        group, N = q.shape[1] // k.shape[0], out.shape[1]
        out[:] = 0
        for head in range(q.shape[1]):
            scores = q[:, head].astype(np.float64) @ k[head // group, : start + len(q)].astype(np.float64).T
            p = _softmax(np.where(visible, scores * q.shape[-1] ** -0.5, -np.inf)).sum(axis=0)
            p = np.append(p, np.zeros(k.shape[1] - len(p)))[first : first + N * chunk]
            out[head // group] += p.reshape(N, chunk).sum(axis=1)

    def linear_add(self, h, weight, bias, x):
        x += _linear(h, weight, bias)

    def gate_up(self, x, norm, eps, gate, up, gate_bias, up_bias, out):
        n = _rms(x, norm, eps)
        g = _linear(n, gate, gate_bias)
        out[:] = g / (1 + np.exp(-g)) * _linear(n, up, up_bias)

    def logits(self, x, norm, eps, head, out):
        out[:] = _linear(_rms(x, norm, eps), head, None)

    def pack(self, k, v, arena, span, starts, chunk, positions=None, data=None):
        positions = starts if positions is None else positions
        assert len(starts) == len(positions) == span.n
        rows, tokens = (x[:, None] + np.arange(chunk) for x in (starts, positions))
        decoded = [round_trip(kind, x[:, rows].swapaxes(0, 1), bits, span.formats, tokens, data).astype(np.float64)
                   for kind, x, bits in (("K", k, span.k_bits), ("V", v, span.v_bits))]
        for c in range(span.n):
            self.chunks[id(arena), span.positions + 4 * c] = decoded[0][c], decoded[1][c]
        arena[span.positions : span.positions + 4 * span.n].view(np.int32)[:] = positions

    def copy_tail(self, k, v, rows, arena, tail, slot):
        shape = (k.shape[0], tail.capacity, k.shape[2])
        for x, offset in ((k, tail.k), (v, tail.v)):
            view = arena[offset : offset + 2 * int(np.prod(shape))].view(np.float16).reshape(shape)
            view[:, slot : slot + len(rows)] = x[:, rows]

    def append(self, k, v, bound, state):
        for b, (_, _, tail_k, tail_v, *_) in enumerate(bound):
            tail_k[:, state[b, STATE_SLOT]], tail_v[:, state[b, STATE_SLOT]] = k[:, b], v[:, b]

    def decode_attention(self, q, bound, state, out):
        if isinstance(bound, list):
            for b, one in enumerate(bound):
                self.decode_attention(q[b : b + 1], one, state[b], out[b : b + 1])
            return
        arena, spans, tail_k, tail_v, tail_positions, chunk, window, head, room = bound
        gone = state[STATE_FLUSHED] * chunk
        visible = np.r_[0 : min(head, state[STATE_SLOT] + 1), head + gone : state[STATE_SLOT] + 1]
        ks, vs, at = [tail_k[:, visible].astype(np.float64)], [tail_v[:, visible].astype(np.float64)], [
            tail_positions[visible]]
        read = [(span, span.n) for span in spans] + ([(room, state[STATE_FLUSHED])] if room is not None else [])
        for span, n in read:
            for offset in range(span.positions, span.positions + 4 * n, 4):
                k, v = self.chunks[id(arena), offset]
                ks.append(k)
                vs.append(v)
                at.append(arena[offset : offset + 4].view(np.int32) + np.arange(chunk))
        k, v, positions = np.concatenate(ks, 1), np.concatenate(vs, 1), np.concatenate(at)
        age = state[STATE_POSITION] - positions
        keep = (age >= 0) & (age < (window or age.max() + 1))
        group, dim = q.shape[1] // k.shape[0], q.shape[2]
        for head in range(q.shape[1]):
            scores = k[head // group, keep] @ q[0, head].astype(np.float64) * dim**-0.5
            out[0, head * dim : (head + 1) * dim] = _softmax(scores) @ v[head // group, keep]

    def sample(self, logits, draws, state):
        temperature, *_, penalty = draws.options
        assert temperature == 0 and penalty == 1, "the oracle is greedy"
        draws.ids[state[STATE_DRAWN]] = np.argmax(logits[0])
        self.advance(state, draws.ids[state[STATE_DRAWN]])
        state[STATE_DRAWN] += 1

    def advance(self, state, token):
        state[STATE_POSITION] += 1
        state[STATE_SLOT] += 1
        state[STATE_TOKEN] = token


def _rms(x, norm, eps):
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * norm


def _linear(x, weight, bias):
    y = x.astype(np.float64) @ weight.T
    return y if bias is None else y + bias


def _rope(x, cos, sin):
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _softmax(scores):
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)
