"""runtime.formats against a second transcription of its rules in scalar loops, and the properties others rely on.

The transcription below is written from the rules (module docstring of runtime.formats), one float32 operation at a
time, and shares no code with it: two readings of the rules must give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import KINDS, head_dims, kinds, seeds, several, values

from runtime import formats
from runtime.formats import Kind

F = np.float32
ZERO, ONE = F(0), F(1)
Row = list[np.float32]

quantized = st.sampled_from((2, 3, 4, 8))
small_chunks = st.sampled_from((8, 16, 24, 32))
k_or_v = st.sampled_from(("K", "V"))


# The transcription ---------------------------------------------------------------------------------------------------

def rotated(row: Row) -> Row:
    """H row / b, block by block, by the butterflies' definition."""
    block = 1
    while len(row) % (2 * block) == 0:
        block *= 2
    out = list(row)
    distance = 1
    while distance < block:
        for i in range(len(row)):
            if not i & distance:  # the partner of i in its block is i + distance
                out[i], out[i + distance] = out[i] + out[i + distance], out[i] - out[i + distance]
        distance *= 2
    return [x * (ONE / F(block)) for x in out]


def up_to_bf16(x: np.float32) -> np.float32:
    """By search: BF16 values are the float32 values whose low 16 bits are zero."""
    low = F(np.array(int(x.view(np.uint32)) >> 16 << 16, np.uint32).view(np.float32))
    return low if low >= x else F(np.array((int(x.view(np.uint32)) >> 16) + 1 << 16, np.uint32).view(np.float32))


def limited(x: np.float32, low: np.float32, high: np.float32) -> np.float32:
    return low if x < low else high if x > high else x


def total(xs: Row) -> np.float32:
    sum_ = xs[0]
    for x in xs[1:]:
        sum_ = sum_ + x
    return sum_


def tree_total(xs: Row) -> np.float32:
    n = 1
    while n < len(xs):
        n *= 2
    xs = xs + [ZERO] * (n - len(xs))
    return xs[0] if n == 1 else tree_total([xs[i] + xs[i + n // 2] for i in range(n // 2)])


def k_code(y: np.float32, scale: np.float32, zero: np.float32, top: np.float32) -> np.float32:
    inverse = ONE / scale if scale > 0 else ZERO
    return limited(np.rint((y - zero) * inverse), ZERO, top)


def k_line(ys: Row, bits: int) -> tuple[np.float32, np.float32]:
    """Scale and zero of one channel before they become 8-bit numbers."""
    top, half = F(2**bits - 1), F(0.5)
    middle, radius = (min(ys) + max(ys)) * half, (max(ys) - min(ys)) * half
    best: tuple[Any, ...] = ()
    for share in (1.0, 0.85, 0.7) if bits < 8 else (1.0,):
        limit = radius * F(share)
        scale, zero = limit * (F(2) / top), middle - limit
        if bits < 8:  # least squares of the values on their codes
            codes, n = [k_code(y, scale, zero, top) for y in ys], F(len(ys))
            code_mean, y_mean = total(codes) / n, total(ys) / n
            covariance = total([(c - code_mean) * (y - y_mean) for c, y in zip(codes, ys, strict=True)])
            variance = total([(c - code_mean) * (c - code_mean) for c in codes])
            scale = covariance / variance if variance > 0 else scale
            zero = y_mean - scale * code_mean
        errors = [y - (k_code(y, scale, zero, top) * scale + zero) for y in ys]
        error = total([e * e for e in errors])
        if not best or error < best[0]:
            best = error, scale, zero
    return best[1], best[2]


def k_block(x: Any, bits: int) -> tuple[Any, ...]:
    """codes (C, D), scales (D,), zeros (D,), base (2,) of x (C, D)."""
    rows = [rotated([F(value) for value in row]) for row in x]
    channels = [list(channel) for channel in zip(*rows, strict=True)]
    top, half = F(2**bits - 1), F(0.5)
    lines = [k_line(ys, bits) for ys in channels]
    scale_base = up_to_bf16(max(scale for scale, _ in lines))
    step = scale_base / F(255)
    scales, moved = [], []
    for scale, zero in lines:
        units = scale / step if step > 0 else ZERO
        scales.append(limited(np.ceil(units) if bits == 8 else np.rint(units), ZERO, F(255)))
        moved.append((zero + scale * (top * half)) - (scales[-1] * step) * (top * half))
    zero_base = up_to_bf16(max(abs(zero) for zero in moved))
    zero_step = zero_base / F(127)
    zeros = [limited(np.rint(zero / zero_step), F(-127), F(127)) if zero_step > 0 else ZERO for zero in moved]
    codes = [[k_code(y, s * step, z * zero_step, top) for y, s, z in zip(row, scales, zeros, strict=True)]
             for row in rows]
    return codes, scales, zeros, [scale_base, zero_base]


def v_token(x: Any, bits: int) -> tuple[Row, np.float32]:
    """Codes (D,) and scale of one token."""
    y, top, half = rotated([F(value) for value in x]), F(2**bits - 1), F(0.5)
    largest = max(abs(value) for value in y)
    best: tuple[Any, ...] = ()
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4) if bits < 8 else (1.0,):
        scale = up_to_bf16((largest * F(share)) * (F(2) / top))
        inverse = ONE / scale if scale > 0 else ZERO
        codes = [limited(np.floor(value * inverse) + F(2 ** (bits - 1)), ZERO, top) for value in y]
        errors = [value - (code - top * half) * scale for value, code in zip(y, codes, strict=True)]
        error = tree_total([e * e for e in errors])
        if not best or error < best[0]:
            best = error, codes, scale
    return best[1], best[2]


@several
@given(bits=quantized, chunk=small_chunks, head_dim=st.sampled_from((8, 16, 24, 40, 64)), kind=kinds, seed=seeds)
@example(bits=2, chunk=24, head_dim=8, kind="constant", seed=0)
@example(bits=8, chunk=8, head_dim=80, kind="denormals", seed=0)
def test_encoding_equals_its_transcription(bits: int, chunk: int, head_dim: int, kind: str, seed: int) -> None:
    x = values(kind, seed, (chunk, head_dim))
    codes, scales, zeros, base = k_block(x, bits)
    k = formats.encode_k(x, bits)
    np.testing.assert_array_equal(k.codes, codes)
    np.testing.assert_array_equal(k.scales, scales)
    np.testing.assert_array_equal(k.zeros, zeros)
    np.testing.assert_array_equal(k.base, base)
    v = formats.encode_v(x, bits)
    tokens = [v_token(row, bits) for row in x]
    np.testing.assert_array_equal(v.codes, [codes for codes, _ in tokens])
    np.testing.assert_array_equal(v.scales, [scale for _, scale in tokens])


# Properties ----------------------------------------------------------------------------------------------------------

@several
@given(which=k_or_v, bits=quantized, chunk=small_chunks, head_dim=head_dims, kind=kinds, seed=seeds)
def test_a_chunk_is_self_contained(which: Kind, bits: int, chunk: int, head_dim: int, kind: str, seed: int) -> None:
    """Neither other chunks nor other heads change what a chunk decodes to; V does not even see other tokens."""
    x = values(kind, seed, (3, 2, chunk, head_dim))
    together = formats.round_trip(which, x, bits)
    for n in range(3):
        for g in range(2):
            assert formats.round_trip(which, x[n, g], bits).tobytes() == together[n, g].tobytes()
    if which == "V":
        assert formats.round_trip("V", x[0, 0, 2:3], bits).tobytes() == together[0, 0, 2:3].tobytes()


@several
@given(which=k_or_v, bits=quantized, chunk=small_chunks, head_dim=head_dims, kind=kinds, seed=seeds)
def test_eight_bits_err_by_half_a_step_and_fewer_by_less_than_the_range(which: Kind, bits: int, chunk: int,
                                                                        head_dim: int, kind: str, seed: int) -> None:
    """In the rotated domain, where the codes are; the bounds are those of the rules, 1 % for roundings."""
    x = values(kind, seed, (chunk, head_dim))
    y = formats.rotate(x).astype(np.float64)
    tiny = 1e-6 * np.abs(y).max() + 1e-30
    if which == "V":
        v = formats.encode_v(x, bits)
        decoded = (v.codes - (2**bits - 1) / 2) * v.scales.astype(np.float64)[:, None]
        # Half a step; clipping at share c of the limit costs at most 1 - c of it, and c is at least 0.4.
        allowed = v.scales[:, None] / 2 + (0 if bits == 8 else 0.6 * np.abs(y).max(axis=1, keepdims=True))
    else:
        k = formats.encode_k(x, bits)
        scale, zero = (units * base.astype(np.float64) / top for units, base, top in (
            (k.scales, k.base[0], 255), (k.zeros, k.base[1], 127)))
        decoded = k.codes * scale + zero
        # Half a step, half a unit of the zero; below 8 bits at most the channel's range and a scale's unit besides.
        units = k.base[1].astype(np.float64) / 254
        spread = y.max(axis=0) - y.min(axis=0)
        allowed = scale / 2 + units + (0 if bits == 8 else spread + 2**bits * k.base[0].astype(np.float64) / 510)
    assert (np.abs(y - decoded) <= 1.01 * allowed + tiny).all()


@pytest.mark.parametrize("which", ["K", "V"])
def test_more_bits_are_more_accurate(which: Kind) -> None:
    """Mean squared error on normal values with an outlier channel, as a share of their variance."""
    x = values("normal", 0, (64, 32, 64))
    x[..., 3] *= 20
    variance = np.square(x.astype(np.float64)).mean()
    errors = [np.square(formats.round_trip(which, x, bits) - x.astype(np.float64)).mean() / variance
              for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert all(error < limit for error, limit in zip(errors, (0.2, 0.06, 0.02, 1e-4), strict=True)), errors
    assert formats.round_trip(which, x, 16).tobytes() == x.astype(np.float32).tobytes()
    assert not formats.round_trip(which, x, 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nothing_overflows(kind: str, bits: int) -> None:
    x = values(kind, 9, (4, 32, 128))
    for which in ("K", "V"):
        decoded = formats.round_trip(which, x, bits)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded).max() <= 128 * 1.01 * np.abs(formats.rotate(x)).max() * 2 + 1e-30


def test_zeros_stay_zeros() -> None:
    for bits in (2, 3, 4, 8):
        for which in ("K", "V"):
            assert not formats.round_trip(which, np.zeros((8, 16), np.float16), bits).any()


@several
@given(head_dim=head_dims, seed=seeds)
def test_rotation_is_its_own_inverse_up_to_its_block_and_keeps_the_range(head_dim: int, seed: int) -> None:
    x = values("steps", seed, (5, head_dim))  # sums of few-bit numbers are exact
    assert head_dim % formats.rotation_block(head_dim) == 0 and head_dim // formats.rotation_block(head_dim) % 2 == 1
    y = formats.rotate(x)
    assert np.abs(y).max() <= np.abs(x).max()
    np.testing.assert_array_equal(formats.hadamard(y), x)


@several
@given(st.lists(st.floats(0, float(np.finfo(np.float32).max) / 2, width=32), min_size=1))
def test_bf16_up_is_the_least_value_above(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    up = formats.bf16_up(x)
    assert (up >= x).all() and not (up.view(np.uint32) & 0xFFFF).any()
    below = (np.maximum(up.view(np.uint32), 0x10000) - 0x10000).view(np.float32)
    assert ((below < x) | (up == 0)).all()


def test_block_bytes_counts_what_is_stored() -> None:
    for bits in (2, 3, 4, 8):
        for chunk, dim in ((32, 64), (8, 8), (24, 80), (256, 256), (40, 72)):
            assert formats.block_bytes("K", bits, chunk, dim) == (
                chunk * len(np.packbits(np.zeros(dim * bits + -dim * bits % 32, np.uint8))), dim + dim + 2 + 2, 0)
            assert formats.block_bytes("V", bits, chunk, dim) == (
                dim * len(np.packbits(np.zeros(chunk * bits + -chunk * bits % 32, np.uint8))), 2 * chunk, 0)
    assert formats.block_bytes("K", 16, 32, 64) == (32 * 64 * 2, 0, 0)
    assert formats.block_bytes("V", 0, 32, 64) == (0, 0, 0)
    with pytest.raises(ValueError, match="no rotated format of 5 bits"):
        formats.block_bytes("K", 5, 32, 64)
