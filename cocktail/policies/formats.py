"""Which family of storage formats (runtime.formats) a policy packs into: its options `formats` and `calibration`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cocktail.policies.pairs import fingerprint
from runtime.calibration import Calibration, load_calibration
from runtime.errors import PlanError
from runtime.formats import FAMILIES, WIDTHS
from runtime.plan import CalibrationFile, DocumentShape, Tier

if TYPE_CHECKING:
    from runtime.model import Model as Engine


@dataclass(frozen=True)
class Formats:
    """family: one of FAMILIES; calibration: kvquant's, None elsewhere."""

    family: str = "rotated"
    calibration: Calibration | None = None

    @classmethod
    def load(cls, policy: str, family: str, calibration: str | Path | None = None) -> Formats:
        """Raises PlanError, in the name of the policy."""
        if family not in FAMILIES:
            raise PlanError(f"policy {policy}: formats are {family!r}; expected one of {', '.join(FAMILIES)}")
        if family != "kvquant":
            if calibration is not None:
                raise PlanError(f"policy {policy}: the {family} formats read no calibration; leave it out")
            return cls(family)
        if calibration is None:
            raise PlanError(f"policy {policy}: the kvquant formats need a calibration, a file made by python -m "
                            "cocktail.calibrate kvquant")
        return cls(family, load_calibration(calibration))

    @property
    def file(self) -> CalibrationFile | None:
        """What a Layout records."""
        return None if self.calibration is None else CalibrationFile(self.calibration.path, self.calibration.digest)

    @property
    def mark(self) -> dict[str, bool]:
        """For cocktail.policies.labelled."""
        return {f"{self.family} formats": self != ROTATED}

    def check(self, policy: str, *tiers: Tier) -> None:
        """Raises PlanError where the family lacks a tier's width."""
        for tier in tiers:
            if not {tier.k_bits, tier.v_bits} <= {16, *WIDTHS[self.family]}:
                raise PlanError(f"policy {policy}: there is no {tier} in the {self.family} formats; their widths are "
                                f"{', '.join(map(str, WIDTHS[self.family]))} and 16")

    def check_shape(self, shape: DocumentShape) -> None:
        """Raises PlanError where the calibration is for a model of other sizes."""
        if self.calibration is not None:
            self.calibration.check(shape.n_layers, shape.n_kv_heads, shape.head_dim)

    def check_model(self, engine: Engine) -> None:
        """Raises PlanError where the calibration records the fingerprint of another model."""
        recorded = None if self.calibration is None else self.calibration.metadata.get("fingerprint")
        if recorded is not None and recorded != (actual := fingerprint(engine)):
            assert self.calibration is not None
            raise PlanError(f"calibration {self.calibration.path} is for the model with fingerprint {recorded!r}; this "
                            f"one's is {actual!r}; make one for it with python -m cocktail.calibrate kvquant")


ROTATED = Formats()
