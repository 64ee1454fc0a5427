"""The CUDA kernels of the cache: packing bit for bit against runtime.formats, decode attention against float64.

Two references, two budgets: what a format loses is in the decoded values that the reference attends to; what the
kernel loses on top must stay within what FP16 operands cost (cuda_sequence.py). Needs a GPU; COCKTAIL_EXAMPLES sets how
many examples each property tries, COCKTAIL_LARGE=0 leaves out long sequences (for compute-sanitizer).
"""

import os

import numpy as np
import pytest
from cuda_kernels import BASELINES, CHUNKS, CODED, WIDTHS, configurations
from cuda_sequence import POISON, Sequence, attend, make_backend
from hypothesis import strategies as st
from strategies import LONG, count, seeds, spread

from kernels_cu import layout as cuda_layout
from runtime import formats

HEAD_DIMS = (64, 80, 96, 128, 256)
FAMILIES = ("rotated", *BASELINES)
EXAMPLES = int(os.environ.get("COCKTAIL_EXAMPLES", "64"))
LARGE = os.environ.get("COCKTAIL_LARGE", "1") != "0"
pytestmark = pytest.mark.usefixtures("gpu", "compiled")


@pytest.fixture(scope="session")
def gpu():
    """Before anything is compiled: skips where there is no GPU."""
    return make_backend()


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
            codes_bytes, meta_bytes, _ = formats.block_bytes(kind, bits, C, D, layout.formats)
            for g in range(G):
                touched[codes + g * codes_stride : codes + g * codes_stride + span.n * codes_bytes] = True
                touched[meta + g * meta_stride : meta + g * meta_stride + span.n * meta_bytes] = True
            stored = region(arena, codes, codes_stride, codes_bytes, span.n, G)
            if bits == 16:
                assert np.array_equal(stored.view(np.float16).reshape(x.shape).view(np.uint16), x.view(np.uint16))
                continue
            got = cuda_layout.unpack_codes(kind == "K", bits, C, D, stored, layout.formats)
            metadata = region(arena, meta, meta_stride, meta_bytes, span.n, G)
            if layout.formats != "rotated":
                shared = None
                if layout.formats == "kvquant" and kind == "V":
                    shared = arena[span.v_shared : span.v_shared + 4 * C * span.n].reshape(-1, 4 * C)
                    touched[span.v_shared : span.v_shared + 4 * C * span.n] = True
                check_family(kind, bits, x, rows, sequence, got, metadata, shared)
                continue
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


def check_family(kind, bits, x, rows, sequence, codes, metadata, shared):
    """The stored codes and metadata (n, G, ...) of x (n, G, C, D), and what V's heads share in kvquant, equal the
    reference's, to the sign of zeros."""
    C, D = x.shape[-2:]
    if sequence.layout.formats == "kvquant":
        check_kvquant(kind, bits, x, rows, sequence.data, codes, metadata, shared)
        return
    if sequence.layout.formats == "kivi":
        expected = formats.kivi.encode_k(x, bits) if kind == "K" else formats.kivi.encode_v(x, bits)
        scales, zeros = cuda_layout.unpack_kivi_meta(kind == "K", C, D, metadata)
    else:
        cos, sin = (table[rows][:, None] for table in (sequence.data.cos, sequence.data.sin))
        expected = formats.atom.encode(formats.turn_back(x, cos, sin) if kind == "K" else x)
        scales, zeros = cuda_layout.unpack_atom_meta(kind == "K", C, metadata)
    assert np.array_equal(scales.view(np.uint16), expected.scales.view(np.uint16))
    assert np.array_equal(zeros.view(np.uint16), expected.zeros.view(np.uint16))
    assert np.array_equal(codes, expected.codes)


def check_kvquant(kind, bits, x, rows, data, codes, metadata, shared):
    kvquant = formats.kvquant
    if kind == "K":
        before = formats.turn_back(x, data.cos[rows][:, None], data.sin[rows][:, None])
        levels = kvquant.levels_of(data.k_levels, bits)
        expected = kvquant.encode_k(before, bits, levels, data.k_centre, data.k_half)
    else:
        expected = kvquant.encode_v(x, bits, kvquant.levels_of(data.v_levels, bits))
        centre, half = cuda_layout.unpack_ranges(x.shape[-2], shared)
        assert np.array_equal(centre.view(np.uint16), expected.centre.view(np.uint16))
        assert np.array_equal(half.view(np.uint16), expected.half.view(np.uint16))
    assert np.array_equal(codes, expected.codes)
    kept, sparse = np.ascontiguousarray(metadata).view(np.uint16), expected.sparse
    assert np.array_equal(kept[..., 0], sparse.kept)
    assert np.array_equal(kept[..., 1], sparse.overflowed)
    assert np.array_equal(kept[..., 2::2], sparse.index)
    assert np.array_equal(kept[..., 3::2], sparse.values.view(np.uint16))


@st.composite
def sequences(draw, max_chunks):
    """A group and the arguments of a Sequence; one in eight is longer than LONG tokens."""
    head_dim, group, chunk, tiers, windowed, family, flush = draw(
        st.one_of(*(st.sampled_from([c for c in configurations() if c.family == family]) for family in FAMILIES)))
    long = LARGE and draw(st.integers(0, 7)) == 5  # hypothesis draws the ends of a range too often
    counts = [draw(st.integers(1, max_chunks if LARGE else 2)) + long * -(-LONG // (chunk * len(tiers))) for _ in tiers]
    return group, {
        "seed": draw(seeds), "tiers": tiers, "counts": counts, "chunk": chunk, "head_dim": head_dim,
        "kv_heads": 1 if long else draw(st.integers(1, 3 if LARGE else 2)), "prefix": draw(st.integers(0, 40)),
        "suffix": draw(st.integers(1, 70)), "max_new": draw(st.integers(1, 300)),
        "spread": draw(st.sampled_from((0, 1, 1, 1, 2))),
        "window": draw(st.integers(1, chunk * sum(counts) + 100)) if windowed else None,
        "family": family, "flush": draw(st.integers(0, 60)) if flush else None,
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


@pytest.mark.parametrize("configuration", configurations(),
                         ids=lambda c: f"{c.family}-D{c.head_dim}-x{c.group}-C{c.chunk}")
def test_every_configuration(configuration):
    head_dim, group, chunk, tiers, windowed, family, flush = configuration
    sequence = Sequence(group, tiers, [9, 4, 2, 1, 3][: len(tiers)], chunk, head_dim, kv_heads=2, prefix=3, suffix=90,
                        window=8 * chunk if windowed else None, family=family, flush=40 if flush else None)
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
