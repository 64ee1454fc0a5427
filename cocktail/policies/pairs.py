"""What a model's layers need, from a JSON file: pairs of K and V bits per layer (KVTuner), and what fewer bits cost.

    {"version": 1, "pairs": ["K8V4", "K4V2", ...]}                       one pair per layer

`python -m cocktail.tune` writes more: under "model" what the file was made for, which is then checked; under "pareto"
every trade-off that it found, as {"bits": mean bits per value, "kl": ..., "pairs": [...]}; and under "losses" what
each layer's K, and V, costs at each width by itself: {"K": {"2": [nats, one per layer], "3": ..., "4": ..., "8": ...},
"V": ...}.

Policies take such a file in three ways. `kvtuner` stores every chunk at its layer's pair. `cocktail` takes the pair as
the layer's floor: a chunk whose tier is t is stored at max(t, pair), for K and for V by itself. `budget` looks at the
losses alone (cocktail.policies.path).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.errors import PlanError
from runtime.plan import HIDDEN, DocumentShape, Tier

if TYPE_CHECKING:
    from runtime.model import Model as Engine

VERSION = 1  # of the file
_SAMPLED = 64  # rows of the embedding that the fingerprint reads
LOSS_WIDTHS = (2, 3, 4, 8)  # of a file's losses; 16 bits lose nothing
_LEAST_LOSS = 1e-12  # nats: more bits are always better, be it by less than could be measured


class _OfModel:
    """What per-layer data of a file has in common. model: n_layers, n_kv_heads, head_dim and fingerprint of the model
    that it is for, as far as the file records them. source: the file's name, for messages."""

    model: dict[str, Any]
    source: str

    @property
    def layers(self) -> int:
        raise NotImplementedError

    def check(self, shape: DocumentShape) -> None:
        """Raises PlanError unless the file has as many layers as the model, and the recorded sizes are the model's."""
        if self.layers != shape.n_layers:
            raise PlanError(f"pairs file {self.source} is for {self.layers} layers; the model has {shape.n_layers} "
                            "layers; make a file for this model with python -m cocktail.tune")
        for name in ("n_layers", "n_kv_heads", "head_dim"):
            if name in self.model and self.model[name] != (actual := getattr(shape, name)):
                raise PlanError(f"pairs file {self.source} is for a model whose {name} is {self.model[name]!r}; this "
                                f"one's is {actual}; make a file for this model with python -m cocktail.tune")

    def check_model(self, engine: Engine) -> None:
        """Raises PlanError where the file records the fingerprint of another model."""
        recorded = self.model.get("fingerprint")
        if recorded is not None and recorded != (actual := fingerprint(engine)):
            raise PlanError(f"pairs file {self.source} is for the model with fingerprint {recorded!r}; this one's is "
                            f"{actual!r}; make a file for this model, or take the fingerprint out of the file")


@dataclass(frozen=True)
class LayerPairs(_OfModel):
    """pairs: one Tier per layer."""

    pairs: tuple[Tier, ...]
    model: dict[str, Any]
    source: str

    @property
    def layers(self) -> int:
        return len(self.pairs)

    @classmethod
    def load(cls, path: str | Path, bits: float | None = None) -> LayerPairs:
        """The file's choice, or the most accurate of its trade-offs with at most `bits`. Raises PlanError."""
        data = _read(path)
        if bits is None:
            return cls._of(path, data, data.get("pairs"))
        entries = _trade_offs(path, data)
        affordable = [entry for entry in entries if entry["bits"] <= bits]
        if not affordable:
            least = min((entry["bits"] for entry in entries), default=float("nan"))
            raise PlanError(f"pairs file {path} has no trade-off of at most {bits:g} bits; its least is {least:.3f}")
        return cls._of(path, data, affordable[0]["pairs"])

    @classmethod
    def _of(cls, path: str | Path, data: dict[str, Any], pairs: Any) -> LayerPairs:
        if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, str) for pair in pairs):
            raise PlanError(f'pairs file {path}: "pairs" is not a list of pairs such as "K4V2", one per layer')
        try:
            tiers = tuple(Tier.parse(pair) for pair in pairs)
        except PlanError as error:
            raise PlanError(f"pairs file {path}: {error}") from None
        if HIDDEN in tiers:
            raise PlanError(f"pairs file {path}: K0V0 stores nothing; expected widths from 2 to 16")
        return cls(tiers, _model(path, data), str(path))

    def lift(self, tier: Tier, layer: int) -> Tier:
        """What a chunk of that tier is stored at in that layer; a chunk that is not stored stays so."""
        pair = self.pairs[layer]
        return tier if tier == HIDDEN else Tier(max(tier.k_bits, pair.k_bits), max(tier.v_bits, pair.v_bits))


@dataclass(frozen=True)
class LayerLosses(_OfModel):
    """k[width], v[width]: what K, V costs at that width while everything else is exact, in nats, one per layer."""

    k: dict[int, tuple[float, ...]]
    v: dict[int, tuple[float, ...]]
    model: dict[str, Any]
    source: str

    @property
    def layers(self) -> int:
        return len(self.k[LOSS_WIDTHS[0]])

    @classmethod
    def load(cls, path: str | Path) -> LayerLosses:
        """Raises PlanError, also where the file has pairs only."""
        data = _read(path)
        losses = data.get("losses")
        if losses is None:
            raise PlanError(f'pairs file {path} has no "losses", which policy budget goes by; make a file with python '
                            "-m cocktail.tune, or take policy kvtuner or cocktail, which read pairs alone")
        return cls(_losses(path, losses, "K"), _losses(path, losses, "V"), _model(path, data), str(path))

    def of(self, tiers: Sequence[Tier], layer: int) -> npt.NDArray[np.float64]:
        """What each tier costs in that layer, (len(tiers),)."""
        return np.array([_loss(self.k, tier.k_bits, layer) + _loss(self.v, tier.v_bits, layer) for tier in tiers])


def load_pairs(pairs: str | Path | LayerPairs | None, bits: float | None) -> LayerPairs | None:
    """What the policies' options `pairs` and `pairs_bits` mean. Raises PlanError."""
    if pairs is None and bits is not None:
        raise PlanError(f"pairs_bits is {bits:g}, but there is no pairs file to choose from; give pairs")
    if pairs is None or (isinstance(pairs, LayerPairs) and bits is None):
        return pairs
    if isinstance(pairs, LayerPairs):
        raise PlanError("pairs_bits chooses from a pairs file; these pairs are chosen already")
    return LayerPairs.load(pairs, bits)


def fingerprint(engine: Engine) -> str:
    """16 hexadecimal digits that differ between models: from its norms and some rows of its embedding.

    The same on every backend, whatever it makes of the matrices. An adapter that changes neither keeps it.
    """
    config, backend, weights = engine.config, engine.backend, engine.weights
    rows = min(_SAMPLED, config.vocab_size)
    sample = backend.empty((rows, config.hidden_size), np.float32)
    ids = np.linspace(0, config.vocab_size - 1, rows).astype(np.int32)
    backend.embed(backend.upload(ids), weights.embed, sample)
    vectors = [weights.norm, *(norm for layer in weights.layers for norm in (layer.attn_norm, layer.mlp_norm)), sample]
    digest = hashlib.sha256()
    for vector in vectors:
        digest.update(np.ascontiguousarray(backend.download(vector), np.float32).tobytes())
    return digest.hexdigest()[:16]


def _read(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"pairs file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"pairs file {path} is not valid JSON: {error}") from None
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version != VERSION:
        raise PlanError(f'pairs file {path}: "version" is {version!r}; expected {VERSION}')
    return dict(data)


def _model(path: str | Path, data: dict[str, Any]) -> dict[str, Any]:
    model = data.get("model", {})
    if not isinstance(model, dict):
        raise PlanError(f'pairs file {path}: "model" is not an object')
    return model


def _losses(path: str | Path, losses: Any, side: str) -> dict[int, tuple[float, ...]]:
    """One side of "losses" by width. Raises PlanError unless all widths have as many finite numbers, none negative."""
    rows = losses.get(side) if isinstance(losses, dict) else None
    if not isinstance(rows, dict) or rows.keys() != set(map(str, LOSS_WIDTHS)):
        raise PlanError(f'pairs file {path}: "losses" has no "{side}" with the widths '
                        f"{', '.join(map(str, LOSS_WIDTHS))} and no others")
    if not all(isinstance(row, list) and row and all(map(_is_loss, row)) for row in rows.values()):
        raise PlanError(f'pairs file {path}: "losses" of {side} are not lists of nats, one per layer')
    if len({len(row) for row in rows.values()}) > 1:
        raise PlanError(f'pairs file {path}: "losses" of {side} are for different numbers of layers')
    return {width: tuple(map(float, rows[str(width)])) for width in LOSS_WIDTHS}


def _is_loss(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value >= 0


def _loss(by_width: Mapping[int, tuple[float, ...]], bits: int, layer: int) -> float:
    return 0.0 if bits == 16 else max(by_width[bits][layer], _LEAST_LOSS / bits)


def _trade_offs(path: str | Path, data: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of "pareto", the least KL first."""
    pareto = data.get("pareto")
    if not isinstance(pareto, list) or not all(map(_is_entry, pareto)):
        raise PlanError(f'pairs file {path}: "pareto" is not a list of trade-offs to choose from')
    return sorted(pareto, key=lambda entry: (entry["kl"], entry["bits"]))


def _is_entry(entry: Any) -> bool:
    return (isinstance(entry, dict) and "pairs" in entry
            and all(isinstance(entry.get(name), (int, float)) and isfinite(entry[name]) for name in ("bits", "kl")))
