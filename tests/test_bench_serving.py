"""bench.throughput and bench.soak on a tiny model: the tables hold what they promise; a soak notices what it is for."""

from __future__ import annotations

import json
import threading

import pytest

import cocktail
from bench import throughput
from bench.soak import kinds, soak
from runtime.batch import Member
from runtime.schedule import Schedule


def test_throughput_measures_every_method_at_every_size(path, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(throughput, "read_buffer", lambda: throughput.np.ones(1 << 17, "int64"))
    throughput.main(["--model", str(path), "--threads", "1", "--context-tokens", "96", "--tokens", "4", "--batch",
                     "1,3", "--kv-bits", "5", "--plot", str(tmp_path / "plot.png")])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    points = {(point["method"], point["batch"]): point for point in record["points"]}
    assert points.keys() == {(method, batch) for method in ("fp16", "budget") for batch in (1, 3)}
    assert all(point["end_to_end"] > 0 and point["decode"] > 0 for point in points.values())
    assert points["budget", 3]["cache_bytes"] < points["fp16", 3]["cache_bytes"] == 3 * points["fp16", 1]["cache_bytes"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        throughput.main(["--model", str(path), "--cpu-time"])


def test_soak(path):
    """200 requests; what a quarter as many leave behind before them is the warm-up's."""
    model, threads = cocktail.load(path, backend="cpu", threads=1), threading.active_count()
    outcome = soak(model.engine, kinds(model, longest=300), n=200, seed=2, gap=0.004)
    assert outcome.good and min(outcome.completed, outcome.cancelled, outcome.failed) >= 10, outcome
    assert threading.active_count() == threads


def test_soak_notices_wrong_ids_and_requests_that_hold_memory(path, monkeypatch):
    model = cocktail.load(path, backend="cpu", threads=1)
    with monkeypatch.context() as patched:
        patched.setattr(Member, "last", property(lambda self: 3))
        assert soak(model.engine, kinds(model, longest=100), n=12, seed=2, gap=0.002).lost > 0
    leaked, end = [], Schedule._end

    def leak(self, entry, error):
        leaked.append(bytearray(b"x" * 2**21))
        end(self, entry, error)

    monkeypatch.setattr(Schedule, "_end", leak)
    assert not soak(model.engine, kinds(model, longest=100), n=12, seed=2, gap=0.002).good
