"""What CUDA tests share, and after the tests: what the properties tried, a table each."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from strategies import LONG, NOTES, TRIED

AXES = {
    "decode attention": ("K", "V", "head_dim", "group"),
    "packing": ("kind", "bits", "head_dim", "chunk"),
    "prefill attention": ("head_dim", "rows", "window", "group"),
    "attention mass": ("head_dim", "rows", "window", "group"),
}


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny model (tiny_model.py), unless a test file has another."""
    from tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(path: Path) -> Any:
    """That model on the CPU."""
    import cocktail

    return cocktail.load(path, backend="cpu", threads=1)


@pytest.fixture(scope="session")
def compiled() -> None:
    """The kernels of every fixed list are on disk. Processes share the work: each in an order of its own, leaving out
    what another has compiled by then. (Threads of one process share a lock of NVRTC's.)"""
    from cuda_kernels import compile_cover

    from kernels_cu.build import architecture_of, compile_all, current_device

    architecture = architecture_of(current_device())
    specs = list(compile_cover(architecture))
    random.Random(os.getpid()).shuffle(specs)
    compile_all(specs, architecture, threads=1 if "PYTEST_XDIST_WORKER" in os.environ else None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """COCKTAIL_PART=i/n: every n-th test, from the i-th on."""
    part, parts = map(int, os.environ.get("COCKTAIL_PART", "0/1").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % parts != part])
    items[:] = items[part::parts]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    write = terminalreporter.write_line
    examples = {name: n for (name, what, *_), n in TRIED.items() if what == "examples"}
    for name in examples:
        cells = {key[2:]: n for key, n in TRIED.items() if key[:2] == (name, "cell")}
        *rows, columns = AXES[name]
        terminalreporter.section(f"{name}: examples per {' x '.join(rows)} (rows) x {columns} (columns)")
        for line in table(cells, rows):
            write(line)
        share = TRIED[name, "long"] / examples[name]
        write(f"{examples[name]} examples, {len(cells)} cells; {share:.1%} of them longer than {LONG} tokens")
    for title, text in NOTES.items():
        terminalreporter.section(title)
        write(text.rstrip())
    if examples:
        terminalreporter.section("examples: " + ", ".join(f"{n} of {name}" for name, n in examples.items())
                                 + f"; {sum(examples.values())} in all")


def table(cells: dict[tuple[Any, ...], int], rows: list[str]) -> list[str]:
    """The last axis across, the others down, sums at the end of each line."""
    columns = sorted({cell[-1] for cell in cells})
    lines: Counter[tuple[Any, ...]] = Counter()
    for cell, n in cells.items():
        lines[cell[:-1]] += n
    head = "".join(f"{name:>10}" for name in rows) + "".join(f"{column:>5}" for column in columns) + "   all"
    return [head, *("".join(f"{value:>10}" for value in line)
                    + "".join(f"{cells.get((*line, column)) or '.':>5}" for column in columns) + f"{total:>6}"
                    for line, total in sorted(lines.items()))]


# Under pytest-xdist every worker counts for itself and hands its counts to the process that prints.

def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = list(TRIED.items())
        session.config.workeroutput["notes"] = NOTES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    for key, n in getattr(node, "workeroutput", {}).get("tried", ()):
        TRIED[tuple(key)] += n
    NOTES.update(getattr(node, "workeroutput", {}).get("notes", {}))
