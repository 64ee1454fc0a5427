"""Cores and memory that this process may use, within its container's limits (Linux; elsewhere a best guess)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_bytes", "usable_cores"]

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores that this process may run on, within the container's CPU quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core(cpu) for cpu in cpus}
    limit, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if limit.isdigit():
        return max(1, min(len(cores), int(limit) // int(period)))
    return len(cores)


def available_bytes() -> int | None:
    """Memory that can still be allocated without swapping; None if the system does not say."""
    free = _field("/proc/meminfo", "MemAvailable:")
    if free is None:
        return None
    limit, used = _read(_CGROUP / "memory.max"), _field(_CGROUP / "memory.stat", "anon")
    if limit.isdigit() and used is not None:  # anonymous memory only: mapped files, such as the weights, can be dropped
        return max(0, min(free * 1024, int(limit) - used))
    return free * 1024


def _core(cpu: int) -> tuple[str, str]:
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    return _read(folder / "physical_package_id"), _read(folder / "core_id") or f"cpu{cpu}"


def _field(path: str | Path, name: str) -> int | None:
    return next((int(line.split()[1]) for line in _read(Path(path)).splitlines() if line.split()[0] == name), None)


def _read(path: Path) -> str:
    """A system file's text; empty where this system has no such file."""
    return path.read_text().strip() if path.exists() else ""
