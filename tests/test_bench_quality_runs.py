"""bench.quality from the command line: sweeps, samples on disk, plots, a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from quality_samples import run_of, sample
from tiny_model import save_tiny_model

from bench import quality
from bench.quality_plots import plot_quality, plot_sweep
from bench.quality_run import append_sample, pool_samples, read_samples, resume_samples
from bench.quality_settings import FP16, Choice, main_settings
from bench.quality_sweeps import CHUNKS, SWEEPS, sweep_of

EXISTING = ("uniform", "cocktail", "budget", "matched")


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_have_names_of_their_own_and_lines_through_them(name):
    sweep = sweep_of(name, ["encoder", "bm25", "attention"])
    names = [setting.name for setting in sweep.settings]
    assert sweep.settings[0] == FP16 and len(set(names)) == len(names)
    for _, line in sweep.lines:
        assert {setting for _, setting in line} <= set(names) and len(line) > 2
    if name == "chunk":
        assert {setting.chunk for setting in sweep.settings} == set(CHUNKS)
        assert {setting.match for setting in sweep.settings if setting.match} <= set(names)
    assert sweep.beside and all(a != b and {a, b} <= set(names) for a, b in sweep.beside)
    assert not any(setting.policy == "cocktail" and setting.scorer == "attention" for setting in sweep.settings)


def test_samples_survive_a_run_that_was_cut_off(tmp_path):
    settings = main_settings(Choice(groups=EXISTING))
    path = str(tmp_path / "samples.jsonl")
    assert resume_samples(path, {"seed": "1"}, settings) == {}
    for i in (3, 1):
        append_sample(path, i, {setting.name: sample([0.1 * i, 0.2], recalled=0.5) for setting in settings})
    with Path(path).open("a") as file:
        file.write('{"prompt": 4, "found": {"fp')
    read_settings, found = read_samples(path)
    assert read_settings == settings and set(found) == {1, 3}
    assert found[3][settings[2].name] == sample([0.1 * 3, 0.2], recalled=0.5)
    assert set(resume_samples(path, {"seed": "1"}, settings)) == {1, 3}
    append_sample(path, 0, found[1])  # behind whole lines again
    assert set(resume_samples(path, {"seed": "1"}, settings)) == {0, 1, 3}
    for asked, others in (({"seed": "2"}, settings), ({"seed": "1"}, settings[:-1])):
        with pytest.raises(SystemExit, match="other prompts or settings"):
            resume_samples(path, asked, others)


def test_runs_are_pooled_by_the_settings_that_all_have(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for path, groups, kls in zip(paths, (("uniform", "kivi"), ("kivi",)), ((0.1, 0.2), (0.4,)), strict=True):
        settings = main_settings(Choice(groups=groups))
        resume_samples(path, {}, settings)
        for i, kl in enumerate(kls):
            append_sample(path, i, {setting.name: sample([kl]) for setting in settings})
    settings, found = pool_samples(paths)
    assert settings == main_settings(Choice(groups=("kivi",)))
    assert [found[i]["kivi-4"].kl for i in sorted(found)] == [(0.1,), (0.2,), (0.4,)]


def test_plots_are_pictures(tmp_path):
    _, rows = run_of(low=0.014, high=0.01, kivi=0.03, paper=0.02)
    plot_quality(rows, str(tmp_path / "quality.png"))
    plot_sweep([("line", [(8, rows[1]), (16, rows[2])])], "chunk", str(tmp_path / "sweep.png"), log=True)
    for name in ("quality.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_sweep_compares_only_prompts_that_both_settings_have(tmp_path, capsys, monkeypatch):
    """Chunks of 256 are too large for the first prompt, those of 128 for both."""
    samples, plotted = str(tmp_path / "samples.jsonl"), []
    sweep = sweep_of("chunk", ["bm25"])
    resume_samples(samples, {}, sweep.settings)
    for i, kl in enumerate((0.4, 0.1)):
        append_sample(samples, i, {s.name: sample([kl * s.chunk / 32]) for s in sweep.settings if not (
            s.name.startswith("budget@3.3") and (s.chunk == 128 or (s.chunk == 256 and i == 0)))})
    monkeypatch.setattr(quality, "plot_sweep", lambda lines, *_: plotted.extend(lines))
    quality.main(["--sweep", "chunk", "--scorers", "bm25", "--read", samples, "--plot", "unused.png"])
    table = capsys.readouterr().out.partition("prompt by prompt")[2]
    lines = {cells[0]: cells[1:] for line in table.splitlines()
             if len(cells := [cell.strip() for cell in line.split("|")[1:-1]]) == 6}
    like = "budget@3.3/bm25, chunk 32"
    assert lines["budget@3.3/bm25, chunk 64"] == ["2", "0.5000 at 3.30", like, "0.2500 at 3.30", "2.00 (2.00-2.00)"]
    assert lines["budget@3.3/bm25, chunk 256"] == ["1", "0.8000 at 3.30", like, "0.1000 at 3.30", "8.00 (8.00-8.00)"]
    assert lines["budget@3.3/bm25, chunk 128"] == ["0", "", like, "", ""]
    assert [[x for x, _ in points] for _, points in plotted] == [list(CHUNKS), [16, 32, 64], list(CHUNKS)]


def test_a_sweep_without_an_axis_has_no_plot(tmp_path):
    with pytest.raises(SystemExit, match="--sweep encoders varies no number"):
        quality.main(["--sweep", "encoders", "--model", str(tmp_path / "missing"), "--plot", str(tmp_path / "a.png")])


def test_a_plot_that_cannot_be_made_is_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        quality.main(["--model", str(tmp_path / "missing"), "--plot", str(tmp_path / "plot.png")])


def test_a_small_run_from_the_command_line(tmp_path, capsys):
    """Two prompts on a tiny model: the table, the samples and the same report read back from them."""
    files = {name: str(tmp_path / name) for name in ("samples.jsonl", "plot.png", "out.json", "again.json")}
    arguments = ["--model", str(save_tiny_model(tmp_path)), "--backend", "cpu", "--threads", "1", "--quick",
                 "--prompts", "2", "--longest", "1600", "--groups", "uniform", "budget",
                 "--scorers", "bm25", "random", "--plot", files["plot.png"]]
    quality.main([*arguments, "--samples", files["samples.jsonl"], "--json", files["out.json"]])
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    assert record == json.loads((tmp_path / "out.json").read_text())
    assert record["prompts"] == 2 and record["rows"][0]["setting"] == "fp16" and record["rows"][0]["kl"] == 0
    assert "| uniform K4V2 " in printed and "budget@3.3/bm25" in printed
    quality.main([*arguments, "--read", files["samples.jsonl"], "--json", files["again.json"]])
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == record["rows"]
