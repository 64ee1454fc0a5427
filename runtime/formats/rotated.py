"""Family "rotated": this project's formats.

Both rotate each head by a Walsh-Hadamard transform first, which spreads outliers over the channels: y = H x / b in
blocks of b, the largest power of two that divides D. Dividing by b and not by sqrt(b) keeps |y| <= max|x|, costs no
rounding (b is a power of two), and leaves the plain H for queries and outputs: q.x = (H q).y and x = H y.

K ("hch"): per rotated channel over the chunk's tokens, y ~ scale * code + zero, codes 0 .. 2^b - 1. A channel's scale
  and zero are 8-bit numbers in units of one BF16 pair per chunk and head. Clipped to the least squared error at 2 to 4
  bits, min-max at 8. The scale folds into the query once per chunk and channel.
V ("mid"): per token, y ~ scale * (code - (2^b - 1) / 2), one BF16 scale per token and head, clipped to the least
  squared error at 2 to 4 bits. The scale folds into the token's probability.

BF16 bases keep the range of float32: no input can overflow a scale. `...` below stands for any leading axes, usually
(chunks, KV heads). Letters: C tokens of a chunk, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

# Shares of a channel's (K) or token's (V) half range that are tried as clipping limits; the first best one wins.
K_CLIP = {2: (1.0, 0.85, 0.7), 3: (1.0, 0.85, 0.7), 4: (1.0, 0.85, 0.7), 8: (1.0,)}
V_CLIP = dict.fromkeys((2, 3, 4), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)) | {8: (1.0,)}


@dataclass(frozen=True)
class EncodedK:
    """codes (..., C, D) u8; scales (..., D) u8 and zeros (..., D) i8 in units of base / 255 and base / 127;
    base (..., 2) float32 that BF16 holds exactly: of the scales, of the zeros."""

    bits: int
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.uint8]
    zeros: npt.NDArray[np.int8]
    base: F32


@dataclass(frozen=True)
class EncodedV:
    """codes (..., C, D) u8; scales (..., C) float32 that BF16 holds exactly."""

    bits: int
    codes: npt.NDArray[np.uint8]
    scales: F32


def encode_k(x: npt.NDArray[np.float16], bits: int) -> EncodedK:
    """Encode finite x (..., C, D) at 2, 3, 4 or 8 bits."""
    y = rotate(x)
    top = np.float32(2**bits - 1)
    centre = top * np.float32(0.5)
    low, high = y.min(axis=-2), y.max(axis=-2)
    middle, half = (low + high) * np.float32(0.5), (high - low) * np.float32(0.5)
    best = scale = zero = middle  # replaced by the first candidate
    for attempt, share in enumerate(K_CLIP[bits]):
        limit = half * np.float32(share)
        s, z = limit * np.float32(2 / top), middle - limit
        if bits < 8:
            s, z = _fit_line(y, _quantize_k(y, s, z, top), s)
        error = _sum_tokens(np.square(y - _line(_quantize_k(y, s, z, top), s, z)))
        if attempt == 0:
            best, scale, zero = error, s, z
        else:
            better = error < best
            best, scale, zero = np.where(better, error, best), np.where(better, s, scale), np.where(better, z, zero)

    scale_base = bf16_up(scale.max(axis=-1, keepdims=True))
    step = scale_base / np.float32(255)
    units = _divide(scale, step)
    scales = np.clip(np.ceil(units) if bits == 8 else np.rint(units), 0, 255)
    decoded = scales * step
    zero = (zero + scale * centre) - decoded * centre  # the rounded scale keeps the channel's centre
    zero_base = bf16_up(np.abs(zero).max(axis=-1, keepdims=True))
    zero_step = zero_base / np.float32(127)
    zeros = np.clip(np.rint(_divide(zero, zero_step)), -127, 127)
    codes = _quantize_k(y, decoded, zeros * zero_step, top)
    return EncodedK(bits, codes.astype(np.uint8), scales.astype(np.uint8), zeros.astype(np.int8),
                    np.concatenate([scale_base, zero_base], axis=-1))


def encode_v(x: npt.NDArray[np.float16], bits: int) -> EncodedV:
    """Encode finite x (..., C, D) at 2, 3, 4 or 8 bits."""
    y = rotate(x)
    top = np.float32(2**bits - 1)
    largest = np.abs(y).max(axis=-1)
    best = scale = largest  # replaced by the first candidate
    for attempt, share in enumerate(V_CLIP[bits]):
        s = bf16_up((largest * np.float32(share)) * np.float32(2 / top))
        error = _sum_channels(np.square(y - _levels(_quantize_v(y, s, bits), s, top)))
        if attempt == 0:
            best, scale = error, s
        else:
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, s, scale)
    return EncodedV(bits, _quantize_v(y, scale, bits).astype(np.uint8), scale)


def decode_k(encoded: EncodedK) -> F32:
    """The values (..., C, D) float32 that the codes stand for, rotated back."""
    scale = encoded.scales.astype(np.float32) * (encoded.base[..., :1] / np.float32(255))
    zero = encoded.zeros.astype(np.float32) * (encoded.base[..., 1:] / np.float32(127))
    return hadamard(_line(encoded.codes.astype(np.float32), scale, zero))


def decode_v(encoded: EncodedV) -> F32:
    """The values (..., C, D) float32 that the codes stand for, rotated back."""
    top = np.float32(2**encoded.bits - 1)
    return hadamard(_levels(encoded.codes.astype(np.float32), encoded.scales, top))


def rotation_block(head_dim: int) -> int:
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim


def hadamard(x: npt.NDArray[Any]) -> F32:
    """H x over the last axis (..., D), in blocks of rotation_block(D): butterflies of distance 1, 2, 4, ..."""
    block = rotation_block(x.shape[-1])
    y = np.array(x, dtype=np.float32).reshape(-1, block)
    distance = 1
    while distance < block:
        pairs = y.reshape(-1, block // (2 * distance), 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([a + b, a - b], axis=2).reshape(-1, block)
        distance *= 2
    return y.reshape(x.shape)


def rotate(x: npt.NDArray[Any]) -> F32:
    """H x / b over the last axis (..., D): what the quantized formats store."""
    return hadamard(x) * np.float32(1 / rotation_block(x.shape[-1]))


def bf16_up(x: F32) -> F32:
    """The least BF16 value not below x, for finite x >= 0."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def _divide(a: F32, b: F32) -> F32:
    """a / b, and 0 where b is not positive."""
    positive = np.broadcast_to(b > 0, a.shape)
    return np.divide(a, np.broadcast_to(b, a.shape), out=np.zeros_like(a), where=positive)


def _quantize_k(y: F32, scale: F32, zero: F32, top: np.float32) -> F32:
    inverse = _divide(np.ones_like(scale), scale)
    codes: F32 = np.clip(np.rint((y - zero[..., None, :]) * inverse[..., None, :]), np.float32(0), top)
    return codes


def _line(codes: F32, scale: F32, zero: F32) -> F32:
    return codes * scale[..., None, :] + zero[..., None, :]


def _fit_line(y: F32, codes: F32, scale: F32) -> tuple[F32, F32]:
    """Least squares of y on its codes, per channel; where all codes are equal the scale stays as it was."""
    tokens = np.float32(y.shape[-2])
    code_mean, y_mean = _sum_tokens(codes) / tokens, _sum_tokens(y) / tokens
    deviation = codes - code_mean[..., None, :]
    covariance = _sum_tokens(deviation * (y - y_mean[..., None, :]))
    variance = _sum_tokens(deviation * deviation)
    slope = np.where(variance > 0, _divide(covariance, variance), scale)
    return slope, y_mean - slope * code_mean


def _quantize_v(y: F32, scale: F32, bits: int) -> F32:
    inverse = _divide(np.ones_like(scale), scale)
    codes: F32 = np.floor(y * inverse[..., None]) + np.float32(2 ** (bits - 1))
    return np.clip(codes, np.float32(0), np.float32(2**bits - 1))


def _levels(codes: F32, scale: F32, top: np.float32) -> F32:
    return (codes - top * np.float32(0.5)) * scale[..., None]


def _sum_tokens(x: F32) -> F32:
    """(..., C, D) -> (..., D), token after token."""
    total = x[..., 0, :].copy()
    for token in range(1, x.shape[-2]):
        total = total + x[..., token, :]
    return total


def _sum_channels(x: F32) -> F32:
    """(..., D) -> (...), padded with zeros to a power of two and halved: x[i] += x[i + n / 2]."""
    n = 1 << (x.shape[-1] - 1).bit_length()
    x = np.concatenate([x, np.zeros((*x.shape[:-1], n - x.shape[-1]), np.float32)], axis=-1)
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]
