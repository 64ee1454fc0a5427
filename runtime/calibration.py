"""What the kvquant formats need of a model besides its values: a file that python -m cocktail.calibrate writes.

A .safetensors with, for every layer N, float32 "layers.N.k_centre" and "layers.N.k_half" (G, D) and, for b = 2, 3, 4,
"layers.N.k_levels.b" and "layers.N.v_levels.b" (2^b,), ascending (runtime.formats.kvquant says what they mean).
Metadata: "version", "fingerprint" of the model (cocktail.policies.pairs.fingerprint), "weighting", "tokens".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.checkpoint import SafetensorsFile
from runtime.errors import CheckpointError, PlanError
from runtime.formats import kvquant

VERSION = "1"  # of the file
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerCalibration:
    """k_centre, k_half (G, D); k_levels, v_levels (28,), those of 2, 3 and 4 bits behind one another."""

    k_centre: F32
    k_half: F32
    k_levels: F32
    v_levels: F32


@dataclass(frozen=True)
class Calibration:
    """digest: 16 hexadecimal digits of the file's contents. metadata: as the file has it, all strings."""

    path: str
    digest: str
    metadata: dict[str, str]
    layers: tuple[LayerCalibration, ...]

    def check(self, n_layers: int, n_kv_heads: int, head_dim: int, digest: str | None = None) -> None:
        """Raises PlanError unless it fits such a model; digest: of the file that a plan was made with."""
        found = len(self.layers), *self.layers[0].k_centre.shape
        if found != (n_layers, n_kv_heads, head_dim):
            raise PlanError(f"calibration {self.path} is for {found[0]} layers, {found[1]} KV heads and head_dim "
                            f"{found[2]}; the model has {n_layers}, {n_kv_heads} and {head_dim}; make one for it with "
                            "python -m cocktail.calibrate kvquant")
        if digest is not None and digest != self.digest:
            raise PlanError(f"calibration {self.path} has changed: its digest is {self.digest}, that of the plan's "
                            f"{digest}; make a new plan")


def load_calibration(path: str | Path) -> Calibration:
    """Raises PlanError for a file that is missing, damaged or no calibration."""
    try:
        file = SafetensorsFile(Path(path))
    except CheckpointError as error:
        raise PlanError(f"calibration {error}") from error
    if (version := file.metadata.get("version")) != VERSION:
        raise PlanError(f'calibration {path}: "version" is {version!r}; expected {VERSION!r}')
    n_layers = 0
    while f"layers.{n_layers}.k_centre" in file.entries:
        n_layers += 1
    if not n_layers:
        raise PlanError(f"calibration {path} has no tensor layers.0.k_centre; make one with python -m "
                        "cocktail.calibrate kvquant")
    shape = file.entries["layers.0.k_centre"].shape
    if len(shape) != 2:
        raise PlanError(f"calibration {path}: layers.0.k_centre has shape {shape}; expected (KV heads, head_dim)")

    def tensor(layer: int, name: str, expected: tuple[int, ...]) -> F32:
        full = f"layers.{layer}.{name}"
        entry = file.entries.get(full)
        if entry is None or (entry.dtype, entry.shape) != ("F32", expected):
            found = "is missing" if entry is None else f"is {entry.dtype} {entry.shape}"
            raise PlanError(f"calibration {path}: {full} {found}; expected F32 {expected}")
        values: F32 = np.array(file.tensor(full).data, np.float32)
        if not np.isfinite(values).all():
            raise PlanError(f"calibration {path}: {full} has values that are not finite")
        return values

    def levels(layer: int, kind: str) -> F32:
        parts = [tensor(layer, f"{kind}_levels.{bits}", (2**bits,)) for bits in kvquant.WIDTHS]
        for bits, part in zip(kvquant.WIDTHS, parts, strict=True):
            if (np.diff(part) < 0).any():
                raise PlanError(f"calibration {path}: layers.{layer}.{kind}_levels.{bits} does not ascend")
        return np.concatenate(parts)

    layers = tuple(LayerCalibration(tensor(layer, "k_centre", shape), tensor(layer, "k_half", shape),
                                    levels(layer, "k"), levels(layer, "v")) for layer in range(n_layers))
    for layer, part in enumerate(layers):
        if (part.k_half < 0).any():
            raise PlanError(f"calibration {path}: layers.{layer}.k_half has negative values")
    return Calibration(str(path), file.digest.hex()[:16], file.metadata, layers)
