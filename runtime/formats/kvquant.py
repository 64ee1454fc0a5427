"""Family "kvquant": KVQuant's nuq2, nuq3 and nuq4 with 1 % of outliers (arXiv:2401.18079).

The codes of a layer's K, and those of its V, name 2^b levels that a calibration found, ascending, in units in which the
value's own range is -1 .. 1. The code of y is the number of midpoints (levels[i] + levels[i + 1]) * .5 that are < y, so
what lies outside gets the outermost level.

K, before RoPE (.rope), per channel with the calibration's centre and half range:
    y = (x - centre) / half, 0 where half is 0; outlier where |y| > 1
    value = levels[code] * half + centre
V, per token over the n = G * D values of all KV heads, k = max(1, floor(n / 200 + .5)):
    hi, lo = the (k + 1)-th largest and smallest value, + 0.0; outlier where x > hi or x < lo
    centre = f16((hi + lo) * .5), half = f16((hi - lo) * .5); y, code and value as for K

Outliers are kept as f16(x), cut to FP16's finite range, in a sparse store per head and chunk: u16 kept, u16 overflowed,
then `capacity` entries of (u16 token * D + channel, f16 value) in the order of that index; entries behind the kept ones
are 0. Those that come after the capacity is full read as their codes say and count as overflowed. V's centre and half
(FP16) of every token are stored once per chunk for all heads; K has nothing but its sparse store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

WIDTHS = (2, 3, 4)
LARGEST = np.float32(65504)
_HALF = np.float32(0.5)


def capacity(chunk: int, head_dim: int) -> int:
    """Outliers that one head of one chunk can keep: 1.25 % of its values."""
    return -(-chunk * head_dim // 80)


def beyond(n: int) -> int:
    """How many of a token's n values of V lie above its upper threshold, and as many below the lower one: 0.5 %."""
    return max(1, (n + 100) // 200)


def levels_of(levels: Any, bits: int) -> Any:
    """(2^bits,): one width's levels out of a layer's (28,), which are those of 2, 3 and 4 bits behind one another."""
    return levels[2**bits - 4 : 2 ** (bits + 1) - 4]


def normal(x: F32, centre: F32, half: F32) -> F32:
    """y of the module's text: where x lies in its range; all three float32 that broadcast."""
    y: F32 = np.divide(x - centre, half, out=np.zeros_like(x), where=half > 0)
    return y


@dataclass(frozen=True)
class Sparse:
    """kept and overflowed (...) u16, how many; index (..., capacity) u16 and values (..., capacity) f16."""

    kept: U16
    overflowed: U16
    index: U16
    values: F16


@dataclass(frozen=True)
class EncodedK:
    """codes (..., C, D) u8."""

    codes: npt.NDArray[np.uint8]
    sparse: Sparse


@dataclass(frozen=True)
class EncodedV:
    """codes (..., G, C, D) u8; centre and half (..., C) f16, of all heads."""

    codes: npt.NDArray[np.uint8]
    sparse: Sparse
    centre: F16
    half: F16


def encode_k(x: F32, bits: int, levels: F32, centre: F32, half: F32) -> EncodedK:
    """Encode finite x (..., G, C, D) from before RoPE; levels (2^bits,), centre and half (G, D)."""
    y = normal(x, centre[..., None, :], half[..., None, :])
    return EncodedK(_codes(y, bits, levels), _keep(np.abs(y) > 1, x))


def encode_v(x: F16, bits: int, levels: F32) -> EncodedV:
    """Encode finite x (..., G, C, D) of all KV heads; levels (2^bits,)."""
    wide = x.astype(np.float32)
    tokens = np.sort(wide.swapaxes(-3, -2).reshape(*x.shape[:-3], x.shape[-2], -1), axis=-1)  # (..., C, G * D)
    n = tokens.shape[-1]
    k = beyond(n)
    lo, hi = (tokens[..., i] + np.float32(0) for i in (k, n - 1 - k))
    centre, half = ((hi + lo) * _HALF).astype(np.float16), ((hi - lo) * _HALF).astype(np.float16)
    lo, hi, middle, radius = (part[..., None, :, None] for part in (lo, hi, centre, half))
    y = normal(wide, middle.astype(np.float32), radius.astype(np.float32))
    return EncodedV(_codes(y, bits, levels), _keep((wide > hi) | (wide < lo), wide), centre, half)


def decode_k(encoded: EncodedK, levels: F32, centre: F32, half: F32) -> F32:
    """The values (..., G, C, D) float32 before RoPE that the codes and the sparse store stand for."""
    return _restore(levels[encoded.codes] * half[..., None, :] + centre[..., None, :], encoded.sparse)


def decode_v(encoded: EncodedV, levels: F32) -> F32:
    """The values (..., G, C, D) float32 that the codes and the sparse store stand for."""
    centre, half = (part.astype(np.float32)[..., None, :, None] for part in (encoded.centre, encoded.half))
    return _restore(levels[encoded.codes] * half + centre, encoded.sparse)


def _codes(y: F32, bits: int, levels: F32) -> npt.NDArray[np.uint8]:
    if levels.shape != (2**bits,):
        raise ValueError(f"{bits} bits need levels of shape ({2**bits},), not {levels.shape}")
    return np.searchsorted((levels[:-1] + levels[1:]) * _HALF, y, side="left").astype(np.uint8)


def _keep(outlier: npt.NDArray[np.bool_], x: F32) -> Sparse:
    """The store of each block (C, D) of x (..., C, D)."""
    shape = *x.shape[:-2], -1
    outlier, flat = outlier.reshape(shape), x.reshape(shape)
    room, found = capacity(*x.shape[-2:]), outlier.sum(axis=-1)
    kept = np.minimum(found, room)
    index = np.argsort(~outlier, axis=-1, kind="stable")[..., :room]
    used = np.arange(room) < kept[..., None]
    values = np.clip(np.take_along_axis(flat, index, axis=-1), -LARGEST, LARGEST)
    return Sparse(kept.astype(np.uint16), (found - kept).astype(np.uint16), np.where(used, index, 0).astype(np.uint16),
                  np.where(used, values, 0).astype(np.float16))


def _restore(values: F32, sparse: Sparse) -> F32:
    blocks = values.reshape(-1, values.shape[-2] * values.shape[-1])
    used = np.arange(sparse.index.shape[-1]) < sparse.kept.reshape(-1, 1)
    block, entry = np.nonzero(used)
    room = sparse.index.shape[-1]
    blocks[block, sparse.index.reshape(-1, room)[block, entry]] = sparse.values.reshape(-1, room)[block, entry]
    return blocks.reshape(values.shape)
