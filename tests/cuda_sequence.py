"""One layer's cache on the GPU with random K and V, and attention in float64 over what it decodes to."""

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest

from runtime import formats
from runtime.arena import ArenaLayout
from runtime.backend import STATE_FLUSHED, STATE_POSITION, STATE_SIZE, STATE_SLOT, FormatData
from runtime.plan import DocumentShape, Tier

POISON = 0xA5


@cache
def make_backend():
    """The CUDA backend; the tests are skipped where there is none."""
    pytest.importorskip("cupy", reason="CuPy is not installed, so CUDA kernels cannot run")
    from kernels_cu.backend import CudaBackend
    from kernels_cu.errors import KernelError

    try:
        return CudaBackend()
    except KernelError as error:
        pytest.skip(f"no GPU to run CUDA kernels on: {error}")


def values(rng, shape, spread):
    """FP16 values as keys have them: some channels large, some offset; spread 0 gives constants, 2 extremes."""
    if spread == 0:
        return np.full(shape, rng.choice([0.0, 1.0, -3.25, 6e-8, 1e4]), np.float16)
    scale, offset = np.exp(rng.standard_normal(shape[-1]) * spread), rng.standard_normal(shape[-1]) * spread
    x = rng.standard_normal(shape) * scale + offset
    if spread == 2:
        x *= 10.0 ** rng.uniform(-5, 3)
        x[rng.random(shape) < 0.01] *= 50
    return np.clip(x, -65504, 65504).astype(np.float16)


class Sequence:
    """One layer's cache with random K and V; the arena is poisoned before anything is written.

    flush: None, or how many tokens of the tail stay FP16; half of what it gives up is packed from the prompt's rows and
    half from the tail, as a prefill and a decode loop do. spans, starts: those of what it gave up come last.
    """

    def __init__(self, seed, tiers, counts, chunk, head_dim, kv_heads=1, prefix=0, suffix=1, max_new=2, window=None,
                 spread=1, family="rotated", flush=None):
        rng = np.random.default_rng(seed)
        shape = DocumentShape(n_layers=1, n_kv_heads=kv_heads, head_dim=head_dim, chunk=chunk, n_chunks=sum(counts),
                              prefix=prefix, remainder=0, suffix=suffix, max_new=max_new, window=window)
        self.layout = shape.layout([Tier(*tier) for tier in tiers], counts, family, flush)
        sizes = ArenaLayout(self.layout)
        self.spans, self.tail = [span for span in sizes.spans(0) if span.n], sizes.tail(0)
        self.tokens, self.context_end = self.layout.prompt_tokens, self.layout.start(self.layout.n_chunks)
        self.k, self.v = (values(rng, (kv_heads, self.tokens + 3, head_dim), spread) for _ in "kv")
        order = rng.permutation(sum(counts))
        self.starts, at = [], 0
        for span in self.spans:
            self.starts.append((prefix + chunk * order[at : at + span.n]).astype(np.int32))
            at += span.n
        self.flushed, self.n_flushed, self.n_context = sizes.flushed(0), self.layout.flushed(0), len(self.spans)
        for first, n in ((0, self.n_flushed // 2), (self.n_flushed // 2, self.n_flushed - self.n_flushed // 2)):
            if n:
                self.spans.append(sizes.part(self.flushed, first, n))
                self.starts.append((self.context_end + chunk * (first + np.arange(n))).astype(np.int32))
        self.rng, self.gpu = rng, make_backend()
        self.data = self.tables(rng) if family in formats.PRE_ROPE else None
        self.arena = self.gpu.upload(np.full(sizes.nbytes, POISON, np.uint8))

    def tables(self, rng):
        frequencies = np.float32(1e4) ** (-2 * np.arange(self.layout.head_dim // 2, dtype=np.float32)
                                          / np.float32(self.layout.head_dim))
        angles = np.arange(len(self.k[0]), dtype=np.float32)[:, None] * frequencies
        data = FormatData(cos=np.cos(angles), sin=np.sin(angles))
        if self.layout.formats == "atom":
            return data
        before = formats.turn_back(self.k, data.cos[: len(self.k[0])], data.sin[: len(self.k[0])])
        low, high = np.percentile(before, (0.5, 99.5), axis=1).astype(np.float32)
        levels = [np.concatenate([np.sort(rng.uniform(-1, 1, 2**bits)) for bits in (2, 3, 4)]).astype(np.float32)
                  for _ in "kv"]
        return replace(data, k_levels=levels[0], v_levels=levels[1], k_centre=(low + high) / 2, k_half=(high - low) / 2)

    def device_data(self):
        """The same on the GPU."""
        if self.data is None:
            return None
        arrays = {field.name: getattr(self.data, field.name) for field in fields(FormatData)}
        return FormatData(**{name: None if x is None else self.gpu.upload(x) for name, x in arrays.items()})

    def pack(self):
        """Fill the GPU's arena; returns the number of visible tail slots."""
        k, v, data, layout = self.gpu.upload(self.k), self.gpu.upload(self.v), self.device_data(), self.layout
        for span, starts in zip(self.spans[: self.n_context + 1], self.starts, strict=False):
            self.gpu.pack(k, v, self.arena, span, starts, layout.chunk, data=data)
        rows = np.r_[: layout.prefix, self.context_end : self.tokens].astype(np.int32)
        self.gpu.copy_tail(k, v, rows, self.arena, self.tail, 0)
        for span, positions in zip(self.spans[self.n_context + 1 :], self.starts[self.n_context + 1 :], strict=True):
            shape = layout.n_kv_heads, layout.tail_capacity, layout.head_dim
            k, v = (self.arena[at : at + 2 * np.prod(shape)].view(np.float16).reshape(shape)
                    for at in (self.tail.k, self.tail.v))
            self.gpu.pack(k, v, self.arena, span, positions - np.int32(self.context_end - layout.prefix), layout.chunk,
                          positions, data)
        return len(rows)

    def ready(self, group, q_scale=1.0):
        """q (1, H, D), the state of the newest token, which is the last row, and what bind makes of the cache."""
        visible = self.pack()
        layout = self.layout
        heads = group * layout.n_kv_heads
        state = np.zeros(STATE_SIZE, np.int32)
        state[STATE_POSITION], state[STATE_SLOT], state[STATE_FLUSHED] = self.tokens - 1, visible - 1, self.n_flushed
        q = (self.rng.standard_normal((1, heads, layout.head_dim)) * q_scale).astype(np.float32)
        return q, state, self.gpu.bind(self.arena, self.spans[: self.n_context], self.tail, heads, layout.n_kv_heads,
                                       layout.head_dim, layout.chunk, layout.window, self.flushed, self.device_data())

    def attend(self, group, q_scale=1.0, repeats=1):
        """Outputs (H, D) of the GPU, one per repeat, and the queries (H, D)."""
        q, state, bound = self.ready(group, q_scale)
        outs = [attend(self.gpu, q, bound, state)[0] for _ in range(repeats)]
        return outs, q[0].astype(np.float64)

    def reference(self, q):
        """Attention in float64 over decoded values, (H, D), and what a kernel with FP16 operands may be off by, (H,).

        The query is what such a kernel makes of it: rounded to 11 bits, after the rotation where K is quantized. (Where
        keys are equal so are the errors of their scores, and keys of 1e4 at FP16 beside quantized ones move the output
        by more than all other roundings.) On top of that it rounds q times a scale, K's decoded values or the like, and
        the probabilities to 11 bits. The roundings of one score are independent: its error is about 2^-12 |q o k| /
        sqrt(D), where for codes, which are not centred, k is as large as the channel's range. An error e of a score
        moves the output by e p (v - out). The roundings of equal probabilities are equal: 2^-11 of the values' norm,
        kivi's zeros and codes each, kvquant's centres and what its levels stand for.

        Before RoPE the query is not rounded, but turned and then rounded, and K's pairs of channels meet a rounded
        cosine or sine, a product and a sum: five roundings of what q and K are as pairs. The angles of the tables,
        float32 numbers up to the position, are off by 2^-25 of themselves, those of p, of p + j and of j. kvquant's
        levels, half ranges, centres and decoded values are rounded too, of V as of K.
        """
        layout = self.layout
        D, C = layout.head_dim, layout.chunk
        k, v = self.k.astype(np.float64), self.v.astype(np.float64)
        zeros = np.zeros(v.shape)
        quantized = np.zeros(k.shape[1], bool)
        for span, starts in zip(self.spans, self.starts, strict=True):
            rows = starts[:, None] + np.arange(C)
            quantized[rows] = span.k_bits < 16
            for x, source, kind, bits in ((k, self.k, "K", span.k_bits), (v, self.v, "V", span.v_bits)):
                chunks = source[:, rows].swapaxes(0, 1)
                x[:, rows] = formats.round_trip(kind, chunks, bits, layout.formats, rows, self.data).swapaxes(0, 1)
            if layout.formats == "kivi" and span.v_bits < 16:
                stored = formats.kivi.encode_v(self.v[:, rows], span.v_bits).zeros.astype(np.float64)
                zeros[:, rows] = stored[..., np.arange(D) // formats.kivi.GROUP]
            if layout.formats == "kvquant" and span.v_bits < 16:
                levels = formats.kvquant.levels_of(self.data.v_levels, span.v_bits)
                zeros[:, rows] = formats.kvquant.encode_v(chunks, span.v_bits, levels).centre[..., None]
        first = max(0, self.tokens - (layout.window or self.tokens))
        k, v, zeros, quantized = (x[..., first : self.tokens, :] if x.ndim > 1 else x[first : self.tokens]
                                  for x in (k, v, zeros, quantized))
        outs, allowed = [], []
        plain, turned = rounded_queries(q)
        if layout.formats != "rotated":
            turned = q / np.sqrt(D) if self.data else plain
        for head in range(len(q)):
            g = head * layout.n_kv_heads // len(q)
            scores = np.where(quantized, k[g] @ turned[head], k[g] @ plain[head])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out = p @ v[g]
            score_error = 2.0**-12 * D**-0.5 * self.score_sizes(q[head], k[g])
            moved = p @ np.linalg.norm(v[g] - out, axis=1)
            norms = np.linalg.norm(np.abs(zeros[g]) + np.abs(v[g] - zeros[g]), axis=1)
            outs.append(out)
            allowed.append(moved * np.expm1(min(score_error, 50))
                           + 2.0 ** (-10 if layout.formats == "kvquant" else -11) * (p @ norms))
        return np.array(outs), np.array(allowed)

    def score_sizes(self, q, k):
        """What 2^-12 / sqrt(D) is to be multiplied by, of q (D,) and visible keys k (T, D)."""
        D = self.layout.head_dim
        plain = np.linalg.norm(q * np.abs(k).max(axis=0))
        if self.data is not None:
            pairs = np.hypot(q[: D // 2], q[D // 2 :]) * np.hypot(k[:, : D // 2], k[:, D // 2 :]).max(axis=0)
            angles = 3 * 2.0**-13 * self.tokens * np.float64(1e4) ** (-2 * np.arange(D // 2) / D)
            return np.linalg.norm(pairs * (np.sqrt(9 if self.layout.formats == "kvquant" else 5) + angles))
        if self.layout.formats == "rotated":
            k = formats.hadamard(k.astype(np.float32)) / formats.rotation_block(D)
            q = formats.hadamard(q.astype(np.float32))
        return max(plain, np.linalg.norm(q * np.ptp(k, axis=0)) + np.linalg.norm(q * np.abs(k).max(axis=0)))


def rounded_queries(q):
    """q / sqrt(D) (H, D) rounded to FP16 as it is, and rounded between H and its inverse; scaled by a power of two per
    head, so that the largest value lies from 16 to 32, and in base 2, for that decides which values are rounded how."""
    to_base_2 = np.float32(1.44269504) / np.sqrt(np.float32(q.shape[-1]))

    def rounded(x):
        unit = 2.0 ** (np.maximum(np.frexp(np.abs(x).max(axis=-1, keepdims=True))[1] - 1, -100) - 4)
        return (x / unit).astype(np.float16).astype(np.float64) * unit / np.log2(np.e)

    scaled = q.astype(np.float32) * to_base_2
    turned = rounded(formats.hadamard(scaled))
    return rounded(scaled), formats.hadamard(turned).astype(np.float64) / formats.rotation_block(q.shape[-1])


def attend(gpu, q, bound, state):
    """Decode attention of q (B, H, D), as (B, H, D); NaN where nothing was written."""
    out = gpu.upload(np.full((len(q), q[0].size), np.nan, np.float32))
    gpu.decode_attention(gpu.upload(q), bound, gpu.upload(state), out)
    return gpu.download(out).reshape(q.shape)
