"""After the tests: which widths, head dimensions and group sizes the attention cases covered, as one table."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from strategies import COVERAGE, LONG


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not COVERAGE["cases"]:
        return
    write = terminalreporter.write_line
    terminalreporter.section("decode attention: cases per K width x V width x head_dim x group size")
    rows = {key: n for key, n in COVERAGE.items() if isinstance(key, tuple)}
    groups = sorted({group for *_, group in rows})
    write("  K   V    D  " + "".join(f"{f'x{group}':>5}" for group in groups) + "  all")
    lines: Counter[tuple[int, int, int]] = Counter()
    for (k, v, dim, _), n in rows.items():
        lines[k, v, dim] += n
    for (k, v, dim), total in sorted(lines.items()):
        cells = "".join(f"{rows.get((k, v, dim, group)) or '.':>5}" for group in groups)
        write(f"{k:3} {v:3} {dim:4}  {cells}{total:5}")
    widths = Counter((k, v) for k, v, *_ in rows)
    write(f"{COVERAGE['cases']} cases, {len(widths)} of 25 pairs of widths, {len(rows)} combinations, "
          f"{COVERAGE['long']} cases ({COVERAGE['long'] / COVERAGE['cases']:.0%}) longer than {LONG} tokens")


# Under pytest-xdist every worker counts for itself and hands its counts to the process that prints.

def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["coverage"] = list(COVERAGE.items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    for key, n in getattr(node, "workeroutput", {}).get("coverage", ()):
        COVERAGE[tuple(key) if isinstance(key, list) else key] += n
