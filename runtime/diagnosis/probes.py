"""Does every kernel of a backend compute what it should? Small random inputs against the same arithmetic in float64.

No proof of correctness, which the tests are for: it finds a broken build, driver or processor on the user's machine.
Letters as in runtime.backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.arena import ArenaLayout
from runtime.backend import STATE_POSITION, STATE_SIZE, STATE_SLOT, STATE_TOKEN, Backend, FormatData
from runtime.checkpoint import Tensor
from runtime.encoder import EncoderBackend, Norm
from runtime.formats import FAMILIES, PRE_ROPE, WIDTHS, kvquant, round_trip
from runtime.plan import FP16, DocumentShape, Tier
from runtime.sampler import Sampler, SamplingParams

F64 = npt.NDArray[np.float64]
Case = tuple[str, Any, Any, float]  # what; got and wanted, arrays of one shape; tolerance

H, G, D = 4, 2, 64
E, I, V, S = H * D, 384, 512, 96  # noqa: E741 - the project's letter of the MLP size
EPS = 1e-5
ROWS = (1, 9, 40)  # one for decoding, a few, many: backends choose their kernel by it
# Of the largest value. Backends may round activations to the weights' type, and attention's probabilities to FP16.
TOLERANCE = {"F32": 5e-3, "F16": 5e-3, "BF16": 2e-2}


@dataclass(frozen=True)
class Probed:
    """One operation on one set of inputs. error: largest difference over the largest value wanted, inf where a value is
    not finite or the operation raised, which is then the problem. refused: the backend says that it has no such kernel.
    """

    operation: str
    error: float
    tolerance: float
    problem: str = ""
    refused: bool = False

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance


def probe(backend: Backend) -> Iterator[Probed]:
    """Every operation of a layer, of the cache in every family of formats, and of the step's end."""
    for name, cases in (("embed", _embed), ("qkv", _qkv), ("linear_add", _linear_add), ("gate_up", _gate_up),
                        ("logits", _logits), ("prefill_attention", _prefill_attention),
                        ("attention_mass", _attention_mass), ("sample", _sample), ("advance", _advance)):
        yield from _probed(name, partial(cases, backend))
    if backend.max_batch > 1:
        yield from _probed("append", partial(_append, backend))
    for family in FAMILIES:
        yield from _probed(f"pack, decode_attention: {family}", partial(_cache, backend, family), family != "rotated")


def probe_encoder(backend: EncoderBackend) -> Iterator[Probed]:
    """Every operation of an encoder's layer."""
    yield from _probed("encoder", partial(_encoder, backend))


def _probed(name: str, cases: Callable[[], Iterator[Case]], may_refuse: bool = False) -> Iterator[Probed]:
    what = ""
    try:
        for what, got, want, tolerance in cases():
            got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
            scale = float(np.abs(want).max()) or 1.0
            error = float(np.abs(got - want).max()) / scale if np.isfinite(got).all() else math.inf
            yield Probed(f"{name} {what}".strip(), error, tolerance)
    except (RuntimeError, MemoryError, OSError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        # Refusals come before the first result; what a kernel raises later is a failure.
        yield Probed(name, math.inf, 0.0, problem, refused=may_refuse and not what)


# Layer operations --------------------------------------------------------------------------------------------------

def _embed(backend: Backend) -> Iterator[Case]:
    ids = np.array([3, 0, V - 1], np.int32)
    for dtype in TOLERANCE:
        stored, table = _weights(dtype, V, E)
        out = backend.empty((len(ids), E), np.float32)
        backend.embed(backend.upload(ids), backend.matrix(stored, dtype), out)
        yield dtype, backend.download(out), table[ids], 0.0


def _qkv(backend: Backend) -> Iterator[Case]:
    cos, sin = _rope_tables()
    for dtype, T in _each():
        x, norm = _random(1, T, E), 1 + 0.1 * _random(2, E)
        stored = [_weights(dtype, heads * D, E, seed) for seed, heads in enumerate((H, G, G))]
        biases = [0.1 * _random(3 + i, heads * D) for i, heads in enumerate((H, G, G))]
        wq, wk, wv = (backend.matrix(matrix, dtype) for matrix, _ in stored)
        bq, bk, bv = (backend.vector(bias, "F32") for bias in biases)
        positions = np.arange(T, dtype=np.int32) + 5
        slots = np.arange(T, dtype=np.int32)[::-1].copy()
        q = backend.empty((T, H, D), np.float32)
        k, v = (backend.empty((G, T, D), np.float16) for _ in range(2))
        backend.qkv(backend.upload(x), backend.vector(norm, "F32"), EPS, wq, wk, wv, bq, bk, bv, backend.upload(cos),
                    backend.upload(sin), backend.upload(positions), backend.upload(slots), q, k, v)
        wanted = [(_rms(x, norm) @ matrix.T + bias).reshape(T, -1, D)
                  for (_, matrix), bias in zip(stored, biases, strict=True)]
        turned = [_rope(y, cos[positions], sin[positions]) for y in wanted[:2]]
        yield f"{dtype}, T={T}, q", backend.download(q), turned[0], TOLERANCE[dtype]
        for name, got, want in (("k", k, turned[1]), ("v", v, wanted[2])):
            yield f"{dtype}, T={T}, {name}", backend.download(got)[:, slots].swapaxes(0, 1), want, TOLERANCE[dtype]


def _linear_add(backend: Backend) -> Iterator[Case]:
    for dtype, T in _each():
        x, bias, (stored, matrix) = _random(1, T, E), _random(2, E), _weights(dtype, E, I)
        weight = backend.matrix(stored, dtype)
        h, values = _activations(_random(3, T, I), backend.activation_type(T, [weight]))
        out = backend.upload(x)
        backend.linear_add(backend.upload(h), weight, backend.vector(bias, "F32"), out)
        yield f"{dtype}, T={T}", backend.download(out), x + values @ matrix.T + bias, TOLERANCE[dtype]


def _gate_up(backend: Backend) -> Iterator[Case]:
    for dtype, T in _each():
        x, norm = _random(1, T, E), 1 + 0.1 * _random(2, E)
        (gate, gate_values), (up, up_values) = _weights(dtype, I, E, 3), _weights(dtype, I, E, 4)
        out = backend.empty((T, I), np.float32)
        backend.gate_up(backend.upload(x), backend.vector(norm, "F32"), EPS, backend.matrix(gate, dtype),
                        backend.matrix(up, dtype), None, None, out)
        g = _rms(x, norm) @ gate_values.T
        yield (f"{dtype}, T={T}", backend.download(out), g / (1 + np.exp(-g)) * (_rms(x, norm) @ up_values.T),
               TOLERANCE[dtype])


def _logits(backend: Backend) -> Iterator[Case]:
    for dtype in TOLERANCE:
        x, norm, (stored, head) = _random(1, 1, E), 1 + 0.1 * _random(2, E), _weights(dtype, V, E)
        out = backend.empty((1, V), np.float32)
        backend.logits(backend.upload(x), backend.vector(norm, "F32"), EPS, backend.matrix(stored, dtype), out)
        yield dtype, backend.download(out), _rms(x, norm) @ head.T, TOLERANCE[dtype]


def _prefill_attention(backend: Backend) -> Iterator[Case]:
    k, v = _half(1, G, S, D), _half(2, G, S, D)
    for T, start, window in ((1, S - 1, None), (9, 20, None), (40, S - 40, 17)):
        q, out = _random(3, T, H, D), backend.empty((T, H * D), np.float32)
        backend.prefill_attention(backend.upload(q), backend.upload(k), backend.upload(v), start, window, out)
        wanted, _ = _attend(q, k, v, _visible(T, start, window))
        yield f"T={T}, window {window}", backend.download(out), wanted, TOLERANCE["F16"]


def _attention_mass(backend: Backend) -> Iterator[Case]:
    T, first, chunk, n = 9, 3, 8, 7
    q, k, out = _random(1, T, H, D), _half(2, G, S, D), backend.empty((G, n), np.float32)
    backend.attention_mass(backend.upload(q), backend.upload(k), S - T, None, first, chunk, out)
    _, p = _attend(q, k, k, _visible(T, S - T, None))
    mass = p[:, :, first : first + n * chunk].reshape(G, H // G, T, n, chunk).sum(axis=(1, 2, 4))
    yield "", backend.download(out), mass, TOLERANCE["F16"]


# Cache operations --------------------------------------------------------------------------------------------------

def _cache(backend: Backend, family: str) -> Iterator[Case]:
    """Chunks of every width of K beside another of V, packed, read by decode attention as runtime.formats decodes them;
    a prefix and a tail around them."""
    chunk, widths = 32, (*WIDTHS[family], 16)
    tiers = [Tier(bits, widths[(i + 1) % len(widths)]) for i, bits in enumerate(widths)]
    shape = DocumentShape(n_layers=1, n_kv_heads=G, head_dim=D, chunk=chunk, n_chunks=len(tiers), prefix=3, remainder=5,
                          suffix=4, max_new=2, window=None)
    layout = shape.layout(tiers, [1] * len(tiers), formats=family)
    sizes, n = ArenaLayout(layout), layout.prompt_tokens
    data = _format_data(family, n)
    uploaded = data and FormatData(**{name: None if part is None else backend.upload(part)
                                      for name, part in vars(data).items()})
    k, v, q = _half(1, G, n, D), _half(2, G, n, D), _random(3, 1, H, D)
    arena, spans, tail = backend.arena(sizes.nbytes), sizes.spans(0), sizes.tail(0)
    positions = np.arange(layout.tail_capacity, dtype=np.int32)
    positions[layout.prefix :] += layout.n_chunks * chunk
    arena[tail.positions : tail.positions + positions.nbytes].view(np.int32)[:] = backend.upload(positions)
    bound = backend.bind(arena, spans, tail, H, G, D, chunk, None, None, uploaded)
    keys, values = backend.upload(k), backend.upload(v)
    seen_k, seen_v = k.astype(np.float64), v.astype(np.float64)
    for i, (tier, span) in enumerate(zip(tiers, spans, strict=True)):
        rows = np.arange(layout.start(i), layout.start(i + 1))
        backend.pack(keys, values, arena, span, rows[:1].astype(np.int32), chunk, data=uploaded)
        seen_k[:, rows] = round_trip("K", k[:, rows], tier.k_bits, family, rows, data)
        seen_v[:, rows] = round_trip("V", v[:, rows], tier.v_bits, family, rows, data)
    rest = np.r_[: layout.prefix, layout.start(layout.n_chunks) : n].astype(np.int32)
    backend.copy_tail(keys, values, rest, arena, tail, 0)
    state, out = np.zeros(STATE_SIZE, np.int32), backend.empty((1, H * D), np.float32)
    state[STATE_POSITION], state[STATE_SLOT] = n - 1, len(rest) - 1
    backend.decode_attention(backend.upload(q), bound, backend.upload(state), out)
    wanted, _ = _attend(q, seen_k, seen_v, np.ones((1, n), bool))
    yield f"({', '.join(map(str, tiers))})", backend.download(out), wanted, TOLERANCE["F16"]


def _append(backend: Backend) -> Iterator[Case]:
    """Two sequences of different lengths, all tail: a batch of one token each is appended and attends."""
    lengths = (5, 11)
    new_k, new_v, q = _half(4, G, 2, D), _half(5, G, 2, D), _random(6, 2, H, D)
    bounds, wanted = [], []
    state = np.zeros((2, STATE_SIZE), np.int32)
    for b, n in enumerate(lengths):
        layout = DocumentShape(n_layers=1, n_kv_heads=G, head_dim=D, chunk=32, n_chunks=0, prefix=0, remainder=0,
                               suffix=n, max_new=2, window=None).layout([FP16], [0])
        sizes, k, v = ArenaLayout(layout), _half(7 + b, G, n, D), _half(9 + b, G, n, D)
        arena, tail = backend.arena(sizes.nbytes), sizes.tail(0)
        arena[tail.positions : tail.positions + 4 * tail.capacity].view(np.int32)[:] = backend.upload(
            np.arange(tail.capacity, dtype=np.int32))
        backend.copy_tail(backend.upload(k), backend.upload(v), np.arange(n, dtype=np.int32), arena, tail, 0)
        bounds.append(backend.bind(arena, [], tail, H, G, D, 32, None))
        state[b, [STATE_POSITION, STATE_SLOT]] = n
        seen_k, seen_v = (np.concatenate([x, new[:, b : b + 1]], axis=1) for x, new in ((k, new_k), (v, new_v)))
        wanted.append(_attend(q[b : b + 1], seen_k, seen_v, np.ones((1, n + 1), bool))[0][0])
    batch, states, out = backend.bind_batch(bounds), backend.upload(state), backend.empty((2, H * D), np.float32)
    backend.append(backend.upload(new_k), backend.upload(new_v), batch, states)
    backend.decode_attention(backend.upload(q), batch, states, out)
    yield "and decode_attention of a batch", backend.download(out), wanted, TOLERANCE["F16"]


def _format_data(family: str, tokens: int) -> FormatData | None:
    if family not in PRE_ROPE:
        return None
    cos, sin = (table[:tokens] for table in _rope_tables(tokens))
    if family == "atom":
        return FormatData(cos, sin)
    levels = np.concatenate([np.linspace(-1, 1, 2**bits, dtype=np.float32) for bits in kvquant.WIDTHS])
    return FormatData(cos, sin, levels, levels.copy(), 0.1 * _random(8, G, D), 1.5 + 0.1 * _random(9, G, D))


# End of the step ---------------------------------------------------------------------------------------------------

def _sample(backend: Backend) -> Iterator[Case]:
    logits = _random(1, 1, V)
    for what, params in (("greedy", SamplingParams()), ("top 1 of a draw", SamplingParams(temperature=0.7, top_k=1))):
        sampler, state = Sampler(backend, (1, 2), 2), backend.upload(np.zeros(STATE_SIZE, np.int32))
        sampler.start(params)
        backend.sample(backend.upload(logits), sampler.draws, state)
        backend.launched()()
        yield what, sampler.ids[:1], [np.argmax(logits)], 0.0


def _advance(backend: Backend) -> Iterator[Case]:
    state = backend.upload(np.arange(STATE_SIZE, dtype=np.int32))
    backend.advance(state, 77)
    wanted = np.arange(STATE_SIZE)
    wanted[[STATE_POSITION, STATE_SLOT]] += 1
    wanted[STATE_TOKEN] = 77
    yield "", backend.download(state), wanted, 0.0


# Encoders ----------------------------------------------------------------------------------------------------------

def _encoder(backend: EncoderBackend) -> Iterator[Case]:
    starts = np.array([0, 7, 20], np.int32)  # two sequences
    T, tolerance = int(starts[-1]), TOLERANCE["F16"]
    scale, shift = 1 + 0.1 * _random(1, E), 0.1 * _random(2, E)
    norm = Norm(backend.vector(scale), backend.vector(shift), EPS)
    x = _random(3, T, E)

    def matrix(rows: int, columns: int, seed: int) -> tuple[Tensor, F64]:
        stored, values = _weights("F16", rows, columns, seed)
        return Tensor("probe", "F16", stored), values

    def rows(values: npt.NDArray[np.float32]) -> Any:
        buffer = backend.rows(*values.shape)
        buffer[:] = backend.vector(values)
        return buffer

    ids = np.arange(T, dtype=np.int32)[::-1].copy()
    (words, word_values), places, out = matrix(V, E, 4), _random(5, T, E), backend.rows(T, E)
    backend.embed(backend.upload(ids), backend.upload(ids), backend.matrix(words), backend.vector(places), norm, out)
    yield "embed", backend.download(out), _layer_norm(word_values[ids] + places[ids], scale, shift), tolerance

    parts, bias = [matrix(E, E, 6 + i) for i in range(3)], 0.1 * _random(9, 3 * E)
    backend.attention(rows(x), backend.matrix(*(part for part, _ in parts)), backend.vector(bias),
                      backend.upload(starts), int(np.diff(starts).max()), H, out)
    q, k, v = (((x @ values.T) + b).reshape(T, H, D)
               for (_, values), b in zip(parts, bias.reshape(3, E), strict=True))
    sequence = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    wanted, _ = _attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1), sequence[:, None] == sequence)
    yield "attention", backend.download(out), wanted, tolerance

    (down, down_values), h, total = matrix(E, I, 10), _random(11, T, I), rows(x)
    backend.add(rows(h), backend.matrix(down), backend.vector(bias[:E]), norm, total)
    yield "add", backend.download(total), _layer_norm(x + h @ down_values.T + bias[:E], scale, shift), tolerance

    (up, up_values), hidden, up_bias = matrix(I, E, 12), backend.rows(T, I), 0.1 * _random(13, I)
    backend.gelu(rows(x), backend.matrix(up), backend.vector(up_bias), hidden)
    g = x @ up_values.T + up_bias
    yield "gelu", backend.download(hidden), g / 2 * (1 + np.vectorize(math.erf)(g / math.sqrt(2))), tolerance

    pooled = backend.pool(rows(x), backend.upload(starts), "mean")
    yield "pool", backend.download(pooled), [x[a:b].mean(axis=0) for a, b in pairwise(starts)], tolerance


# The same in float64 -----------------------------------------------------------------------------------------------

def _each() -> Iterator[tuple[str, int]]:
    return ((dtype, T) for dtype in TOLERANCE for T in ROWS)


def _random(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _half(seed: int, *shape: int) -> npt.NDArray[np.float16]:
    return _random(seed, *shape).astype(np.float16)


def _weights(dtype: str, rows: int, columns: int, seed: int = 0) -> tuple[npt.NDArray[Any], F64]:
    """A matrix as it is stored, and its values."""
    exact = _random(100 + seed, rows, columns) * np.float32(columns**-0.5)
    return _activations(exact, np.dtype({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype]))


def _activations(exact: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], F64]:
    """exact in a type, uint16 being BF16, and the values that are left."""
    if dtype == np.uint16:
        stored: npt.NDArray[Any] = (exact.view(np.uint32) >> 16).astype(np.uint16)
        return stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = exact.astype(dtype)
    return stored, stored.astype(np.float64)


def _rope_tables(positions: int = S) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    angles = np.arange(positions)[:, None] * 100.0 ** (-np.arange(D // 2) / (D // 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rope(x: F64, cos: npt.NDArray[Any], sin: npt.NDArray[Any]) -> F64:
    a, b = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _rms(x: npt.NDArray[Any], norm: npt.NDArray[Any]) -> F64:
    x = x.astype(np.float64)
    result: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * norm
    return result


def _layer_norm(x: F64, scale: npt.NDArray[Any], shift: npt.NDArray[Any]) -> F64:
    centred = x - x.mean(axis=-1, keepdims=True)
    result: F64 = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS) * scale + shift
    return result


def _visible(T: int, start: int, window: int | None) -> npt.NDArray[np.bool_]:
    age = np.arange(start, start + T)[:, None] - np.arange(S)
    return (age >= 0) & (age < (window or S))


def _attend(q: npt.NDArray[Any], k: npt.NDArray[Any], v: npt.NDArray[Any],
            visible: npt.NDArray[np.bool_]) -> tuple[F64, F64]:
    """(T, heads * D), and the probabilities (heads, T, keys); k, v (KV heads, keys, D)."""
    group = q.shape[1] // k.shape[0]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=0) for x in (k, v))
    scores = np.where(visible, q.astype(np.float64).swapaxes(0, 1) @ keys.swapaxes(1, 2) * D**-0.5, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return (p @ values).swapaxes(0, 1).reshape(len(q), -1), p
