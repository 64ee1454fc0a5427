"""The baselines that the papers compare with: kivi, atom, kvquant. Every token at one width, whatever the question.

They pack while decoding too, in whole chunks: what stays FP16 is the prefix (chat header), as under every policy here,
and a window of the last tokens, `residual` of them and up to a chunk more. There is no sink. Chunks of the context that
lie in that window when the prompt has been read are in the tail, FP16, until they have left it: the Layout has so many
chunks fewer and as many tokens more of remainder, and neither its bits per value nor its counts include them. Chunks
that a sliding window hides are not stored. How the values are stored: runtime.formats.kivi, .atom, .kvquant.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cocktail.policies import Policy, plan_of
from cocktail.policies.formats import Formats
from cocktail.scorers import Scores
from runtime.errors import PlanError
from runtime.formats import WIDTHS
from runtime.plan import HIDDEN, DocumentShape, Layout, Plan, Tier

if TYPE_CHECKING:
    from runtime.model import Model as Engine


class _Baseline(Policy):
    uses_scores = False
    layout_needs_scores = False

    def __init__(self, bits: int, residual: int, calibration: str | Path | None = None):
        if type(bits) is not int or bits not in WIDTHS[self.name]:
            raise PlanError(f"policy {self.name}: bits is {bits!r}; expected one of "
                            f"{', '.join(map(str, WIDTHS[self.name]))}")
        if type(residual) is not int or residual < 0:
            raise PlanError(f"policy {self.name}: residual is {residual!r}; expected a number of tokens, 0 or more")
        self.tier, self.residual = Tier(bits, bits), residual
        self.formats = Formats.load(self.name, self.name, calibration)

    def layout(self, shape: DocumentShape, scores: Scores | None = None) -> Layout:
        self.formats.check_shape(shape)
        missing = self.residual - shape.remainder - shape.suffix
        moved = min(max(-(-missing // shape.chunk), 0), shape.n_chunks)  # chunks that the window reaches into
        sizes = {f.name: getattr(shape, f.name) for f in fields(DocumentShape)} | {
            "n_chunks": shape.n_chunks - moved, "remainder": shape.remainder + moved * shape.chunk}
        hidden = min(len(shape.hidden_chunks()), shape.n_chunks - moved)
        counts = (shape.n_chunks - moved - hidden, hidden)
        return Layout(**sizes, tiers=(self.tier, HIDDEN), counts=(counts,) * shape.n_layers, formats=self.name,
                      flush=self.residual, calibration=self.formats.file)

    def assign(self, layout: Layout, scores: Scores | None = None, scorer: str = "none") -> Plan:
        tiers = [1] * layout.counts[0][1] + [0] * layout.counts[0][0]
        return plan_of(layout, np.array(tiers, np.int64), self.name, scorer, None)

    def check_model(self, engine: Engine) -> None:
        self.formats.check_model(engine)


class KiviPolicy(_Baseline):
    """bits: 4 or 2 as published, also 3 and 8. residual: tokens that stay FP16 at least, 128 as published.

    The published code keeps the last T mod R tokens of K and R of V; here both keep R, so never less. Its groups are 32
    tokens of K and 32 channels of V: here a group of K is a chunk. Raises PlanError.
    """

    name = "kivi"

    def __init__(self, bits: int = 4, residual: int = 128):
        super().__init__(bits, residual)


class AtomPolicy(_Baseline):
    """Atom's cache at its 4 bits, without its quantized weights and activations. No residual window: at most a chunk
    less one token waits for the rest of its chunk in FP16, where the published code packs every token at once."""

    name = "atom"

    def __init__(self) -> None:
        super().__init__(4, 0)


class KvquantPolicy(_Baseline):
    """bits: 2, 3 or 4 (nuq2, nuq3, nuq4), with 1 % of outliers. calibration: a file made by python -m
    cocktail.calibrate kvquant. No residual window, as under atom. Raises PlanError."""

    name = "kvquant"

    def __init__(self, bits: int = 4, calibration: str | Path | None = None):
        super().__init__(bits, 0, calibration)
