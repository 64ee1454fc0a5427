"""How many threads the C kernels take, and what a container leaves of the machine's cores and memory."""

import pytest

from kernels_c import CpuBackend, machine, threads


def test_default_threads_are_no_more_than_cores():
    backend = CpuBackend()
    assert 1 <= backend.threads <= machine.usable_cores() and 1 <= backend.streaming_threads <= machine.usable_cores()


@pytest.mark.parametrize(("seconds", "chosen"), [
    ({1: 1.0, 2: 0.9, 4: 0.5}, 4), ({1: 1.0, 2: 0.5, 4: 0.45}, 2), ({1: 1.0, 2: 1.5}, 1), ({1: 1.0, 2: 0.81}, 1),
    ({1: 1.0, 2: 0.79}, 2), ({1: 1.0, 2: 0.5, 4: 0.45, 8: 0.39}, 8)])
def test_more_threads_must_be_worth_it(monkeypatch, seconds, chosen):
    monkeypatch.setattr(threads, "_time", lambda count, run: seconds[count])
    assert threads._fewest(sorted(seconds), lambda: None) == chosen


@pytest.mark.parametrize(("quota", "most"), [("max 100000", 10**6), ("100000 100000", 1), ("250000 100000", 2),
                                             ("50000 100000", 1), (None, 10**6)])
def test_cores_keep_to_the_containers_quota(monkeypatch, tmp_path, quota, most):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    cores = machine.usable_cores()
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.usable_cores() == min(cores, most)


def test_memory_keeps_to_the_containers_limit(monkeypatch, tmp_path):
    """Less what is anonymous: files that are mapped can be dropped."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("file 900000\nanon 400000\n")
    assert machine.available_bytes() == 600000
    (tmp_path / "memory.max").write_text("300000\n")
    assert machine.available_bytes() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes() > 1000000
