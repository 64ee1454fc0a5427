"""What every bench shares: where it ran, the memory read rate (its floor), intervals, tables, arguments, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DEFAULT_MODEL = ".models/smollm2-135m.safetensors"
READ_BYTES = 1 << 30  # beyond any cache
ROUNDS = 2000  # of a bootstrap


def describe_run() -> dict[str, Any]:
    """Commit, machine and load of this run, for the record."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True,
                         check=False)
    return {"commit": git.stdout.strip() or "unknown", "cpu": _cpu_name(), "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2), "python": platform.python_version(), "numpy": np.__version__}


def read_rate(data: npt.NDArray[np.int64], threads: int) -> float:
    """Bytes per second at which `threads` threads read `data` once: NumPy's maximum, its fastest plain pass.

    (Its sum of float32 adds pairwise and stays at two thirds of that.)
    """
    parts = np.array_split(data.view(np.int32), threads)
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(np.max, parts))
        return data.nbytes / (time.perf_counter() - begin)


def read_buffer() -> npt.NDArray[np.int64]:
    return np.ones(READ_BYTES // 8, np.int64)


def interval(n: int, statistic: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]) -> tuple[float, float]:
    """95% bootstrap interval over n clusters, whole ones redrawn: tokens of one prompt are not independent.

    statistic: (ROUNDS, n) cluster numbers, one draw a row -> (ROUNDS,).
    """
    draws = statistic(np.random.default_rng(0).integers(n, size=(ROUNDS, n)))
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table, columns aligned."""
    cells = [[str(cell) for cell in row] for row in (header, ["---"] * len(header), *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def verdict(figure: float, goal: float, *, at_most: bool = False) -> str:
    """'met' or 'MISSED', beside the goal."""
    met = figure <= goal if at_most else figure >= goal
    return f"{'met' if met else 'MISSED'} (goal: {'at most' if at_most else 'at least'} {goal:g})"


def progress(text: str) -> None:
    """One line to stderr; stdout holds the report only."""
    print(text, file=sys.stderr, flush=True)


def emit(record: dict[str, Any], path: str | None = None) -> None:
    """The record as the last line of stdout, and as a file. NaN, which JSON does not know, becomes null."""
    line = json.dumps(_without_nan(record), allow_nan=False)
    if path:
        Path(path).write_text(line + "\n")
    print(line, flush=True)


def some_of(known: Collection[str] | None = None, least: int = 1) -> Callable[[str], list[str]]:
    """Parses an argument with commas in it: at least so many names, each one of `known`, none twice."""
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if known is not None and name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known or ())}")
        if len(names) < least or len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"{text!r}; expected different names with commas between them")
        return names

    return parse


def on_gpu(arguments: Sequence[str] | None, figures: Sequence[str], command: str) -> bool:
    """Whether the command line is about the GPU; if so, bench.shapes has measured those figures."""
    if not asks_for_gpu(arguments):
        return False
    from bench import shapes  # needs CuPy

    shapes.main(arguments, figures, command)
    return True


def asks_for_gpu(arguments: Sequence[str] | None) -> bool:
    """Whether the command line has --shape, or --backend cuda."""
    known = _known(arguments)
    return known.backend == "cuda" or known.shape is not None


def names_shape(arguments: Sequence[str] | None) -> bool:
    """Whether the command line has --shape."""
    return _known(arguments).shape is not None


def _known(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend")
    parser.add_argument("--shape")
    return parser.parse_known_args(arguments)[0]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
