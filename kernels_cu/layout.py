"""Where every bit of a chunk's codes and metadata lies on the GPU: formats.cuh, stated once more for the host.

Used to size work, and by tests to read back what the packing kernel wrote.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTHS = {"rotated": (2, 3, 4, 8, 16), "kivi": (2, 3, 4, 8, 16), "atom": (4, 16),
          "kvquant": (2, 3, 4, 16)}  # fmt: skip
TURNED = ("atom", "kvquant")  # families that keep K as it was before RoPE
BLOCK_TOKENS = 32
KIVI_GROUP = 32  # channels of V that share a scale


def codes_bytes(is_k: bool, bits: int, tokens: int, head_dim: int) -> int:
    """Bytes of the codes of `tokens` tokens of K or V, 2 to 8 bits; of a whole chunk or of one block of it."""
    return 4 * tokens * -(-head_dim * bits // 32) if is_k else 4 * head_dim * -(-tokens * bits // 32)


def meta_bytes(is_k: bool, chunk: int, head_dim: int, family: str = "rotated") -> int:
    """Bytes of the metadata of one quantized chunk and one KV head."""
    if family == "rotated":
        return 2 * head_dim + 4 if is_k else 2 * chunk
    if family == "kivi":
        return 4 * head_dim if is_k else 4 * chunk * -(-head_dim // KIVI_GROUP)
    return 4 * chunk if family == "atom" else 4 + 4 * -(-chunk * head_dim // 80)


def chunk_bytes(is_k: bool, bits: int, chunk: int, head_dim: int, family: str = "rotated") -> tuple[int, int]:
    """Bytes of the codes and of the metadata of one chunk and one KV head."""
    if bits == 16:
        return 2 * chunk * head_dim, 0
    return codes_bytes(is_k, bits, chunk, head_dim), meta_bytes(is_k, chunk, head_dim, family)


def unpack_codes(is_k: bool, bits: int, chunk: int, head_dim: int, codes: npt.NDArray[np.uint8],
                 family: str = "rotated") -> npt.NDArray[np.uint8]:  # fmt: skip
    """Codes (..., C, D) of 2 to 8 bits from a chunk's code bytes (..., codes_bytes)."""
    places = _code_bits(is_k, bits, chunk, head_dim, is_k or family == "kvquant")
    stream = np.unpackbits(codes, axis=-1, bitorder="little")[..., places]  # (..., C, D, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def unpack_k_meta(head_dim: int, meta: npt.NDArray[np.uint8]) -> tuple[Any, Any, Any]:
    """scales (..., D) u8, zeros (..., D) i8 and base (..., 2) f32 from a K chunk's metadata (..., 2 * D + 4)."""
    d = np.arange(head_dim)
    at = (d // 16 * 4 + d // 2 % 4) * 8 + d // 8 % 2 * 2 + d % 2
    base = np.ascontiguousarray(meta[..., 2 * head_dim :]).view(np.uint16)
    return meta[..., at], (meta[..., at + 4].astype(np.int16) - 128).astype(np.int8), _bf16(base)


def unpack_v_meta(chunk: int, meta: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scales (..., C) f32 from a V chunk's metadata (..., 2 * C)."""
    begin, _, at = _places(chunk)
    return _bf16(np.ascontiguousarray(meta).view(np.uint16)[..., begin + at])


def unpack_kivi_meta(is_k: bool, chunk: int, head_dim: int, meta: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
    """scales and zeros f16 from a chunk's metadata: K (..., D), V (..., C, groups)."""
    halves = np.ascontiguousarray(meta).view(np.float16)
    if is_k:
        d = np.arange(head_dim)
        at = (d // 16 * 4 + d // 2 % 4) * 8 + d // 8 % 2 * 2 + d % 2
        return halves[..., at], halves[..., at + 4]
    groups = -(-head_dim // KIVI_GROUP)
    (begin, tokens, at), group = (part[:, None] for part in _places(chunk)), np.arange(groups)
    token = np.arange(chunk)[:, None] - begin
    scales = 2 * groups * begin + at * groups + group
    return halves[..., scales], halves[..., 2 * groups * begin + groups * tokens + group * tokens + token]


def unpack_atom_meta(is_k: bool, chunk: int, meta: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
    """scales and zeros (..., C) f16 from a chunk's metadata (..., 4 * C)."""
    halves = np.ascontiguousarray(meta).view(np.float16)
    begin, tokens, at = _places(chunk)
    return halves[..., 2 * begin + at], halves[..., 2 * begin + tokens + (at if is_k else np.arange(chunk) - begin)]


def unpack_ranges(chunk: int, shared: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
    """kvquant's centres and half ranges (..., C) f16 of V from what a chunk stores for all heads (..., 4 * C)."""
    return unpack_atom_meta(True, chunk, shared)


def _places(chunk: int) -> tuple[Any, Any, Any]:
    """Of each token: its block's first token and number of tokens, and its place in the order of operand A's rows."""
    token = np.arange(chunk)
    begin = token // BLOCK_TOKENS * BLOCK_TOKENS
    tokens = np.minimum(chunk - begin, BLOCK_TOKENS)
    return begin, tokens, token % 8 * (tokens // 8) + (token - begin) // 8


@cache
def _code_bits(is_k: bool, bits: int, chunk: int, head_dim: int, rows_first: bool) -> npt.NDArray[np.int64]:
    """(C, D, bits): for each bit of each code its place in the chunk's bytes. rows_first: in the order of K."""
    places = np.full((chunk, head_dim, bits), -1, np.int64)
    start = 0
    for first in range(0, chunk, BLOCK_TOKENS):
        tokens = min(BLOCK_TOKENS, chunk - first)
        places[first : first + tokens] = start + _block_bits(rows_first, bits, tokens, head_dim)
        start += 8 * codes_bytes(is_k, bits, tokens, head_dim)
    return places


def _block_bits(is_k: bool, bits: int, tokens: int, head_dim: int) -> npt.NDArray[np.int64]:
    places = np.full((tokens, head_dim, bits), -1, np.int64)
    octets, rows = head_dim // 8, tokens // 8
    unit, unit_words = (16, 3) if bits == 3 else (16 // bits, 1)
    words = octets * rows // unit * unit_words  # of a lane
    for octet in range(octets):  # of channels
        for row in range(rows):  # octets of tokens
            if not is_k:
                pair = octet * rows + row
            elif octets % unit == 0:
                pair = (octet // unit * rows + row) * unit + octet % unit
            else:
                pair = row * octets + octet
            whole, slot = divmod(pair, unit)
            for lane in range(32):
                g, t = divmod(lane, 4)
                for side in range(2):
                    if is_k:
                        token, channel = 8 * row + g, 8 * octet + 2 * t + side
                    else:
                        token, channel = 8 * row + 2 * t + side, 8 * octet + g
                    for bit in range(bits):
                        if pair >= octets * rows // unit * unit:  # fills no unit
                            row_bits = 64 * bits * (pair - octets * rows // unit * unit)
                            place = 32 * 32 * words + row_bits + 2 * bits * lane + bits * side + bit
                        elif bits != 3:
                            place = 8 * _word(words, whole, lane) + bits * slot + 16 * side + bit
                        elif slot < 15:
                            place = 8 * _word(words, 3 * whole + slot // 5, lane) + slot % 5 * 3 + 16 * side + bit
                        else:
                            place = 8 * _word(words, 3 * whole + bit, lane) + 15 + 16 * side
                        places[token, channel, bit] = place
    return places


def _word(words: int, word: int, lane: int) -> int:
    """Byte of one of a lane's words: vectors of four, two and one, lanes side by side."""
    if word < words // 4 * 4:
        return word // 4 * 512 + 16 * lane + word % 4 * 4
    start = words // 4 * 512
    if words % 4 >= 2:
        if word - words // 4 * 4 < 2:
            return start + 8 * lane + word % 2 * 4
        start += 256
    return start + 4 * lane


def _bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)
