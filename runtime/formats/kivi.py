"""Family "kivi": KIVI's arithmetic (arXiv:2402.02750), plain min-max. K after RoPE, per channel over a chunk's tokens;
V per token over groups of 32 channels, the last of which may be shorter.

    scale = f16((high - low) / (2^b - 1)), zero = f16(low)
    code = clamp(rint((x - zero) / scale), 0, 2^b - 1), 0 where scale is 0
    value = code * scale + zero

A zero is never negative: low and high are taken + 0.0, so that which of 0.0 and -0.0 is the smaller does not matter.
Metadata: FP16 scale and FP16 zero per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

GROUP = 32  # channels of V that share a scale


@dataclass(frozen=True)
class Encoded:
    """codes (..., C, D) u8; scales and zeros f16: K (..., D), V (..., C, ceil(D / 32))."""

    bits: int
    codes: npt.NDArray[np.uint8]
    scales: F16
    zeros: F16


def encode_k(x: F16, bits: int) -> Encoded:
    """Encode finite x (..., C, D) at 2, 3, 4 or 8 bits."""
    codes, scale, zero = _encode(x.astype(np.float32).swapaxes(-1, -2), bits)
    return Encoded(bits, np.ascontiguousarray(codes.swapaxes(-1, -2)), scale[..., 0], zero[..., 0])


def encode_v(x: F16, bits: int) -> Encoded:
    """Encode finite x (..., C, D) at 2, 3, 4 or 8 bits."""
    wide = x.astype(np.float32)
    groups = [_encode(wide[..., begin : begin + GROUP], bits) for begin in range(0, x.shape[-1], GROUP)]
    codes, scales, zeros = (np.concatenate(parts, axis=-1) for parts in zip(*groups, strict=True))
    return Encoded(bits, codes, scales, zeros)


def decode_k(encoded: Encoded) -> F32:
    """The values (..., C, D) float32 that the codes stand for."""
    scale, zero = (part.astype(np.float32)[..., None, :] for part in (encoded.scales, encoded.zeros))
    return encoded.codes.astype(np.float32) * scale + zero


def decode_v(encoded: Encoded) -> F32:
    """The values (..., C, D) float32 that the codes stand for."""
    group = np.arange(encoded.codes.shape[-1]) // GROUP
    scale, zero = (part.astype(np.float32)[..., group] for part in (encoded.scales, encoded.zeros))
    return encoded.codes.astype(np.float32) * scale + zero


def _encode(x: F32, bits: int) -> tuple[npt.NDArray[np.uint8], F16, F16]:
    """Codes (..., n), scale and zero (..., 1) of groups (..., n)."""
    top, positive = np.float32(2**bits - 1), np.float32(0)
    low, high = (extreme(axis=-1, keepdims=True) + positive for extreme in (x.min, x.max))
    scale, zero = ((high - low) / top).astype(np.float16), low.astype(np.float16)
    step = scale.astype(np.float32)
    ratio = np.divide(x - zero.astype(np.float32), step, out=np.zeros_like(x), where=step > 0)
    return np.clip(np.rint(ratio), 0, top).astype(np.uint8), scale, zero
