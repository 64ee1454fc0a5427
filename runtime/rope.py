"""RoPE: the cosine and sine of every position, for the five kinds of position scaling.

Row p of a table belongs to position p, column i to the pair of dimensions (i, i + D/2), as Hugging Face rotates
halves. The frequencies follow transformers operation by operation in float32, because at position p an error of one
unit in the last place of a frequency is already an error of p * 6e-8 in the angle. Powers, cosines and sines, whose
last bit differs between libraries and processors, are taken in float64 and rounded once.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from runtime.config import ModelConfig, RopeConfig

F32 = npt.NDArray[np.float32]


def rope_tables(config: ModelConfig, prompt_tokens: int, total_tokens: int) -> tuple[F32, F32]:
    """(cos, sin), each (total_tokens, D/2) float32, with yarn's attention factor folded into both.

    Only dynamic NTK depends on prompt_tokens: its frequencies are those of the sequence's length when a row is first
    used, so rows below prompt_tokens, which prefill uses together, have those of length prompt_tokens, and each row
    p from there on, used by one decode step, those of length p + 1.
    """
    if not 0 <= prompt_tokens <= total_tokens:
        raise ValueError(f"expected 0 <= prompt_tokens <= total_tokens, got {prompt_tokens} and {total_tokens}")
    cos = np.empty((total_tokens, config.head_dim // 2), np.float32)
    sin = np.empty_like(cos)
    scale = np.float32(attention_factor(config.rope))

    def fill(start: int) -> None:
        positions = np.arange(start, min(start + _ROWS, total_tokens))
        angles = positions.astype(np.float32)[:, None] * _frequencies(config, positions, prompt_tokens)
        exact = angles.astype(np.float64)
        rows = slice(start, start + len(positions))
        cos[rows] = np.cos(exact).astype(np.float32) * scale
        sin[rows] = np.sin(exact).astype(np.float32) * scale

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy computes outside the interpreter's lock
        list(pool.map(fill, range(0, total_tokens, _ROWS)))
    return cos, sin


_ROWS = 1024  # rows that a thread computes at a time: bounds the float64 scratch


def _frequencies(config: ModelConfig, positions: npt.NDArray[np.int64], prompt_tokens: int) -> F32:
    """Angle per token, float32: (1, D/2), or (len(positions), D/2) where dynamic NTK gives each row its own."""
    rope, head_dim = config.rope, config.head_dim
    if rope.kind == "dynamic":
        lengths = np.maximum(positions + 1, prompt_tokens)
        return _inverse(_dynamic_theta(rope, head_dim, config.max_positions, lengths)[:, None], head_dim)
    plain = _inverse(np.float32(rope.theta), head_dim)[None]
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim)
    return plain


def _powers(theta: F32 | np.float32, head_dim: int) -> F32:
    """theta ** (2i / D) for i below D/2."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.asarray(theta, np.float64), exponents.astype(np.float64)).astype(np.float32)


def _inverse(theta: F32 | np.float32, head_dim: int) -> F32:
    """RoFormer (arXiv:2104.09864), section 3.2.2: theta ** (-2i / D)."""
    return np.float32(1) / _powers(theta, head_dim)


def _dynamic_theta(rope: RopeConfig, head_dim: int, max_positions: int, lengths: npt.NDArray[np.int64]) -> F32:
    """(len(lengths),) float32: the base for a sequence of each length; theta itself up to max_positions.

    "Dynamic NTK" of YaRN (arXiv:2309.00071), sections 3.1 and 3.3: theta * (factor * length / max - (factor - 1))
    ** (D / (D - 2)).
    """
    f32 = np.float32
    stretched_to = np.maximum(lengths, max_positions).astype(f32)
    stretch = f32(rope.factor) * stretched_to / f32(max_positions) - f32(rope.factor - 1)
    grown = np.power(stretch.astype(np.float64), head_dim / (head_dim - 2)).astype(f32) * f32(rope.theta)
    return np.where(lengths > max_positions, grown, f32(rope.theta))


def _llama3(rope: RopeConfig, plain: F32) -> F32:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, those between interpolated."""
    assert rope.original_max_positions is not None
    original, f32 = rope.original_max_positions, np.float32
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = (f32(1) / plain) * f32(2 * math.pi)  # scalar / tensor in torch: the reciprocal, then the product
    smooth = ((f32(1) / wavelength) * f32(original) - f32(low)) / f32(high - low)
    between = (f32(1) - smooth) * plain / f32(rope.factor) + smooth * plain
    is_long = wavelength > f32(original / low)
    is_short = wavelength < f32(original / high)
    return np.where(is_long, plain / f32(rope.factor), np.where(is_short, plain, between))


def _yarn(rope: RopeConfig, head_dim: int) -> F32:
    """YaRN, section 3.2 ("NTK-by-parts"): dimensions that turn often are kept, slow ones stretched by the factor."""
    assert rope.original_max_positions is not None
    powers = _powers(np.float32(rope.theta), head_dim)[None]
    kept, stretched = np.float32(1) / powers, np.float32(1) / (np.float32(rope.factor) * powers)

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns this often over the original positions."""
        positions = float(rope.original_max_positions or 0)
        return head_dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    keep = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    frequencies: F32 = stretched * (np.float32(1) - keep) + kept * keep
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 but for yarn, where q.k grows as its context does (YaRN, section 3.4)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)
