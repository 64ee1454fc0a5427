"""LongBench's metrics on cases worked out by hand, and its datasets as it sets them up."""

from __future__ import annotations

import difflib
from dataclasses import replace

import numpy as np
import pytest

from bench import longbench
from bench.longbench import parse_method
from bench.longbench_data import DATASETS, Sample
from bench.longbench_metrics import classification, code_sim, first_line, qa_f1, rouge_l

CLASSES = ("number", "Other number", "Date", "Order, rank")


# Metrics. Each expected value is worked out in the comment or is plain.

@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    ("The cat, sat.", "a cat sat down", 4 / 5),  # cat sat | cat sat down: P 1, R 2/3
    ("no no no", "no", 1 / 2),  # a bag, not a set: one of three is right
    ("unanswerable", "Unanswerable.", 1),
    ("U.S.A.", "usa", 1),  # punctuation vanishes and joins what it separated
    ("well-known", "well known", 0),
    ("theme", "me", 0),  # articles are whole words
    ("a.n apple", "apple", 1),  # punctuation goes first, so "a.n" has become an article
    ("two\n\n words", "two words", 1),
    ("", "yes", 0), ("yes", "", 0), ("the", "a", 0),  # nothing in common with nothing
])
def test_qa_f1(prediction, reference, expected):
    assert qa_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    # Five distinct words each, four of them in the common subsequence "the cat on the mat".
    ("the cat sat on the mat", "the cat is on the mat", 4 / 5),
    # The second sentence adds w3 and w5 to the first one's w1 and w2: R 4/5, P 4 of 8 distinct words.
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 8 / 13),
    ("b a", "a b", 1 / 2),  # order counts
    ("The end", "the end", 1 / 2),  # and so do case
    ("one, two", "one two", 1 / 2),  # and punctuation
    ("same words here", "same words here", 1),
    ("a b c d", "x a y", 2 / 7),  # P 1/4, R 1/3
    ("", "a b", 0), ("...", "a b", 0), (" \n ", "a b", 0), ("a b", "", 0),
])
def test_rouge_l(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("prediction", "reference", "usual"), [
    ("the cat sat on the mat", "the cat is on the mat", 5 / 6),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 8 / 15),  # P 4/10, R 4/5
])
def test_rouge_l_is_not_the_usual_one(prediction, reference, usual):
    """The usual ROUGE-L F1 of the same pairs: one sequence of words each, repetitions counted."""
    a, b = prediction.replace(".", "").split(), reference.split()
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    assert 2 * table[-1, -1] / (len(a) + len(b)) == pytest.approx(usual)
    assert abs(rouge_l(prediction, reference) - usual) > 0.03


@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    ("Date", "Date", 1),
    ("Type: Date, surely", "Date", 1),
    ("Date or Order, rank", "Date", 1 / 2),
    ("Date or Order, rank", "Order, rank", 1 / 2),
    ("Other number", "Other number", 1),  # "number" is inside the right name and does not count
    ("Other number", "number", 1 / 2),  # the longer name is not inside the right one, so both count
    ("number", "Other number", 0),
    ("date", "Date", 0),  # names are matched as they stand
    ("Order", "Order, rank", 0),
    ("", "Date", 0), ("something else", "Date", 0),
])
def test_classification(prediction, reference, expected):
    assert classification(prediction, reference, CLASSES) == expected


@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    ("return x", "return x", 1),
    ("\n\nreturn x\nreturn y", "return x", 1),
    ("# a comment\n// another\n```python\nreturn x\n```", "return x", 1),
    ("return x  # why\nreturn y", "return y", 1),  # a line with a comment anywhere is passed over
    ("tide", "diet", 0.50),  # 2 of 4 letters in a common subsequence; difflib says 25
    ("abc", "abd", 0.67),  # 4 of 6, as a whole per cent
    ("# c\n\nreturn x", "return x", 0),  # the first line that is not a comment is empty
    ("# only\n# comments", "return x", 0), ("", "return x", 0),
])
def test_code_sim(prediction, reference, expected):
    assert code_sim(prediction, reference) == pytest.approx(expected)


def test_difflib_gives_other_code_similarities():
    """What fuzzywuzzy computes where python-Levenshtein is not installed."""
    assert difflib.SequenceMatcher(None, "tide", "diet").ratio() == 0.25


@pytest.mark.parametrize(("text", "expected"), [
    ("Date\nQuestion: what?\nType: City", "Date"), ("\n\n Date\nCity", " Date"), ("", ""), ("\n", ""), ("Date", "Date"),
])
def test_first_line(text, expected):
    assert first_line(text) == expected


def sample_of(name: str, *answers: str, **fields: object) -> Sample:
    return replace(Sample("", "x", answers, CLASSES, name, 1), **fields)


def test_few_shot_answers_are_judged_by_their_first_line():
    run_on = "\nDate\nQuestion: Who?\nType: Order, rank"
    assert DATASETS["trec"].score(run_on, sample_of("trec", "Date")) == 1
    assert DATASETS["triviaqa"].score("Paris\nPassage: London", sample_of("triviaqa", "Paris")) == 1
    assert DATASETS["samsum"].score("\nAnn left\nDialogue: Bob", sample_of("samsum", "Ann left")) == pytest.approx(1)
    # All lines count elsewhere: one of two words is right.
    assert DATASETS["qasper"].score("yes\nindeed", sample_of("qasper", "yes")) == pytest.approx(2 / 3)


def test_the_best_reference_counts():
    assert DATASETS["qasper"].score("in Paris", sample_of("qasper", "London", "in Paris", "Paris")) == 1
    assert DATASETS["qasper"].score("", sample_of("qasper", "London", "Paris")) == 0


def test_a_score_is_a_hundred_times_the_mean_with_two_decimals():
    def outcomes(*scores: float) -> list[longbench.Outcome]:
        return [longbench.Outcome("", score, 3.0 + i) for i, score in enumerate(scores)]

    row = longbench.summarize(parse_method("budget", "bm25"), {"trec": outcomes(1, 0, 0), "lcc": outcomes(0.5)})
    assert row["scores"] == {"trec": 33.33, "lcc": 50.0}
    assert row["average"] == 41.66  # over datasets, whatever their sizes
    assert row["dataset_bits"] == {"trec": 4.0, "lcc": 3.0}
    assert row["bits"] == 3.75  # over samples


# The datasets as LongBench sets them up.

def test_generation_lengths_chat_and_order_are_the_benchmarks():
    assert {name: dataset.max_new for name, dataset in DATASETS.items()} == {
        "qasper": 128, "qmsum": 512, "multi_news": 512, "trec": 64, "triviaqa": 32, "samsum": 128, "lcc": 64,
        "repobench-p": 64}
    assert {name for name, dataset in DATASETS.items() if not dataset.chat} == {
        "trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert {name for name, dataset in DATASETS.items() if dataset.first_line} == {"trec", "triviaqa", "samsum"}
    assert {name for name, dataset in DATASETS.items() if dataset.stop} == {"samsum"}
