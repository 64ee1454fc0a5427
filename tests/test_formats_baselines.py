"""The families kivi, atom and kvquant against a second transcription of their arithmetic, in scalar Python.

The transcription works on Python floats (float64) and rounds after every operation: for one +, -, * or / of float32
numbers, rounding the float64 result to float32 gives what float32 arithmetic gives (53 >= 2 * 24 + 2). FP16 comes from
struct. It shares no code with runtime.formats: two readings of the rules must give the same bits.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import ref
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import format_data, kinds, real_head_dims, seeds, several, values

from runtime.backend import FormatData
from runtime.formats import FAMILIES, WIDTHS, atom, block_bytes, kivi, kvquant, round_trip, turn, turn_back

Row = list[float]
FAMILY = st.sampled_from([(family, bits) for family in FAMILIES[1:] for bits in WIDTHS[family]])
CHUNKS = st.sampled_from((8, 16, 32))
HEAD_DIMS = st.one_of(st.sampled_from((8, 16, 40)), real_head_dims)


# The transcription ---------------------------------------------------------------------------------------------------

def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def f16(x: float) -> float:
    return struct.unpack("e", struct.pack("e", x))[0]


def nearest(x: float) -> float:
    """rint: halves to the even integer, as Python's round."""
    return float(round(x))


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def kivi_group(xs: Row, bits: int) -> tuple[Row, float, float]:
    """Codes, scale and zero of the values that share them."""
    top = 2.0**bits - 1
    low, high = min(xs), max(xs)
    scale = f16(f32(f32(high - low) / top))
    codes = [clamp(nearest(f32(f32(x - low) / scale)), 0, top) if scale else 0.0 for x in xs]
    return codes, scale, low


def atom_token(xs: Row) -> tuple[Row, float, float]:
    low, high = min(xs), max(xs)
    s = f16(f32(max(f32(high - low), f32(1e-5)) / 15))
    z = clamp(nearest(f32(-low / s)), 0, 15)
    return [clamp(f32(nearest(f32(x / s)) + z), 0, 15) for x in xs], s, z


def level_of(y: float, levels: Row) -> int:
    return sum(1 for a, b in pairwise(levels) if f32(f32(a + b) * 0.5) < y)


def normal(x: float, centre: float, half: float) -> float:
    return f32(f32(x - centre) / half) if half else 0.0


def kept(outliers: list[tuple[int, float]], room: int) -> tuple[int, int, Row, Row]:
    stored = [(i, f16(clamp(x, -65504, 65504))) for i, x in outliers[:room]]
    pad = [0.0] * (room - len(stored))
    return len(stored), len(outliers) - len(stored), [i for i, _ in stored] + pad, [x for _, x in stored] + pad


def before_rope(row: Row, cos: Row, sin: Row) -> Row:
    n = len(cos)
    first = [f32(f32(row[i] * cos[i]) + f32(row[n + i] * sin[i])) for i in range(n)]
    return first + [f32(f32(row[n + i] * cos[i]) - f32(row[i] * sin[i])) for i in range(n)]


def after_rope(row: Row, cos: Row, sin: Row) -> Row:
    n = len(cos)
    first = [f32(f32(row[i] * cos[i]) - f32(row[n + i] * sin[i])) for i in range(n)]
    return first + [f32(f32(row[n + i] * cos[i]) + f32(row[i] * sin[i])) for i in range(n)]


def case(kind: str, seed: int, chunk: int, dim: int, heads: int = 2) -> tuple[Any, FormatData]:
    """x (1, G, C, D) f16 and its tables."""
    return values(kind, seed, (1, heads, chunk, dim)), format_data(seed, chunk, heads, dim)


# Equality ------------------------------------------------------------------------------------------------------------

@several
@given(bits=st.sampled_from(WIDTHS["kivi"]), chunk=CHUNKS, dim=HEAD_DIMS, kind=kinds, seed=seeds)
@example(bits=2, chunk=8, dim=80, kind="largest", seed=0)
@example(bits=8, chunk=8, dim=256, kind="denormals", seed=0)
@example(bits=4, chunk=32, dim=96, kind="constant", seed=0)
def test_kivi_equals_its_transcription(bits: int, chunk: int, dim: int, kind: str, seed: int) -> None:
    x = values(kind, seed, (chunk, dim))
    k, v = kivi.encode_k(x, bits), kivi.encode_v(x, bits)
    k_values, v_values = kivi.decode_k(k), kivi.decode_v(v)
    for d in range(dim):
        codes, scale, zero = kivi_group([float(y) for y in x[:, d]], bits)
        assert k.codes[:, d].tolist() == codes and (k.scales[d], k.zeros[d]) == (scale, zero)
        assert k_values[:, d].tolist() == [f32(f32(code * scale) + zero) for code in codes]
    assert v.scales.shape == v.zeros.shape == (chunk, -(-dim // 32))
    for t in range(chunk):
        for group, begin in enumerate(range(0, dim, 32)):
            part = slice(begin, begin + 32)
            codes, scale, zero = kivi_group([float(y) for y in x[t, part]], bits)
            assert v.codes[t, part].tolist() == codes and (v.scales[t, group], v.zeros[t, group]) == (scale, zero)
            assert v_values[t, part].tolist() == [f32(f32(code * scale) + zero) for code in codes]
    assert not np.signbit(k.zeros[k.zeros == 0]).any() and not np.signbit(v.zeros[v.zeros == 0]).any()


@several
@given(chunk=CHUNKS, dim=HEAD_DIMS, kind=kinds, seed=seeds, before=st.booleans())
@example(chunk=8, dim=80, kind="constant", seed=0, before=True)
@example(chunk=8, dim=256, kind="largest", seed=0, before=True)
@example(chunk=8, dim=64, kind="zeros", seed=0, before=False)
def test_atom_equals_its_transcription(chunk: int, dim: int, kind: str, seed: int, before: bool) -> None:
    x, data = case(kind, seed, chunk, dim, 1)
    source = turn_back(x, data.cos, data.sin)[0, 0] if before else x[0, 0]
    encoded = atom.encode(source)
    decoded = atom.decode(encoded)
    for t in range(chunk):
        row = [float(y) for y in x[0, 0, t]]
        codes, s, z = atom_token(before_rope(row, data.cos[t].tolist(), data.sin[t].tolist()) if before else row)
        assert encoded.codes[t].tolist() == codes
        assert (encoded.scales[t], encoded.zeros[t]) == (s, z) and not np.signbit(encoded.zeros[t])
        assert decoded[t].tolist() == [f32((code - z) * s) for code in codes]


@several
@given(bits=st.sampled_from(WIDTHS["kvquant"]), chunk=CHUNKS, dim=HEAD_DIMS, kind=kinds, seed=seeds)
@example(bits=4, chunk=8, dim=80, kind="largest", seed=1)
@example(bits=3, chunk=32, dim=64, kind="outliers", seed=1)
@example(bits=2, chunk=8, dim=128, kind="zeros", seed=1)
def test_kvquant_equals_its_transcription(bits: int, chunk: int, dim: int, kind: str, seed: int) -> None:
    heads, (x, data) = 2, case(kind, seed, chunk, dim)
    room = -(-chunk * dim // 80)
    levels = kvquant.levels_of(data.k_levels, bits)
    offset = sum(2**b for b in range(2, bits))
    assert levels.tolist() == data.k_levels[offset : offset + 2**bits].tolist()
    before = turn_back(x, data.cos, data.sin)
    k = kvquant.encode_k(before, bits, levels, data.k_centre, data.k_half)
    decoded = kvquant.decode_k(k, levels, data.k_centre, data.k_half)
    for g in range(heads):
        outliers: list[tuple[int, float]] = []
        expected: Row = []
        for t in range(chunk):
            row = before_rope([float(y) for y in x[0, g, t]], data.cos[t].tolist(), data.sin[t].tolist())
            for d, value in enumerate(row):
                centre, half = float(data.k_centre[g, d]), float(data.k_half[g, d])
                y = normal(value, centre, half)
                code = level_of(y, levels.tolist())
                assert k.codes[0, g, t, d] == code
                expected.append(f32(f32(float(levels[code]) * half) + centre))
                if abs(y) > 1:
                    outliers.append((t * dim + d, value))
        check_store(k.sparse, (0, g), outliers, room)
        check_values(decoded[0, g], expected, outliers, room)

    levels = kvquant.levels_of(data.v_levels, bits)
    v = kvquant.encode_v(x, bits, levels)
    decoded = kvquant.decode_v(v, levels)
    found: list[list[tuple[int, float]]] = [[] for _ in range(heads)]
    expected_v: list[Row] = [[] for _ in range(heads)]
    for t in range(chunk):
        ordered = sorted(float(y) for g in range(heads) for y in x[0, g, t])
        k_th = max(1, int(len(ordered) / 200 + 0.5))
        lo, hi = ordered[k_th], ordered[-1 - k_th]
        centre, half = f16(f32(hi + lo) * 0.5), f16(f32(hi - lo) * 0.5)
        assert (v.centre[0, t], v.half[0, t]) == (centre, half)
        for g in range(heads):
            for d in range(dim):
                value = float(x[0, g, t, d])
                code = level_of(normal(value, centre, half), levels.tolist())
                assert v.codes[0, g, t, d] == code
                expected_v[g].append(f32(f32(float(levels[code]) * half) + centre))
                if value > hi or value < lo:
                    found[g].append((t * dim + d, value))
    for g in range(heads):
        check_store(v.sparse, (0, g), found[g], room)
        check_values(decoded[0, g], expected_v[g], found[g], room)


def check_store(sparse: kvquant.Sparse, at: tuple[int, int], outliers: list[tuple[int, float]], room: int) -> None:
    n, overflowed, index, stored = kept(outliers, room)
    assert (sparse.kept[at], sparse.overflowed[at]) == (n, overflowed)
    assert sparse.index[at].tolist() == index and sparse.values[at].tolist() == stored


def check_values(decoded: Any, expected: Row, outliers: list[tuple[int, float]], room: int) -> None:
    for i, x in outliers[:room]:
        expected[i] = f16(clamp(x, -65504, 65504))
    assert decoded.ravel().tolist() == expected


@several
@given(dim=HEAD_DIMS, kind=kinds, seed=seeds)
def test_rope_is_turned_back_and_forth(dim: int, kind: str, seed: int) -> None:
    x, data = case(kind, seed, 8, dim, 1)
    before = turn_back(x, data.cos, data.sin)
    after = turn(before, data.cos, data.sin)
    for t in range(8):
        row, cos, sin = [float(y) for y in x[0, 0, t]], data.cos[t].tolist(), data.sin[t].tolist()
        assert before[0, 0, t].tolist() == before_rope(row, cos, sin)
        assert after[0, 0, t].tolist() == after_rope(before_rope(row, cos, sin), cos, sin)
    assert np.abs(after - x.astype(np.float64)).max() <= 4e-7 * np.abs(x.astype(np.float64)).max()


# Properties ----------------------------------------------------------------------------------------------------------

@several
@given(family=FAMILY, which=st.sampled_from(("K", "V")), dim=HEAD_DIMS, kind=kinds, seed=seeds)
def test_a_chunk_is_self_contained_and_finite(family: tuple[str, int], which: Any, dim: int, kind: str,
                                              seed: int) -> None:
    name, bits = family
    x, data = values(kind, seed, (3, 2, 8, dim)), format_data(seed, 24, 2, dim)
    positions = np.arange(24).reshape(3, 8)
    together = round_trip(which, x, bits, name, positions, data)
    assert together.dtype == np.float32 and np.isfinite(together).all()
    for n in range(3):
        alone = round_trip(which, x[n : n + 1], bits, name, positions[n : n + 1], data)
        assert alone.tobytes() == together[n : n + 1].tobytes()


@several
@given(family=FAMILY, which=st.sampled_from(("K", "V")), dim=HEAD_DIMS, kind=kinds, seed=seeds)
def test_the_float64_reference_of_attention_reads_the_same_values(family: tuple[str, int], which: Any, dim: int,
                                                                  kind: str, seed: int) -> None:
    """tests/ref.py, against which kernels are measured, up to the float32 roundings of a decode."""
    name, bits = family
    x, data = values(kind, seed, (3, 2, 8, dim)), format_data(seed, 24, 2, dim)
    positions = np.arange(24).reshape(3, 8)
    stored = ref.stored(which, x, bits, name, positions, data)
    decoded = round_trip(which, x, bits, name, positions, data).swapaxes(0, 1).reshape(2, 24, dim)
    assert (np.abs(stored.values.numpy() - decoded) <= 4 * ref.U * stored.magnitude.numpy()).all()
    assert (np.abs(stored.values.numpy()) <= (1 + 1e-12) * stored.magnitude.numpy()).all() and not stored.rotated


@several
@given(bits=st.sampled_from(WIDTHS["kivi"]), which=st.sampled_from(("K", "V")), dim=HEAD_DIMS, kind=kinds, seed=seeds)
def test_kivi_errs_by_half_a_step(bits: int, which: Any, dim: int, kind: str, seed: int) -> None:
    """Of the group's range, and what rounding the scale to FP16 adds: 2^-11 of each of up to 2^b - 1 steps, or a
    subnormal's half unit."""
    x = values(kind, seed, (8, dim)).astype(np.float64)
    error = np.abs(round_trip(which, x.astype(np.float16), bits, "kivi") - x)
    groups = [(slice(None), slice(d, d + 1)) for d in range(dim)] if which == "K" else [
        (slice(t, t + 1), slice(d, d + 32)) for t in range(8) for d in range(0, dim, 32)]
    for group in groups:
        top, spread = 2**bits - 1, np.ptp(x[group])
        allowed = spread / top * (0.5 + top * 2.0**-11) + top * 2.0**-25
        assert error[group].max() <= 1.001 * allowed + 1e-6 * np.abs(x[group]).max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["K", "V"])
def test_more_bits_are_more_accurate(which: Any, family: str) -> None:
    x = values("normal", 0, (16, 2, 32, 64))
    n, data = np.arange(16 * 32).reshape(16, 32), format_data(3, 512, 2, 64)
    levels = np.concatenate([np.linspace(-1, 1, 2**bits, dtype=np.float32) for bits in (2, 3, 4)])
    centre, half = np.zeros((2, 64), np.float32), np.full((2, 64), 2.6, np.float32)
    data = FormatData(data.cos, data.sin, levels, levels, centre, half)
    errors = [np.square(round_trip(which, x, bits, family, n, data) - x.astype(np.float64)).mean()
              for bits in (*WIDTHS[family], 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert errors[WIDTHS[family].index(4)] < 0.03


def test_what_overflows_the_sparse_store_is_counted_and_read_as_its_code() -> None:
    chunk, dim, room = 32, 64, 26
    levels = np.linspace(-1, 1, 16, dtype=np.float32)
    x = np.zeros((1, chunk, dim), np.float32)
    x.reshape(-1)[: room + 5] = 100
    centre, half = np.zeros((1, dim), np.float32), np.ones((1, dim), np.float32)
    encoded = kvquant.encode_k(x, 4, levels, centre, half)
    assert (encoded.sparse.kept, encoded.sparse.overflowed) == ([room], [5])
    decoded = kvquant.decode_k(encoded, levels, centre, half).reshape(-1)
    assert (decoded[:room] == 100).all() and (decoded[room : room + 5] == 1).all()


def test_block_bytes_counts_what_is_stored() -> None:
    for family in FAMILIES[1:]:
        for bits in WIDTHS[family]:
            for chunk, dim in ((32, 64), (8, 8), (24, 80), (256, 256), (40, 72)):
                x = np.zeros((1, 1, chunk, dim), np.float16)
                k, v = (block_bytes(kind, bits, chunk, dim, family) for kind in ("K", "V"))
                assert k.codes == chunk * 4 * -(-dim * bits // 32) and v.codes == dim * 4 * -(-chunk * bits // 32)
                if family == "kivi":
                    stored = [(e.scales.nbytes + e.zeros.nbytes, 0) for e in (kivi.encode_k(x, bits),
                                                                             kivi.encode_v(x, bits))]
                elif family == "atom":
                    e = atom.encode(x)
                    stored = [(e.scales.nbytes + e.zeros.nbytes, 0)] * 2
                else:
                    ones = np.ones((1, dim), np.float32)
                    levels = np.linspace(-1, 1, 2**bits, dtype=np.float32)
                    s = kvquant.encode_k(x.astype(np.float32), bits, levels, ones, ones).sparse
                    e = kvquant.encode_v(x, bits, levels)
                    stored = [(sum(a.nbytes for a in vars(s).values()), 0),
                              (sum(a.nbytes for a in vars(e.sparse).values()), e.centre.nbytes + e.half.nbytes)]
                assert [(k.meta, k.shared), (v.meta, v.shared)] == stored
        assert block_bytes("K", 16, 32, 64, family) == (4096, 0, 0)
        assert block_bytes("V", 0, 32, 64, family) == (0, 0, 0)
    with pytest.raises(ValueError, match="no atom format of 2 bits"):
        block_bytes("V", 2, 32, 64, "atom")
    with pytest.raises(ValueError, match="no kvquant format of 8 bits"):
        block_bytes("K", 8, 32, 64, "kvquant")
