"""Runs bench.quality's prompts: in this process, or in several that share one GPU; and keeps what was measured."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import cocktail
from bench.prompts import Prompt
from bench.quality_measure import Sample, measure
from bench.quality_settings import FP16, Setting
from bench.report import progress
from cocktail.scorers import Scorer, load_scorer

Found = dict[str, Sample]  # one prompt's, by setting


@dataclass(frozen=True)
class Machine:
    """What a process needs to measure. scorers: those that score texts, by their names in settings; "encoder" is the
    folder `encoder`, and any other name that the scorers do not know a folder of `folders`."""

    model: str
    backend: str
    threads: int | None
    scorers: tuple[str, ...]
    encoders: tuple[tuple[str, str], ...]  # name -> folder
    seed: int


class Worker:
    """A loaded model and scorers."""

    def __init__(self, machine: Machine):
        # A graph would be captured for every cache, and used once.
        self._model = cocktail.load(machine.model, backend=machine.backend, threads=machine.threads, graph=False)
        folders = dict(machine.encoders)
        device = "cpu" if machine.backend == "cpu" else None
        self._scorers: dict[str, Scorer] = {name: load_scorer(folders.get(name, name), device=device)
                                            for name in machine.scorers}
        self._seed = machine.seed

    def measure(self, i: int, prompt: Prompt, settings: Sequence[Setting]) -> Found:
        return measure(self._model, prompt, settings, self._scorers, self._seed + i)


def measure_all(machine: Machine, prompts: Sequence[Prompt], settings: Sequence[Setting], jobs: int,
                done: frozenset[int] = frozenset()) -> Iterator[tuple[int, Found]]:
    """(number of the prompt, its samples), as they come; done: those that are not wanted. Raises CocktailError, naming
    the setting that is refused."""
    if len(done) == len(prompts):
        return
    if jobs == 1:
        worker = Worker(machine)
        for i, prompt in enumerate(prompts):
            if i not in done:
                yield i, worker.measure(i, prompt, settings)
        return
    by_length = sorted(set(range(len(prompts))) - done, key=lambda i: -len(prompts[i].context))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (machine,))
    try:
        # Each setting alone first: its kernels are compiled once, and what is refused is refused before any work.
        shortest = prompts[by_length[-1]]
        alone = [pool.submit(_measure, 0, shortest, group) for group in _groups(settings)]
        for n, tried in enumerate(as_completed(alone), 1):
            tried.result()
            if n == len(alone):
                progress(f"{n} settings tried alone")
        numbers = {pool.submit(_measure, i, prompts[i], settings): i for i in by_length}
        for measured in as_completed(numbers):
            yield numbers[measured], measured.result()
    finally:
        pool.shutdown(cancel_futures=True)


def resume_samples(path: str, asked: dict[str, str], settings: Sequence[Setting]) -> dict[int, Found]:
    """A file of samples: a line of what was asked and of settings, then one per prompt (`append_sample`). Begins it, or
    returns what a run of the same kind has left there; another's is refused."""
    file = Path(path)
    head = json.dumps({"asked": asked, "settings": [asdict(setting) for setting in settings]})
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and lines[0] != head + "\n":
        raise SystemExit(f"{path} holds the samples of other prompts or settings; remove it, or name another")
    whole = [line for line in lines if line.endswith("\n")]
    file.write_text("".join(whole or [head + "\n"]))
    return read_samples(path)[1]


def append_sample(path: str, i: int, found: Found) -> None:
    with Path(path).open("a") as file:
        file.write(json.dumps({"prompt": i, "found": {name: asdict(sample) for name, sample in found.items()}}) + "\n")


def read_samples(path: str) -> tuple[list[Setting], dict[int, Found]]:
    """What a run kept, also one that was cut off: a last line that is not whole is left out."""
    head, *lines = Path(path).read_text().splitlines()
    settings = [Setting(**{**data, "options": tuple(map(tuple, data["options"]))})
                for data in json.loads(head)["settings"]]
    found = {}
    for line in lines:
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            break
        found[data["prompt"]] = {
            name: Sample(**{**sample, "kl": tuple(sample["kl"]), "agree": tuple(sample["agree"])})
            for name, sample in data["found"].items()}
    return settings, found


def pool_samples(paths: Sequence[str]) -> tuple[list[Setting], dict[int, Found]]:
    """What several runs kept, numbered through: the settings that all of them have. That their prompts differ, by seed,
    is the caller's affair."""
    files = [read_samples(path) for path in paths]
    settings = [setting for setting in files[0][0] if all(setting in others for others, _ in files)]
    prompts = [found[i] for _, found in files for i in sorted(found)]
    return settings, dict(enumerate(prompts))


_worker: Worker | None = None  # of this process


def _begin(machine: Machine) -> None:
    global _worker
    _worker = Worker(machine)


def _measure(i: int, prompt: Prompt, settings: Sequence[Setting]) -> Found:
    assert _worker is not None
    return _worker.measure(i, prompt, settings)


def _groups(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Each setting with what it needs: FP16, and the one whose bytes it matches."""
    by_name = {setting.name: setting for setting in settings}
    return [[FP16, *([by_name[setting.match]] if setting.match else []), setting]
            for setting in settings if setting != FP16]
