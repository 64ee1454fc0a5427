"""What a search leaves behind: the pairs file, the table of its trade-offs, the plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cocktail.policies.pairs import VERSION, LayerLosses
from cocktail.tuning.search import Found
from cocktail.tuning.space import Space
from runtime.errors import TuneError


def choose(front: Sequence[Found], even: Sequence[Found], bits: float | None, rival: str) -> Found:
    """The file's own choice: the most accurate trade-off of at most `bits`, else the fewest bits at which KL is no more
    than the rival's in all layers alike, else the most accurate. Raises TuneError where `bits` buys none."""
    if bits is not None:
        affordable = [each for each in front if each.bits <= bits]
        if not affordable:
            raise TuneError(f"no trade-off takes at most {bits:g} bits; the least is {front[0].bits:.3f}")
        return affordable[-1]
    limit = min((each.kl for each in even if str(each.pairs[0]) == rival), default=float("-inf"))
    return next((each for each in front if each.kl <= limit), front[-1])


def write_pairs(path: str | Path, chosen: Found, front: Sequence[Found], even: Sequence[Found], losses: LayerLosses,
                calibration: dict[str, int | None]) -> None:
    """What --pairs reads (cocktail.policies.pairs), and beside it how it came about."""
    data = {"version": VERSION, **_entry(chosen), "model": losses.model, "calibration": calibration,
            "losses": {"K": losses.k, "V": losses.v}, "pareto": [_entry(each) for each in front],
            "even": [_entry(each) | {"pairs": str(each.pairs[0])} for each in even]}
    try:
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror or error}") from error


def print_table(chosen: Found, front: Sequence[Found], even: Sequence[Found], space: Space) -> None:
    """The Pareto set with the even pairs between, fewest bits first, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="mean KL to the FP16 cache, at bits per value with all metadata")
    for name in ("bits", "KL", "pairs"):
        table.add_column(name, justify="left" if name == "pairs" else "right")
    for each in sorted({*front, *even}, key=lambda each: (each.bits, each.kl)):
        counts = Counter(map(str, each.pairs))
        ordered = sorted(counts, key=lambda pair: [str(tier) for tier in space.candidates].index(pair))
        pairs = ", ".join(f"{counts[pair]} {pair}" for pair in ordered)
        table.add_row(f"{each.bits:.3f}", f"{each.kl:.5f}", f"{pairs}, every layer" if each in even else pairs,
                      style="bold green" if each == chosen else None if each in front else "dim")
    Console().print(table)


def draw(path: str | Path, chosen: Found, found: Sequence[Found], front: Sequence[Found],
         even: Sequence[Found]) -> None:
    """KL against bits as a PNG: everything measured, the Pareto set, the even pairs, the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([each.bits for each in found], [each.kl for each in found], s=9, color="0.75", label="measured")
    axes.step([each.bits for each in front], [each.kl for each in front], where="post", color="tab:blue", label="best")
    axes.scatter([each.bits for each in even], [each.kl for each in even], s=24, color="tab:orange",
                 label="the same in every layer")
    for each in even:
        axes.annotate(str(each.pairs[0]), (each.bits, each.kl), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.scatter([chosen.bits], [chosen.kl], s=90, marker="*", color="tab:green", label="chosen", zorder=3)
    axes.set(yscale="log", xlabel="bits per value, metadata included", ylabel="mean KL to the FP16 cache (nats)")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror or error}") from error


def _entry(found: Found) -> dict[str, Any]:
    return {"bits": round(found.bits, 6), "kl": found.kl, "pairs": [str(pair) for pair in found.pairs]}
