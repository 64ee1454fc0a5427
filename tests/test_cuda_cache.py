"""The CUDA kernels of the cache: packing bit for bit against runtime.formats, decode attention against float64.

Two references, two budgets: what a format loses is in the decoded values that the reference attends to; what the
kernel loses on top must stay within what FP16 operands cost (tolerance below). Needs a GPU; COCKTAIL_EXAMPLES sets how
many examples each property tries, COCKTAIL_LARGE=0 leaves out long sequences (for compute-sanitizer).
"""

import os
from functools import cache

import numpy as np
import pytest
from cuda_kernels import CHUNKS, CODED, WIDTHS, configurations
from hypothesis import strategies as st
from strategies import LONG, count, seeds, spread

from kernels_cu import layout as cuda_layout
from runtime import formats
from runtime.arena import ArenaLayout
from runtime.backend import STATE_POSITION, STATE_SIZE, STATE_SLOT
from runtime.plan import DocumentShape, Tier

HEAD_DIMS = (64, 80, 96, 128, 256)
POISON = 0xA5
EXAMPLES = int(os.environ.get("COCKTAIL_EXAMPLES", "64"))
LARGE = os.environ.get("COCKTAIL_LARGE", "1") != "0"
pytestmark = pytest.mark.usefixtures("gpu", "compiled")


@pytest.fixture(scope="session")
def gpu():
    """Before anything is compiled: skips where there is no GPU."""
    return make_backend()


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
    """One layer's cache with random K and V; the arena is poisoned before anything is written."""

    def __init__(self, seed, tiers, counts, chunk, head_dim, kv_heads=1, prefix=0, suffix=1, max_new=2, window=None,
                 spread=1):
        rng = np.random.default_rng(seed)
        shape = DocumentShape(n_layers=1, n_kv_heads=kv_heads, head_dim=head_dim, chunk=chunk, n_chunks=sum(counts),
                              prefix=prefix, remainder=0, suffix=suffix, max_new=max_new, window=window)
        self.layout = shape.layout([Tier(*tier) for tier in tiers], counts)
        sizes = ArenaLayout(self.layout)
        self.spans, self.tail = [span for span in sizes.spans(0) if span.n], sizes.tail(0)
        self.tokens = self.layout.prompt_tokens
        self.k, self.v = (values(rng, (kv_heads, self.tokens + 3, head_dim), spread) for _ in "kv")
        order = rng.permutation(sum(counts))
        self.starts, at = [], 0
        for span in self.spans:
            self.starts.append((prefix + chunk * order[at : at + span.n]).astype(np.int32))
            at += span.n
        self.rng, self.gpu = rng, make_backend()
        self.arena = self.gpu.upload(np.full(sizes.nbytes, POISON, np.uint8))

    def pack(self):
        """Fill the GPU's arena; returns the number of visible tail slots."""
        k, v = self.gpu.upload(self.k), self.gpu.upload(self.v)
        for span, starts in zip(self.spans, self.starts, strict=True):
            self.gpu.pack(k, v, self.arena, span, starts, self.layout.chunk)
        context_end = self.layout.start(self.layout.n_chunks)
        rows = np.r_[: self.layout.prefix, context_end : self.tokens].astype(np.int32)
        self.gpu.copy_tail(k, v, rows, self.arena, self.tail, 0)
        return len(rows)

    def ready(self, group, q_scale=1.0):
        """q (1, H, D), the state of the newest token, which is the last row, and what bind makes of the cache."""
        visible = self.pack()
        layout = self.layout
        heads = group * layout.n_kv_heads
        state = np.zeros(STATE_SIZE, np.int32)
        state[STATE_POSITION], state[STATE_SLOT] = self.tokens - 1, visible - 1
        q = (self.rng.standard_normal((1, heads, layout.head_dim)) * q_scale).astype(np.float32)
        return q, state, self.gpu.bind(self.arena, self.spans, self.tail, heads, layout.n_kv_heads, layout.head_dim,
                                       layout.chunk, layout.window)

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
        moves the output by e p (v - out). The roundings of equal probabilities are equal: 2^-11 of the values' norm.
        """
        layout = self.layout
        D, C = layout.head_dim, layout.chunk
        k, v = self.k.astype(np.float64), self.v.astype(np.float64)
        quantized = np.zeros(k.shape[1], bool)
        for span, starts in zip(self.spans, self.starts, strict=True):
            rows = starts[:, None] + np.arange(C)
            quantized[rows] = span.k_bits < 16
            for x, source, kind, bits in ((k, self.k, "K", span.k_bits), (v, self.v, "V", span.v_bits)):
                x[:, rows] = formats.round_trip(kind, source[:, rows], bits)
        first = max(0, self.tokens - (layout.window or self.tokens))
        k, v, quantized = k[:, first : self.tokens], v[:, first : self.tokens], quantized[first : self.tokens]
        plain, turned = rounded_queries(q)
        rotated = formats.hadamard(k.astype(np.float32)) / formats.rotation_block(D)
        rotated_q = formats.hadamard(q.astype(np.float32))
        outs, allowed = [], []
        for head in range(len(q)):
            g = head * layout.n_kv_heads // len(q)
            scores = np.where(quantized, k[g] @ turned[head], k[g] @ plain[head])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out = p @ v[g]
            score_error = 2.0**-12 * D**-0.5 * max(
                np.linalg.norm(q[head] * np.abs(k[g]).max(axis=0)),
                np.linalg.norm(rotated_q[head] * np.ptp(rotated[g], axis=0)) + np.linalg.norm(
                    rotated_q[head] * np.abs(rotated[g]).max(axis=0)))
            moved = p @ np.linalg.norm(v[g] - out, axis=1)
            norms = np.linalg.norm(v[g], axis=1)
            outs.append(out)
            allowed.append(moved * np.expm1(min(score_error, 50)) + 2.0**-11 * (p @ norms))
        return np.array(outs), np.array(allowed)


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


def region(arena, codes, stride, nbytes, n, heads):
    """(n, G, nbytes): what lies in a region, chunk by chunk."""
    starts = [codes + g * stride for g in range(heads)]
    return np.stack([arena[start : start + n * nbytes].reshape(n, nbytes) for start in starts], 1)


def check_packed(sequence):
    """Every code, scale and position equals runtime.formats; no byte outside the regions changed."""
    arena = sequence.gpu.download(sequence.arena)
    layout = sequence.layout
    C, D, G = layout.chunk, layout.head_dim, layout.n_kv_heads
    touched = np.zeros(len(arena), bool)
    for span, starts in zip(sequence.spans, sequence.starts, strict=True):
        rows = starts[:, None] + np.arange(C)
        assert np.array_equal(arena[span.positions : span.positions + 4 * span.n].view(np.int32), starts)
        touched[span.positions : span.positions + 4 * span.n] = True
        for kind, x, bits, codes, codes_stride, meta, meta_stride in (
            ("K", sequence.k, span.k_bits, span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride),
            ("V", sequence.v, span.v_bits, span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride),
        ):
            x = x[:, rows].swapaxes(0, 1)  # (n, G, C, D)
            codes_bytes, meta_bytes, _ = formats.block_bytes(kind, bits, C, D)
            for g in range(G):
                touched[codes + g * codes_stride : codes + g * codes_stride + span.n * codes_bytes] = True
                touched[meta + g * meta_stride : meta + g * meta_stride + span.n * meta_bytes] = True
            stored = region(arena, codes, codes_stride, codes_bytes, span.n, G)
            if bits == 16:
                assert np.array_equal(stored.view(np.float16).reshape(x.shape).view(np.uint16), x.view(np.uint16))
                continue
            got = cuda_layout.unpack_codes(kind == "K", bits, C, D, stored)
            metadata = region(arena, meta, meta_stride, meta_bytes, span.n, G)
            if kind == "K":
                expected = formats.encode_k(x, bits)
                scales, zeros, base = cuda_layout.unpack_k_meta(D, metadata)
                assert np.array_equal(base, expected.base)
                assert np.array_equal(scales, expected.scales)
                assert np.array_equal(zeros, expected.zeros)
            else:
                expected = formats.encode_v(x, bits)
                assert np.array_equal(cuda_layout.unpack_v_meta(C, metadata), expected.scales)
            assert np.array_equal(got, expected.codes)
    tail = sequence.tail
    size = 2 * G * tail.capacity * D
    for at, nbytes in ((tail.k, size), (tail.v, size), (tail.positions, 4 * tail.capacity)):
        touched[at : at + nbytes] = True
    assert (arena[~touched] == POISON).all()


@st.composite
def sequences(draw, max_chunks):
    """A group and the arguments of a Sequence; one in eight is longer than LONG tokens."""
    head_dim, group, chunk, tiers, windowed = draw(st.sampled_from(configurations()))
    long = LARGE and draw(st.integers(0, 7)) == 5  # hypothesis draws the ends of a range too often
    counts = [draw(st.integers(1, max_chunks if LARGE else 2)) + long * -(-LONG // (chunk * len(tiers))) for _ in tiers]
    return group, {
        "seed": draw(seeds), "tiers": tiers, "counts": counts, "chunk": chunk, "head_dim": head_dim,
        "kv_heads": 1 if long else draw(st.integers(1, 3 if LARGE else 2)), "prefix": draw(st.integers(0, 40)),
        "suffix": draw(st.integers(1, 70)), "max_new": draw(st.integers(1, 300)),
        "spread": draw(st.sampled_from((0, 1, 1, 1, 2))),
        "window": draw(st.integers(1, chunk * sum(counts) + 100)) if windowed else None,
    }  # fmt: skip


@spread(sequences(max_chunks=4), examples=EXAMPLES)
def test_packing_equals_the_reference(case):
    sequence = Sequence(**case[1])
    layout = sequence.layout
    count("packing", {(kind, bits, layout.head_dim, layout.chunk) for tier in case[1]["tiers"]
                      for kind, bits in zip("KV", tier, strict=True)}, layout.prompt_tokens)
    sequence.pack()
    check_packed(sequence)


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packing_of_every_chunk_size(head_dim, bits):
    for chunk in CHUNKS:
        sequence = Sequence(bits * chunk, [(bits, bits)], [3], chunk, head_dim, kv_heads=2)
        sequence.pack()
        check_packed(sequence)


def assert_close(sequence, out, q):
    exact, allowed = sequence.reference(q)
    assert np.isfinite(out).all()
    error = np.linalg.norm(out - exact, axis=1)
    worst = (error / (allowed + 1e-30)).max()
    assert worst <= 2, f"error {error.max():.3g} is {worst:.2f} times what FP16 operands cost"


@spread(sequences(max_chunks=6), st.sampled_from((0.0, 0.3, 1.0, 4.0)), examples=EXAMPLES)
def test_attention_equals_float64_on_decoded_values(case, q_scale):
    group, arguments = case
    sequence = Sequence(**arguments)
    count("decode attention", [(*tier, arguments["head_dim"], group) for tier in arguments["tiers"]], sequence.tokens)
    outs, q = sequence.attend(group, q_scale, repeats=2)
    assert np.array_equal(outs[0], outs[1]), "two runs differ"
    assert_close(sequence, outs[0], q)


@pytest.mark.parametrize("configuration", configurations(), ids=lambda c: f"D{c.head_dim}-x{c.group}-C{c.chunk}")
def test_every_configuration(configuration):
    head_dim, group, chunk, tiers, windowed = configuration
    sequence = Sequence(group, tiers, [9, 4, 2, 1, 3][: len(tiers)], chunk, head_dim, kv_heads=2, prefix=3, suffix=9,
                        window=8 * chunk if windowed else None)
    (out,), q = sequence.attend(group)
    assert_close(sequence, out, q)


@pytest.mark.parametrize("v_bits", WIDTHS)
@pytest.mark.parametrize("k_bits", WIDTHS)
def test_every_pair_of_widths_alone(k_bits, v_bits):
    sequence = Sequence(k_bits, [(k_bits, v_bits)], [21], 32, 128, kv_heads=2, prefix=3, suffix=9)
    (out,), q = sequence.attend(4)
    assert_close(sequence, out, q)


@pytest.mark.parametrize(("group", "head_dim", "tiers", "counts", "window"), [
    (4, 128, [(3, 2), (4, 4), (16, 16)], [300, 40, 16], None),
    (8, 128, [(3, 2), (4, 4), (16, 16)], [1000, 100, 60], None),
    (3, 64, [(2, 8), (8, 3)], [150, 150], 3000),
])  # fmt: skip
def test_long_sequences(group, head_dim, tiers, counts, window):
    sequence = Sequence(1, tiers, counts, 32, head_dim, kv_heads=2, prefix=5, suffix=20, max_new=100, window=window)
    (out,), q = sequence.attend(group)
    assert_close(sequence, out, q)


@pytest.mark.parametrize("tokens", (1, 15, 16, 17, 200, 1000))
def test_a_tail_alone(tokens):
    """What lies behind the visible slots is poison: NaN as FP16."""
    sequence = Sequence(tokens, [(16, 16)], [0], 32, 128, kv_heads=2, suffix=tokens, max_new=500)
    (out,), q = sequence.attend(4)
    assert_close(sequence, out, q)


def check_batch(batch, group):
    """Every sequence gets the bits in the batch that it gets alone, and the right ones."""
    qs, states, bounds = zip(*(sequence.ready(group) for sequence in batch), strict=True)
    alone = [attend(make_backend(), *one)[0] for one in zip(qs, bounds, states, strict=True)]
    together = attend(make_backend(), np.concatenate(qs), make_backend().bind_batch(bounds), np.stack(states))
    for sequence, q, out, expected in zip(batch, qs, together, alone, strict=True):
        assert np.array_equal(out, expected), "the batch changed a sequence's output"
        assert_close(sequence, out, q[0].astype(np.float64))


@spread(sequences(max_chunks=6), st.lists(st.tuples(seeds, st.integers(1, 9), st.integers(1, 400)),
                                          max_size=15 if LARGE else 3), examples=max(EXAMPLES // 8, 1))
def test_a_batch_equals_its_sequences_alone(case, others):
    group, arguments = case
    more = [arguments | {"seed": seed, "max_new": max_new, "counts": [chunks] * len(arguments["tiers"])}
            for seed, chunks, max_new in others]
    check_batch([Sequence(**each) for each in (arguments, *more)], group)


def test_a_batch_of_other_formats_and_lengths():
    check_batch([
        Sequence(1, [(3, 2), (4, 4), (16, 16)], [300, 40, 20], 32, 128, kv_heads=2, prefix=3, suffix=9, max_new=20),
        Sequence(2, [(2, 2)], [90], 32, 128, kv_heads=2, suffix=17, max_new=300),
        Sequence(3, [(3, 2)], [0], 32, 128, kv_heads=2, prefix=5, suffix=3),
        Sequence(4, [(4, 4), (8, 16)], [10, 130], 32, 128, kv_heads=2, prefix=7, suffix=3),
    ], 4)  # fmt: skip
