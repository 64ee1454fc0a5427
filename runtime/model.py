"""The forward pass: prefill layer by layer over the whole prompt, decode one token over the mixed cache.

Prefill keeps the hidden states of all tokens and the K and V of one layer: layer l computes K and V of every token in
FP16, attends with them exactly, and hands them to the caches, which pack their chunks before layer l + 1 begins.

What comes first in many prompts, a document, need not be computed each time: its K and V of every layer are kept while
one prompt is read (`kept`) and brought in by later ones (`known`), which compute the rows behind it only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.backend import Array, Backend
from runtime.cache import Cache
from runtime.config import ModelConfig
from runtime.layerwise import QueryAttention
from runtime.master import Exchange, Master
from runtime.rope import rope_tables
from runtime.weights import LayerWeights, Weights


@dataclass(frozen=True)
class Model:
    """Everything that does not change from prompt to prompt."""

    config: ModelConfig
    weights: Weights
    backend: Backend

    def rope(self, prompt_tokens: int, total_tokens: int) -> tuple[Array, Array]:
        """cos and sin, float32 (total_tokens, D/2), in the backend's memory."""
        cos, sin = rope_tables(self.config, prompt_tokens, total_tokens)
        return self.backend.upload(cos), self.backend.upload(sin)


@dataclass(frozen=True)
class StepBuffers:
    """What a step of T rows writes: x (T, E) and q (T, H, D), float32; attended (T, H*D) and hidden (T, I), of the type
    in which the backend reads so many rows."""

    x: Array
    q: Array
    attended: Array
    hidden: Array

    @classmethod
    def allocate(cls, config: ModelConfig, backend: Backend, rows: int, layers: Sequence[LayerWeights] = (),
                 **room: Array) -> StepBuffers:
        """layers: those that will read attended and hidden; without them both are float32. room: buffers of more rows
        by name, whose memory is taken where the type is the same."""

        def buffer(name: str, width: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
            held = room.get(name)
            return backend.empty((rows, *width), dtype) if held is None or held.dtype != dtype else held[:rows]

        return cls(buffer("x", (config.hidden_size,)), buffer("q", (config.n_heads, config.head_dim)),
                   buffer("attended", (config.n_heads * config.head_dim,),
                          backend.activation_type(rows, [layer.wo for layer in layers])),
                   buffer("hidden", (config.intermediate_size,),
                          backend.activation_type(rows, [layer.down for layer in layers])))


def prefill(model: Model, ids: Sequence[int], rope: tuple[Array, Array], caches: Sequence[Cache], logits: Array | None,
            tile: int, watched: Sequence[QueryAttention] = (), known: Master | None = None,
            kept: Master | None = None) -> Generator[tuple[int, int], None, None]:
    """Run the prompt and fill every cache; resumable anywhere between steps. watched: what sees every tile's q and k.

    known: K and V of the prompt's first tokens, which are not computed again. kept: where to put those that are; it
    holds the first tokens of every layer once the generator has ended.
    Yields (steps done, steps in all) after each (layer, token tile). At the end logits (1, V) predict the first
    answer token: they come from the exact K and V, whatever the caches keep. logits None: nobody wants to know.
    """
    config, backend, layers = model.config, model.backend, model.weights.layers
    n = len(ids)
    # Computed although known: rows whose q is looked at, and as many as give the others the bits of a fresh reading.
    begin = 0 if known is None else max(0, min(known.tokens, n - backend.prefill_rows,
                                               *(attention.rows.start for attention in watched)))
    tiles = _tiles(begin, n, tile)
    x = backend.empty((n - begin, config.hidden_size), np.float32)
    highest = StepBuffers.allocate(config, backend, max(end - start for start, end in tiles), layers, x=x)
    heights = {1, *(end - start for start, end in tiles)}  # the last layer ends with one row
    buffers = {rows: StepBuffers.allocate(config, backend, rows, layers, **vars(highest)) for rows in heights}
    exchange = Exchange(backend, (config.n_kv_heads, n, config.head_dim), config.n_layers, known, kept)
    positions = backend.upload(np.arange(begin, n, dtype=np.int32))
    backend.embed(backend.upload(np.array(ids[begin:], np.int32)), model.weights.embed, x)
    done, total = 0, config.n_layers * len(tiles)
    for layer in range(config.n_layers):
        last = layer == config.n_layers - 1
        k, v = exchange.enter(layer)
        for start, end in tiles:
            q, at = buffers[end - start].q, positions[start - begin : end - begin]
            _project(model, layer, x[start - begin : end - begin], rope, at, at, q, k, v)
            if known is not None:
                known.fetch(layer, k, v, start)  # of a row that both have, the known K and V count
            for attention in watched:
                attention.see(q, k, start)
            # Of the last layer only the last token's output is read; its K and V are needed for every token.
            first = start if not last else n - 1 if logits is not None else n
            if first < end:
                attended, hidden = buffers[end - first].attended, buffers[end - first].hidden
                backend.prefill_attention(q[first - start :], k, v, first, config.sliding_window, attended)
                _finish_layer(model, layer, x[first - begin : end - begin], attended, hidden)
            done += 1
            if end == n:
                exchange.leave(layer)
                for cache in caches:
                    cache.pack(layer, k, v)
            yield done, total
    exchange.end()
    if logits is not None:
        backend.logits(x[n - 1 - begin :], model.weights.norm, config.rms_norm_eps, model.weights.head, logits)


def prefill_bytes(config: ModelConfig, tokens: int, tile: int, layers: int = 1) -> int:
    """What `prefill` allocates beside the caches, at most: hidden states of all tokens, K and V of so many layers
    (runtime.master.layers_at_once), what a tile's rows go through."""
    wide = 2 * config.n_heads * config.head_dim + config.intermediate_size  # q, attended, hidden
    kv = 2 * config.n_kv_heads * config.head_dim * layers
    return tokens * (4 * config.hidden_size + 2 * kv + 8) + 4 * wide * min(tokens, tile + tile // 8)


def _tiles(begin: int, n: int, tile: int) -> list[tuple[int, int]]:
    """begin..n in tiles. A short rest makes the first one longer: few rows keep no device busy, and these see few
    keys."""
    rest = (n - begin) % tile
    ends = [*range(begin + tile + (rest if 8 * rest < tile else 0), n, tile), n]
    return list(zip([begin, *ends[:-1]], ends, strict=True))


class StepRows(Protocol):
    """What a decode step reads of T tokens: one token of a Cache, or one of each sequence of a batch.

    token, position, slot: int32 (T,); state: int32 (STATE_SIZE,), of a batch (T, STATE_SIZE). k, v: per layer, where
    the tokens' K and V go, FP16 (G, S, D), token t to slot[t]; staged: from there they go on, each to the tail of its
    own sequence. bound: per layer, from Backend.bind or bind_batch.
    """

    token: Array
    position: Array
    slot: Array
    state: Array
    k: tuple[Array, ...]
    v: tuple[Array, ...]
    bound: tuple[Any, ...]
    staged: bool


def decode_step(model: Model, rows: StepRows, rope: tuple[Array, Array], buffers: StepBuffers, logits: Array) -> None:
    """T tokens, each the last of its sequence; logits (T, V) predict the next ones. rope: row = position.

    Touches only buffers that were allocated before, so that a backend may capture it once. Does not advance the state.
    """
    config, backend = model.config, model.backend
    backend.embed(rows.token, model.weights.embed, buffers.x)
    for layer in range(config.n_layers):
        k, v, bound = rows.k[layer], rows.v[layer], rows.bound[layer]
        _project(model, layer, buffers.x, rope, rows.position, rows.slot, buffers.q, k, v)
        if rows.staged:
            backend.append(k, v, bound, rows.state)
        backend.decode_attention(buffers.q, bound, rows.state, buffers.attended)
        _finish_layer(model, layer, buffers.x, buffers.attended, buffers.hidden)
    backend.logits(buffers.x, model.weights.norm, config.rms_norm_eps, model.weights.head, logits)


def _project(model: Model, layer: int, x: Array, rope: tuple[Array, Array], positions: Array, slots: Array, q: Array,
             k: Array, v: Array) -> None:
    w = model.weights.layers[layer]
    model.backend.qkv(x, w.attn_norm, model.config.rms_norm_eps, w.wq, w.wk, w.wv, w.bq, w.bk, w.bv, rope[0], rope[1],
                      positions, slots, q, k, v)


def _finish_layer(model: Model, layer: int, x: Array, attended: Array, hidden: Array) -> None:
    w, backend = model.weights.layers[layer], model.backend
    backend.linear_add(attended, w.wo, w.bo, x)
    backend.gate_up(x, w.mlp_norm, model.config.rms_norm_eps, w.gate, w.up, w.gate_bias, w.up_bias, hidden)
    backend.linear_add(hidden, w.down, w.down_bias, x)
