"""Family "atom": Atom's KV cache (arXiv:2310.19102), 4 bits, asymmetric, per token and head over all its channels. K is
stored as it was before RoPE (.rope), V as it is; the arithmetic is the same:

    s = f16(max(max - min, 1e-5) / 15), z = clamp(rint(-min / s), 0, 15)
    code = clamp(rint(x / s) + z, 0, 15), value = (code - z) * s

Metadata per token: s and z, both FP16; z is an integer, never -0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

TOP = np.float32(15)
LEAST = np.float32(1e-5)  # range of a token, so that its scale is no zero


@dataclass(frozen=True)
class Encoded:
    """codes (..., C, D) u8; scales and zeros (..., C) f16."""

    codes: npt.NDArray[np.uint8]
    scales: F16
    zeros: F16


def encode(x: npt.NDArray[Any]) -> Encoded:
    """Encode finite x (..., C, D): V as FP16, K as float32 from before RoPE."""
    wide = x.astype(np.float32)
    low, high = wide.min(axis=-1), wide.max(axis=-1)
    scales = (np.maximum(high - low, LEAST) / TOP).astype(np.float16)
    step = scales.astype(np.float32)
    zero = np.clip(np.rint(-low / step), 0, TOP)
    codes = np.clip(np.rint(wide / step[..., None]) + zero[..., None], 0, TOP)
    return Encoded(codes.astype(np.uint8), scales, zero.astype(np.uint8).astype(np.float16))


def decode(encoded: Encoded) -> F32:
    """The values (..., C, D) float32 that the codes stand for; K's are those before RoPE."""
    scale, zero = (part.astype(np.float32)[..., None] for part in (encoded.scales, encoded.zeros))
    return (encoded.codes.astype(np.float32) - zero) * scale
