"""RoPE as the pre-RoPE formats use it: turned back when K is packed, turned again when it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def turn_back(x: npt.NDArray[Any], cos: npt.NDArray[Any], sin: npt.NDArray[Any]) -> F32:
    """What stood before RoPE: halves (a, b) of x (..., D) become (a*c + b*s, b*c - a*s).

    cos, sin (..., D/2) float32, the rows of the run's tables at x's positions. Products are rounded before the sum; the
    result is not rounded to FP16 again. It inverts RoPE because c*c + s*s is 1: tables scaled by an attention factor
    (yarn) will not do.
    """
    a, b = _halves(x)
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


def turn(x: npt.NDArray[Any], cos: npt.NDArray[Any], sin: npt.NDArray[Any]) -> F32:
    """RoPE: (a*c - b*s, b*c + a*s)."""
    a, b = _halves(x)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _halves(x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    x = x.astype(np.float32) if x.dtype == np.float16 else x
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
