"""Plots of bench.quality as PNG: KL against bytes, and one figure per sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.quality_report import Row

STYLE = {"uniform": ("tab:gray", "s"), "kivi": ("tab:blue", "o"), "atom": ("tab:green", "D"),
         "kvquant": ("tab:purple", "^"), "kvtuner": ("tab:brown", "v"), "cocktail": ("tab:orange", "P")}
WIDEST = 7  # bits per value that are plotted: nobody asks which 8 bits are best
BUDGET_STYLE = {("hybrid", False): "tab:pink", ("hybrid", True): "tab:red", ("attention", True): "black"}


def plot_quality(rows: Sequence[Row], path: str) -> None:
    """Mean KL with its interval against bits per value; the budget as a curve per scorer, the others as points."""
    figure, axes = _axes("bits per context value, all metadata counted", "KL to the FP16 cache, nats per token")
    rows = [row for row in rows if row["bpv"] <= WIDEST]
    for (scorer, pairs), colour in BUDGET_STYLE.items():
        points = sorted((r["bpv"], r["kl"], r["kl_low"], r["kl_high"]) for r in rows if r["policy"] == "budget"
                        and r["scorer"] == scorer and not r["match"] and ("pairs" in r["options"]) == pairs)
        if points:
            x, y, low, high = zip(*points, strict=True)
            axes.plot(x, y, "-o", color=colour, markersize=4,
                      label=f"budget{' with pairs' if pairs else ''}, {scorer}")
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    seen = set()
    for row in rows:
        if row["policy"] not in STYLE:
            continue
        colour, marker = STYLE[row["policy"]]
        axes.plot(row["bpv"], row["kl"], marker, color=colour, markersize=6,
                  label=None if row["policy"] in seen else row["policy"])
        seen.add(row["policy"])
        label = row["setting"].removeprefix("uniform ").removeprefix("cocktail/")
        axes.annotate(label, (row["bpv"], row["kl"]), textcoords="offset points",
                      xytext=(5, 3), fontsize=6, color=colour)
    _save(figure, axes, path)


def plot_sweep(points: Sequence[tuple[str, Sequence[tuple[float, Row]]]], label: str, path: str,
               log: bool = False) -> None:
    """points: per line its name and (x, row); KL with intervals, and beside each point its bits per value."""
    figure, axes = _axes(f"{label} (beside the points: bits per value)", "KL to the FP16 cache, nats per token")
    for name, line in points:
        x = [at for at, _ in line]
        y = [row["kl"] for _, row in line]
        spread = [[row["kl"] - row["kl_low"] for _, row in line], [row["kl_high"] - row["kl"] for _, row in line]]
        axes.errorbar(x, y, yerr=spread, marker="o", markersize=4, capsize=2, label=name)
        for at, row in line:
            axes.annotate(f"{row['bpv']:.1f}", (at, row["kl"]), textcoords="offset points", xytext=(4, 4), fontsize=6)
    if log:
        ticks = sorted({at for _, line in points for at, _ in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    _save(figure, axes, path)


def figure_class() -> Any:
    """Matplotlib's Figure. SystemExit where there is none: bench.quality asks before it measures for an hour."""
    try:
        from matplotlib.figure import Figure  # no backend, no window
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install matplotlib, or leave --plot out") from error
    return Figure


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure = figure_class()(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    return figure, axes


def _save(figure: Any, axes: Any, path: str) -> None:
    axes.legend(fontsize=7)
    figure.savefig(path)
