"""A Plan as compact JSON and back: every distinct assignment once, one digit per chunk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from runtime import plan_checks as checks
from runtime.errors import PlanError
from runtime.plan import CalibrationFile, DocumentShape, Layout, Plan, Tier

VERSION = 4
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # one per tier; there are at most 26 distinct tiers
_FIELDS = {"version", "policy", "scorer", "notes", "shape", "tiers", "assignments", "layers", "scores", "permutation",
           "in_place", "formats", "flush", "calibration"}


def write(plan: Plan) -> str:
    """The inverse of read."""
    layout = plan.layout
    distinct = dict.fromkeys(plan.assignment)
    index = {assignment: i for i, assignment in enumerate(distinct)}
    return json.dumps({
        "version": VERSION,
        "policy": plan.policy,
        "scorer": plan.scorer,
        "notes": plan.notes,
        "shape": {f.name: getattr(layout, f.name) for f in fields(DocumentShape)},
        "tiers": [str(tier) for tier in layout.tiers],
        "assignments": ["".join(_DIGITS[tier] for tier in assignment) for assignment in distinct],
        "layers": [index[assignment] for assignment in plan.assignment],
        "scores": plan.scores,
        "permutation": plan.permutation,
        "in_place": layout.in_place is not None,
        "formats": layout.formats,
        "flush": layout.flush,
        "calibration": None if (file := layout.calibration) is None else [file.path, file.digest],
    }, separators=(",", ":"), allow_nan=False)


def read(text: str) -> Plan:
    """Raises PlanError on anything but what write gives; never another exception."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, TypeError, RecursionError) as error:
        raise PlanError(f"plan is not valid JSON: {error}") from None
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version != VERSION:
        raise PlanError(f"plan version is {checks.show(version)}; expected {VERSION}; make a new plan")
    _keys("plan", data, _FIELDS)
    shape = _typed(data, "shape", dict)
    _keys("plan shape", shape, {f.name for f in fields(DocumentShape)})
    checks.integer("n_layers", shape["n_layers"], 1)
    checks.integer("n_chunks", shape["n_chunks"], 0)
    tiers = tuple(Tier.parse(tier) for tier in _strings(data, "tiers"))
    written = _strings(data, "assignments")
    layers = tuple(_typed(data, "layers", list))
    checks.indices("plan layers", layers, shape["n_layers"], len(written))
    assignments = [_tier_indices(i, digits, tiers, shape["n_chunks"], layers) for i, digits in enumerate(written)]
    counts = [checks.per_tier(assignment, len(tiers)) for assignment in assignments]
    placed = tuple(assignments[i] for i in layers)
    layout = Layout(**shape, tiers=tiers, counts=tuple(counts[i] for i in layers),
                    in_place=placed if _typed(data, "in_place", bool) else None,
                    formats=_typed(data, "formats", str), flush=data["flush"], calibration=_calibration(data))
    return Plan(
        layout=layout, assignment=placed, policy=data["policy"], scorer=data["scorer"],
        scores=None if data["scores"] is None else tuple(map(_float, _typed(data, "scores", list))),
        notes=tuple(_strings(data, "notes")),
        permutation=None if data["permutation"] is None else tuple(_typed(data, "permutation", list)))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a field appears twice")
    return data


def _keys(name: str, data: Mapping[str, Any], expected: set[str]) -> None:
    missing, extra = sorted(expected - data.keys()), sorted(data.keys() - expected)
    if missing or extra:
        raise PlanError(f"{name} lacks {checks.show(missing)} and has unknown fields {checks.show(extra)}")


def _typed(data: Mapping[str, Any], key: str, expected: type) -> Any:
    return checks.kind(f"plan {key}", data[key], expected)


def _strings(data: Mapping[str, Any], key: str) -> list[str]:
    return [checks.kind(f"an entry of plan {key}", value, str) for value in _typed(data, key, list)]


def _calibration(data: Mapping[str, Any]) -> CalibrationFile | None:
    if data["calibration"] is None:
        return None
    parts = _strings(data, "calibration")
    if len(parts) != 2:
        raise PlanError(f"plan calibration is {checks.show(parts)}; expected a path and a digest")
    return CalibrationFile(*parts)


def _tier_indices(number: int, digits: str, tiers: Sequence[Tier], n_chunks: int,
                  layers: tuple[int, ...]) -> tuple[int, ...]:
    """The tier index of every chunk in one of the assignments."""
    used = f"assignment {number}" + (f" (layer {layers.index(number)})" if number in layers else "")
    if len(digits) != n_chunks:
        raise PlanError(f"{used} has {len(digits)} chunks; expected {n_chunks}, one digit for each")
    known = {digit: tier for tier, digit in enumerate(_DIGITS[:len(tiers)])}
    for chunk, digit in enumerate(digits):
        if digit not in known:
            raise PlanError(f"chunk {chunk} in {used} is at {digit!r}; expected one of "
                            + ", ".join(f"{one} ({tier})" for one, tier in zip(known, tiers, strict=True)))
    return tuple(known[digit] for digit in digits)


def _float(value: Any) -> Any:
    # A tool that rewrites JSON may turn 1.0 into 1; anything else is left for Plan.validate to refuse.
    return float(value) if type(value) is int and value.bit_length() <= 53 else value
