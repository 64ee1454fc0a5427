"""What is wrong with this machine or build, and what to do about it: `diagnose`.

One Finding per thing looked at. Nothing here raises for what it finds; kernels are imported when their turn comes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """area: "install", "cpu", "cuda" or "model". status: warn where Cocktail works, but slower or with less than it
    could; fail where something does not work. advice: what to do, empty after a pass. value: the figure found, where it
    is one: bytes of "memory", bytes per second of "memory rate".
    """

    area: str
    subject: str
    status: Status
    found: str
    advice: str = ""
    value: float | None = None


def diagnose() -> Iterator[Finding]:
    """Everything but the model. Takes a few seconds; on a GPU longer the first time, which compiles kernels."""
    from runtime.diagnosis import cpu, cuda

    yield _install()
    gpu = list(cuda.findings())
    gpu_works = any(finding.subject.startswith("kernels") for finding in gpu) and not failed(gpu)
    yield from cpu.findings(needed=not gpu_works)
    yield from gpu


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.status == "fail" for finding in findings)


def _install() -> Finding:
    try:
        package = version("cocktail-kv")
    except PackageNotFoundError:
        package = "(run from its sources)"
    libc = " ".join(platform.libc_ver()).strip()
    return Finding("install", "versions", "pass", f"cocktail-kv {package}, Python {platform.python_version()}, "
                   f"{platform.system()} {platform.machine()}{f', {libc}' if libc else ''}")
