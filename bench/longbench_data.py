"""The eight LongBench datasets of the Cocktail paper's Table I: lengths, metrics, and their files read.

Scores are comparable only for the same prompts, so the prompt formats are read from LongBench's own file
(dataset2prompt.json), which lies beside the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.longbench_metrics import Metric, classification, code_sim, first_line, qa_f1, rouge_l
from runtime.errors import CocktailError


class DataError(CocktailError):
    """The data folder, one of its files or a line in it is not what LongBench's are."""


@dataclass(frozen=True)
class Dataset:
    """name: its file's. title: its column's. size: its samples in LongBench. max_new: tokens to generate.

    chat: whether the prompt is one user turn of the model's chat format; few-shot and code prompts are continued as
    they stand. first_line: only that is judged. stop: a text whose last token ends the answer. task: what chunks are
    scored against where a sample asks no question of its own; "" for the end of its context.
    """

    name: str
    title: str
    size: int
    max_new: int
    metric: Metric
    chat: bool = True
    first_line: bool = False
    stop: str = ""
    task: str = ""

    def score(self, prediction: str, sample: Sample) -> float:
        """0 to 1: the best over the sample's references."""
        judged = first_line(prediction) if self.first_line else prediction
        return max(self.metric(judged, answer, sample.all_classes) for answer in sample.answers)


@dataclass(frozen=True)
class Sample:
    """One line of a dataset's file. dataset: the name that it gives itself; length: LongBench's count of words."""

    input: str
    context: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...]
    dataset: str
    length: int


DATASETS = {dataset.name: dataset for dataset in (
    Dataset("qasper", "Qasper", 200, 128, qa_f1),
    Dataset("qmsum", "QMSum", 200, 512, rouge_l),
    Dataset("multi_news", "MultiNews", 200, 512, rouge_l, task="Summarize all of the news."),
    Dataset("trec", "TREC", 200, 64, classification, chat=False, first_line=True),
    Dataset("triviaqa", "TriviaQA", 200, 32, qa_f1, chat=False, first_line=True),
    Dataset("samsum", "SAMSum", 200, 128, rouge_l, chat=False, first_line=True, stop="\n"),
    Dataset("lcc", "LCC", 500, 64, code_sim, chat=False),
    Dataset("repobench-p", "RepoBench-P", 500, 64, code_sim, chat=False),
)}
FORMATS = "dataset2prompt.json"


def read_formats(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The datasets' prompt formats from FOLDER/dataset2prompt.json: {context} once, behind it {input} or nothing.

    Raises DataError, which names what is wrong.
    """
    path = _in_folder(folder, FORMATS, "config/ of github.com/THUDM/LongBench")
    try:
        formats = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(formats, dict):
        raise DataError(f"{path}: expected an object of dataset: format")
    for name in names:
        text = _field(formats, name, str, str(path))
        before, found, after = text.partition("{context}")
        if not found or "{" in before or "{" in after.replace("{input}", "", 1):
            raise DataError(f"{path}: the format of {name!r} is {text!r:.60}; expected {{context}} once, then "
                            "{input} at most once and no other field")
    return {name: formats[name] for name in names}


def read_samples(folder: Path, name: str, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples of FOLDER/NAME.jsonl. Raises DataError, which names the line and what is wrong."""
    path = _in_folder(folder, f"{name}.jsonl", "data.zip of huggingface.co/datasets/THUDM/LongBench, unpacked")
    samples = list(_samples(path, limit, needs_classes=DATASETS[name].metric is classification))
    if not samples:
        raise DataError(f"{path} holds no samples")
    return samples


def differences(samples: Mapping[str, Sequence[Sample]]) -> list[str]:
    """In what these samples are not LongBench's, as far as they show it; their scores are LongBench's only if none."""
    found = []
    for name, rows in samples.items():
        if len(rows) != DATASETS[name].size:
            found.append(f"{name}: {len(rows)} samples instead of {DATASETS[name].size}")
        if other := sorted({row.dataset for row in rows} - {name}):
            found.append(f"{name}: samples of {', '.join(map(repr, other))}")
    return found


def _in_folder(folder: Path, name: str, source: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; LongBench's files are expected there; nothing is downloaded")
    path = folder / name
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.json*"))) or "no .json or .jsonl file at all"
        raise DataError(f"{folder} has no {name} ({source}); it has {there}")
    return path


def _samples(path: Path, limit: int | None, needs_classes: bool) -> Iterator[Sample]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if limit is not None and number > limit:
                    return
                yield _sample(line, f"{path}, line {number}", needs_classes)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}") from error


def _sample(line: str, where: str, needs_classes: bool) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {line[:40]!r}")
    if not _field(row, "context", str, where):
        raise DataError(f"{where}: field 'context' is empty; there is no document to compress")
    return Sample(_field(row, "input", str, where), row["context"],
                  _texts(row, "answers", where), _texts(row, "all_classes", where, optional=not needs_classes),
                  _field(row, "dataset", str, where), _field(row, "length", int, where))


def _field(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[name], kind):
        raise DataError(f"{where}: field {name!r} is {row[name]!r:.60}; expected {kind.__name__}")
    return row[name]


def _texts(row: Mapping[str, Any], name: str, where: str, optional: bool = False) -> tuple[str, ...]:
    if optional and name in row and row[name] is None:
        return ()
    texts = _field(row, name, list, where)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: field {name!r} is {texts!r:.60}; expected a list of texts{' or null' * optional}")
    return tuple(texts)
