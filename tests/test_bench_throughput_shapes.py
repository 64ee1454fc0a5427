"""bench.throughput for known sizes, without a GPU: sequences are copies that decode alike, memory ends their number."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

import tiny_model

import cocktail
from bench import throughput
from bench import throughput_shapes as bench

CONTEXT, TOKENS = 512, 13


@pytest.fixture
def model(tmp_path, monkeypatch):
    """On the CPU; the arena of the fourth sequence finds no memory."""
    model = cocktail.load(tiny_model.save_tiny_model(tmp_path), backend="cpu", threads=1).engine
    monkeypatch.setattr(bench, "cupy", SimpleNamespace(empty=np.empty, get_default_memory_pool=lambda: SimpleNamespace(
        free_all_blocks=lambda: None)))
    monkeypatch.setattr(bench, "release", lambda: None)
    monkeypatch.setattr(bench, "unread_weights", lambda model: 0)
    monkeypatch.setattr("bench.policies.unread_weights", lambda model: 0)
    arena, made = model.backend.arena, []

    def short(nbytes):
        made.append(nbytes)
        if len(made) > 5:  # the prompt is read twice
            raise MemoryError("none left")
        return arena(nbytes)

    monkeypatch.setattr(model.backend, "arena", short)
    return model


def measured(model, tmp_path, method, **changes):
    args = Namespace(**{"tokens": TOKENS, "most": 64, "limit": 60.0} | changes)
    return list(bench.measure(model, CONTEXT, method, 100.0, 1e9, args, bench.time.perf_counter(), tmp_path))


def test_sizes_double_until_memory_is_full(model, tmp_path):
    points = measured(model, tmp_path, "fp16")
    assert [(point.batch, point.full) for point in points] == [(1, False), (2, False), (4, False), (4, True)]
    assert points[2].cache_bytes == 4 * points[0].cache_bytes


@pytest.mark.parametrize(("method", "scores"), [("mix", True), ("K4V4", False)])
def test_points_count_what_they_say(model, tmp_path, method, scores):
    points = measured(model, tmp_path, method, most=2)
    assert [point.batch for point in points] == [1, 2]
    for point in points:
        assert (point.read > 100) == scores
        assert point.decode == pytest.approx(point.batch / point.step)
        seconds = point.batch * point.read + (TOKENS - 1) * point.step
        assert point.end_to_end == pytest.approx(point.batch * TOKENS / seconds)


def test_no_size_begins_when_time_is_up(model, tmp_path):
    assert measured(model, tmp_path, "fp16", limit=0.0) == []


def test_sequences_that_differ_end_it(model, tmp_path, monkeypatch):
    step, count = bench.Decoder.step, iter(range(100))
    monkeypatch.setattr(bench.Decoder, "step", lambda self, members: [
        one + next(count) for one in step(self, members)])
    with pytest.raises(RuntimeError, match="2 equal sequences drew 2 different ids"):
        measured(model, tmp_path, "fp16")


def test_a_shape_is_measured_on_the_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "main", calls.append)
    throughput.main(["--shape", "mistral-7b"])
    assert calls == [["--shape", "mistral-7b"]]


def test_the_table_and_the_goals(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    points = [bench.Point(32768, method, batch, full, 2.0, step, 0.03, batch / step, 4.0, 900.0, batch << 30)
              for method, batch, full, step in (("fp16", 4, False, 0.02), ("fp16", 7, True, 0.035),
                                                ("mix", 8, False, 0.02), ("mix", 30, True, 0.06))]
    record = {"shape": "mistral-7b", "device": "a GPU", "tokens": TOKENS, "scorer": "bm25", "failed": {"atom": "no"},
              "points": [asdict(point) for point in points]}
    (tmp_path / "record.json").write_text(json.dumps(record))
    throughput.main(["--shape", "mistral-7b", "--show", str(tmp_path / "record.json"),
                     "--plot", str(tmp_path / "plot.png")])
    shown = capsys.readouterr().out
    assert "7 (full)" in shown and "4.29 times the sequences, met" in shown
    assert "2.50 times the tokens per second" in shown
    assert "MISSED (goal: at least 3)" in shown
    assert (tmp_path / "plot-32768.png").read_bytes().startswith(b"\x89PNG")
