"""References of the cache operations: the CPU's physical layout read back in NumPy, attention in torch float64.

`attention` works on the values that the stored codes stand for and states how far a float32 kernel may be from it. Its
bound is worst case (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3): a sum of n products is off by at
most n * u * sum |products|, u = 2^-24. Letters: N chunks, C tokens of a chunk, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.backend import FormatData
from runtime.formats import (
    EncodedK,
    EncodedV,
    Kind,
    atom,
    encode_k,
    encode_v,
    kivi,
    kvquant,
    rotation_block,
    turn,
    turn_back,
)

U = 2.0**-24  # float32's unit roundoff
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Keys:
    """One kind (K or V) of T tokens: what attention reads, and how large the numbers are that a kernel adds up.

    values (G, T, D) float64. magnitude (G, T, D): |values|, or of codes the sum of what they are made of, code * scale
    + |zero or centre|. rotated: whether the kernel works on rotated codes; then magnitude is of the rotated channels.
    """

    values: torch.Tensor
    magnitude: torch.Tensor
    rotated: bool


def half(x: Array) -> Keys:
    """FP16 x (G, T, D)."""
    values = torch.from_numpy(np.asarray(x, np.float64))
    return Keys(values, values.abs(), False)


def coded_k(encoded: EncodedK) -> Keys:
    """Codes (G, N, C, D) -> T = N * C tokens. Scales are float32 as the format says, all else float64."""
    scale = encoded.scales * (encoded.base[..., :1] / np.float32(255))
    zero = encoded.zeros * (encoded.base[..., 1:] / np.float32(127))
    scale, zero = (x.astype(np.float64)[..., None, :] for x in (scale, zero))
    return _coded(encoded.codes * scale + zero, encoded.codes * scale + np.abs(zero))


def coded_v(encoded: EncodedV) -> Keys:
    """Codes (G, N, C, D) -> T = N * C tokens."""
    centre, scale = (2**encoded.bits - 1) / 2, encoded.scales.astype(np.float64)[..., None]
    return _coded((encoded.codes - centre) * scale, (encoded.codes + centre) * scale)


def stored(kind: Kind, x: Array, bits: int, family: str = "rotated", positions: Array | None = None,
           data: FormatData | None = None) -> Keys:
    """What storage of x (N, G, C, D) float16 at `bits` leaves, T = N * C tokens; codes, scales and the sparse store are
    runtime.formats', all that is done with them float64.

    positions (N, C): of the tokens; data: host arrays. Both as runtime.formats.round_trip needs them.
    """
    if bits == 16:
        return half(_tokens(x))
    if family == "rotated":
        heads_first = x.swapaxes(0, 1)
        return coded_k(encode_k(heads_first, bits)) if kind == "K" else coded_v(encode_v(heads_first, bits))
    if family == "kivi":
        return _plain(*_kivi(kind, kivi.encode_k(x, bits) if kind == "K" else kivi.encode_v(x, bits)))
    if kind == "V":
        if family == "atom":
            return _plain(*_atom(atom.encode(x)))
        levels = kvquant.levels_of(data.v_levels, bits)
        v = kvquant.encode_v(x, bits, levels)
        return _plain(*_kvquant(v, levels, v.centre[..., None, :, None], v.half[..., None, :, None]))
    cos, sin = (table[positions][:, None] for table in (data.cos, data.sin))
    before = turn_back(x, cos, sin)
    if family == "atom":
        values, magnitude = _atom(atom.encode(before))
    else:
        levels = kvquant.levels_of(data.k_levels, bits)
        k = kvquant.encode_k(before, bits, levels, data.k_centre, data.k_half)
        values, magnitude = _kvquant(k, levels, data.k_centre[:, None], data.k_half[:, None])
    cos, sin = cos.astype(np.float64), sin.astype(np.float64)
    return _plain(turn(values, cos, sin), _turned_magnitude(magnitude, np.abs(cos), np.abs(sin)))


def _kivi(kind: Kind, encoded: kivi.Encoded) -> tuple[Array, Array]:
    """Values and their magnitudes (N, G, C, D), as of the other two."""
    group = np.arange(encoded.codes.shape[-1]) // kivi.GROUP
    parts = (part.astype(np.float64) for part in (encoded.scales, encoded.zeros))
    scale, zero = (part[..., None, :] if kind == "K" else part[..., group] for part in parts)
    return encoded.codes * scale + zero, encoded.codes * scale + np.abs(zero)


def _atom(encoded: atom.Encoded) -> tuple[Array, Array]:
    scale, zero = (part.astype(np.float64)[..., None] for part in (encoded.scales, encoded.zeros))
    return (encoded.codes - zero) * scale, (encoded.codes + zero) * scale


def _kvquant(encoded: Any, levels: Array, centre: Array, radius: Array) -> tuple[Array, Array]:
    sparse, codes, centre = encoded.sparse, encoded.codes, centre.astype(np.float64)
    scaled = levels[codes].astype(np.float64) * radius
    values, magnitude = scaled + centre, np.abs(scaled) + np.abs(centre)
    for block in np.ndindex(codes.shape[:-2]):
        at = np.unravel_index(sparse.index[block][: sparse.kept[block]], codes.shape[-2:])
        kept = sparse.values[block][: sparse.kept[block]].astype(np.float64)
        values[block][at] = kept
        magnitude[block][at] = np.abs(kept) + 2 * magnitude[block][at]  # a kernel may correct what the code says
    return values, magnitude


def _turned_magnitude(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos + b * sin, b * cos + a * sin], axis=-1)


def _plain(values: Array, magnitude: Array) -> Keys:
    return Keys(torch.from_numpy(_tokens(values)), torch.from_numpy(_tokens(magnitude)), False)


def _tokens(x: Array) -> Array:
    """(N, G, C, D) -> (G, N * C, D)."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(x.shape[1], -1, x.shape[-1])


def _coded(rotated: Array, magnitude: Array) -> Keys:
    shape = rotated.shape[0], -1, rotated.shape[-1]
    values = hadamard(torch.from_numpy(rotated.reshape(shape)))
    return Keys(values, torch.from_numpy(magnitude.reshape(shape)), True)


def attention(q: Array, keys: list[Keys], values: list[Keys], visible: Array) -> tuple[Array, Array]:
    """softmax(q k / sqrt(D)) v over the visible tokens (T,) bool of all parts in order, and its error bound.

    q (H, D) float32; returns two (H, D) float64: the exact output and the largest error that a float32 kernel may
    have which rotates the query and the output, keeps one running maximum and sums in any order.
    """
    (heads, dim), n = q.shape, int(visible.sum())
    exact = torch.from_numpy(np.asarray(q, np.float64)).reshape(keys[0].values.shape[0], -1, dim)
    shown = torch.from_numpy(visible)
    to_bits = log2(np.e) / dim**0.5
    scores = torch.cat([exact @ part.values.mT for part in keys], -1)[..., shown] * to_bits
    error = torch.cat([_score_error(exact, part) for part in keys], -1)[..., shown] * to_bits
    below = scores.amax(-1, keepdim=True) - scores
    # Relative error of a token's weight: its score's, the subtraction of the maximum (whole, so at most 1 above), exp2.
    relative = torch.expm1(np.log(2) * error + U * (np.log(2) * (below + 2) + 6))
    weights = torch.softmax(scores * np.log(2), -1)

    v = torch.cat([part.values for part in values], -2)[:, shown]
    out = weights @ v
    spread = torch.stack([(weights * relative)[:, h, :, None] * (v - out[:, h, None]).abs()
                          for h in range(out.shape[1])], 1).sum(-2)
    spread = spread / (1 - (weights * relative).sum(-1, keepdim=True)).clamp(min=1e-300)
    block = rotation_block(dim)
    size = torch.cat([_spread_blocks(part.magnitude, block) if part.rotated else part.magnitude for part in values], -2)
    steps = n + 2 * log2(block) + 32  # additions on the way of one value to the output, corrections of V's centre too
    bound = spread + U * steps * (weights @ size[:, shown] + out.abs()) + 1e-37 * size.amax((-1, -2))[:, None, None]
    return out.reshape(heads, dim).numpy(), bound.reshape(heads, dim).numpy()


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """H x over the last axis, from the matrix: H[i, j] = (-1)^popcount(i & j)."""
    block = rotation_block(x.shape[-1])
    i = np.arange(block)
    matrix = torch.from_numpy(1.0 - 2.0 * (np.bitwise_count(i[:, None] & i) % 2))
    return (x.reshape(*x.shape[:-1], -1, block) @ matrix).reshape(x.shape)


def _score_error(q: torch.Tensor, part: Keys) -> torch.Tensor:
    dim = q.shape[-1]
    if not part.rotated:
        # Scales may be folded into the query, RoPE may be turned there or here: four roundings more at most.
        return U * (dim + 8) * (q.abs() @ part.magnitude.mT)
    block = rotation_block(dim)
    # The rotated query is itself off by the additions of its butterflies.
    weight = (dim + 6) * hadamard(q).abs() + (log2(block) + 2) * _spread_blocks(q.abs(), block)
    return U * (weight @ part.magnitude.mT)


def _spread_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Every channel gets the sum over its rotation block."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    return blocks.sum(-1, keepdim=True).expand(blocks.shape).reshape(x.shape)


# The CPU's physical layout (kernels_c/src/pack.h). Regions of an arena are uint8; every function returns copies.

def read_blocks(arena: Array, offset: int, stride: int, kv_heads: int, n: int, nbytes: int) -> Array:
    """(G, N, nbytes) uint8."""
    heads = [np.asarray(arena)[offset + g * stride :][: n * nbytes].reshape(n, nbytes) for g in range(kv_heads)]
    return np.stack(heads)


def read_codes(words: Array, streams: int, length: int, bits: int) -> Array:
    """words (..., bytes), word w of stream s at [w * streams + s] -> codes (..., streams, length); checks padding."""
    words = words.view("<u4").reshape(*words.shape[:-1], -1, streams).swapaxes(-1, -2)
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    assert not stream[..., length * bits :].any(), "bits behind the last code are not zero"
    stream = stream[..., : length * bits].reshape(*stream.shape[:-1], length, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
