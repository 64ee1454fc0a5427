"""How one chunk of K or V is stored at each width: its bytes and its reference encode and decode.

This package defines the bits. Every backend must give the same codes, scales and zeros for the same FP16 input, so the
order of every floating-point operation is part of a format: float32 throughout, one IEEE operation at a time (no fused
multiply-add), IEEE division, round to nearest even, sums in the order stated; f16() is rounding to FP16. How a backend
arranges codes and metadata in memory is its own affair; their number of bytes (`block_bytes`) is not.

Four families of formats; a layout has one of them behind its widths below 16 (runtime.plan.Layout.formats):

    rotated   this project's own: Walsh-Hadamard rotated, clipped to the least squared error (.rotated)
    kivi      plain min-max, K per channel, V per token and 32 channels (.kivi)
    atom      4 bits, per token and head, K before RoPE (.atom)
    kvquant   non-uniform levels from a calibration, 1 % outliers kept exactly, K before RoPE (.kvquant)

16 bits is the FP16 values themselves in all of them. `...` stands for any leading axes, usually (chunks, KV heads).
Letters: C tokens of a chunk, G KV heads, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.formats import atom, kivi, kvquant, rotated
from runtime.formats.rope import turn, turn_back
from runtime.formats.rotated import (
    EncodedK,
    EncodedV,
    bf16_up,
    decode_k,
    decode_v,
    encode_k,
    encode_v,
    hadamard,
    rotate,
    rotation_block,
)

if TYPE_CHECKING:
    from runtime.backend import FormatData

__all__ = ["FAMILIES", "PRE_ROPE", "WIDTHS", "BlockBytes", "EncodedK", "EncodedV", "Kind", "atom", "bf16_up",
           "block_bytes", "decode_k", "decode_v", "encode_k", "encode_v", "hadamard", "kivi", "kvquant", "rotate",
           "rotated", "rotation_block", "round_trip", "turn", "turn_back"]

F32 = npt.NDArray[np.float32]
Kind = Literal["K", "V"]

WIDTHS = {"rotated": (2, 3, 4, 8), "kivi": (2, 3, 4, 8), "atom": (4,), "kvquant": (2, 3, 4)}  # bits besides 0 and 16
FAMILIES = tuple(WIDTHS)
PRE_ROPE = ("atom", "kvquant")  # families that store K as it was before RoPE


class BlockBytes(NamedTuple):
    """Bytes of one chunk: codes and meta of one KV head, shared once for all heads."""

    codes: int
    meta: int
    shared: int


def block_bytes(kind: Kind, bits: int, chunk: int, head_dim: int, family: str = "rotated") -> BlockBytes:
    """Bytes of one chunk of K or V.

    K's codes are a bit stream per token in whole 32-bit words, V's a bit stream per channel, so a head_dim (K) or chunk
    size (V) whose codes do not fill the last word pays for the rest of it. Width 0 (not stored) takes nothing. Raises
    ValueError for a width that the family has not.
    """
    if bits == 0:
        return BlockBytes(0, 0, 0)
    if bits == 16:
        return BlockBytes(2 * chunk * head_dim, 0, 0)
    if bits not in WIDTHS[family]:
        raise ValueError(f"no {family} format of {bits} bits; widths are 0, {', '.join(map(str, WIDTHS[family]))}, 16")
    streams, length = (chunk, head_dim) if kind == "K" else (head_dim, chunk)
    codes = 4 * streams * -(-length * bits // 32)
    if family == "rotated":
        return BlockBytes(codes, 2 * head_dim + 4 if kind == "K" else 2 * chunk, 0)
    if family == "kivi":
        return BlockBytes(codes, 4 * head_dim if kind == "K" else 4 * chunk * -(-head_dim // kivi.GROUP), 0)
    if family == "atom":
        return BlockBytes(codes, 4 * chunk, 0)
    return BlockBytes(codes, 4 + 4 * kvquant.capacity(chunk, head_dim), 0 if kind == "K" else 4 * chunk)


def round_trip(kind: Kind, x: npt.NDArray[np.float16], bits: int, family: str = "rotated",
               positions: npt.NDArray[Any] | None = None, data: FormatData | None = None) -> F32:
    """What attention sees of x (..., C, D) after storage at `bits` (16: x itself; 0: zeros).

    positions (..., C) without the axis of heads: of the tokens; data: host arrays. Both only where the family stores K
    before RoPE (atom, kvquant); x is then (..., G, C, D), for kvquant's V too.
    """
    if bits == 16:
        return x.astype(np.float32)
    if bits == 0:
        return np.zeros(x.shape, np.float32)
    if family == "rotated":
        return decode_k(encode_k(x, bits)) if kind == "K" else decode_v(encode_v(x, bits))
    if family == "kivi":
        return kivi.decode_k(kivi.encode_k(x, bits)) if kind == "K" else kivi.decode_v(kivi.encode_v(x, bits))
    if kind == "V":
        if family == "atom":
            return atom.decode(atom.encode(x))
        assert data is not None
        levels = kvquant.levels_of(data.v_levels, bits)
        return kvquant.decode_v(kvquant.encode_v(x, bits, levels), levels)
    assert data is not None and positions is not None
    cos, sin = (table[positions][..., None, :, :] for table in (data.cos, data.sin))
    before = turn_back(x, cos, sin)
    if family == "atom":
        return turn(atom.decode(atom.encode(before)), cos, sin)
    levels = kvquant.levels_of(data.k_levels, bits)
    encoded = kvquant.encode_k(before, bits, levels, data.k_centre, data.k_half)
    return turn(kvquant.decode_k(encoded, levels, data.k_centre, data.k_half), cos, sin)
