"""What an answer's logits must be under any plan: the model in the NumPy backend's float64, attending over the decoded
values of whatever the plan has packed by then and the FP16 of all else.

It keeps every layer's K and V whole and replaces chunks by runtime.formats' round trip of them; it knows neither arenas
nor spans nor states, so it checks runtime.cache, runtime.arena and the flushing of the tail.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy_backend import NumpyBackend, _softmax
from safetensors.numpy import save_file

from runtime.formats import round_trip
from runtime.model import Model, StepBuffers, prefill
from runtime.plan import Plan


class _Kept:
    """In a cache's place: takes every layer's K and V of the prompt."""

    def __init__(self, tokens):
        self.layers, self._tokens = [], tokens

    def pack(self, layer, k, v):
        whole = [np.full((x.shape[0], self._tokens, x.shape[2]), np.nan, np.float16) for x in (k, v)]
        for x, prompt in zip(whole, (k, v), strict=True):
            x[:, : prompt.shape[1]] = prompt
        self.layers.append(tuple(whole))


def forced(model: Model, prompt, plan: Plan, answer, data):
    """(len(answer), V) float32: row i predicts answer[i]. data: per layer FormatData of host arrays, or None."""
    assert isinstance(model.backend, NumpyBackend)
    config, backend, layout, n = model.config, model.backend, plan.layout, len(prompt)
    rope = model.rope(n, n + layout.max_new)
    kept, logits = _Kept(n + len(answer)), backend.empty((1, config.vocab_size), np.float32)
    for _ in prefill(model, prompt, rope, [kept], logits, n):
        pass
    rows = [logits[0].copy()]
    buffers, decoded = StepBuffers.allocate(config, backend, 1), {}
    for generated, token in enumerate(answer[:-1]):
        at = np.array([n + generated], np.int32)
        backend.embed(np.array([token], np.int32), model.weights.embed, buffers.x)
        for layer, (k, v) in enumerate(kept.layers):
            w = model.weights.layers[layer]
            backend.qkv(buffers.x, w.attn_norm, config.rms_norm_eps, w.wq, w.wk, w.wv, w.bq, w.bk, w.bv, *rope, at, at,
                        buffers.q, k, v)
            seen = [x[:, : at[0] + 1].astype(np.float64) for x in (k, v)]
            stored = np.ones(at[0] + 1, bool)
            for start, tier in _packed(plan, layer, generated):
                rows_of = np.arange(start, start + layout.chunk)
                stored[rows_of] = tier.k_bits > 0
                if (layer, start) not in decoded:
                    decoded[layer, start] = [
                        round_trip(kind, x[:, rows_of], bits, layout.formats, rows_of, data and data[layer])
                        for kind, x, bits in (("K", k, tier.k_bits), ("V", v, tier.v_bits))]
                for x, values in zip(seen, decoded[layer, start], strict=True):
                    x[:, rows_of] = values
            age = at[0] - np.arange(at[0] + 1)
            buffers.attended[:] = _attend(buffers.q[0], *seen, stored & (age < (config.sliding_window or at[0] + 1)))
            backend.linear_add(buffers.attended, w.wo, w.bo, buffers.x)
            backend.gate_up(buffers.x, w.mlp_norm, config.rms_norm_eps, w.gate, w.up, w.gate_bias, w.up_bias,
                            buffers.hidden)
            backend.linear_add(buffers.hidden, w.down, w.down_bias, buffers.x)
        backend.logits(buffers.x, model.weights.norm, config.rms_norm_eps, model.weights.head, logits)
        rows.append(logits[0].copy())
    return np.stack(rows)


def _packed(plan, layer, generated):
    """(first position, tier) of every chunk that is packed when that many generated tokens stand before this one."""
    layout = plan.layout
    for chunk, tier in enumerate(plan.assignment[layer]):
        yield layout.prefix + chunk * layout.chunk, layout.tiers[tier]
    if layout.flush is None:
        return
    lowest = min((tier for tier in layout.tiers if tier.k_bits), key=lambda tier: (tier.k_bits + tier.v_bits,
                                                                                   tier.k_bits))
    start = layout.prefix + layout.n_chunks * layout.chunk
    while start + layout.chunk + layout.flush <= layout.prompt_tokens + generated:
        yield start, lowest
        start += layout.chunk


def _attend(q, k, v, visible):
    group, dim = q.shape[0] // k.shape[0], q.shape[1]
    return np.concatenate([
        _softmax(k[head // group, visible] @ q[head].astype(np.float64) * dim**-0.5) @ v[head // group, visible]
        for head in range(len(q))])[None]


def save_calibration(path: Path, config, seed: int = 0, **metadata: str) -> Path:
    """A kvquant calibration of made-up ranges and levels, some outliers on either side of the ranges."""
    rng, tensors = np.random.default_rng(seed), {}
    shape = config.n_kv_heads, config.head_dim
    for layer in range(config.n_layers):
        tensors[f"layers.{layer}.k_centre"] = 0.3 * rng.standard_normal(shape)
        tensors[f"layers.{layer}.k_half"] = rng.uniform(1.0, 2.0, shape)
        for kind in "kv":
            for bits in (2, 3, 4):
                tensors[f"layers.{layer}.{kind}_levels.{bits}"] = np.sort(rng.uniform(-1, 1, 2**bits))
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, path,
              metadata={"version": "1", "weighting": "none", "tokens": "0"} | metadata)
    return path
