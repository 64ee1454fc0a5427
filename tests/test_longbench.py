"""LongBench's metrics on cases worked out by hand, its truncation, its files, and a whole run on made-up samples."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace

import numpy as np
import pytest
from demo_model import demo_model
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import save_tiny_model

import cocktail
from bench import longbench
from bench.longbench import Asked, Prompt, build_document, build_prompt, parse_method, run_sample
from bench.longbench_data import DATASETS, DataError, Sample, differences, read_formats, read_samples
from bench.longbench_metrics import classification, code_sim, first_line, qa_f1, rouge_l
from cocktail.scorers import load_scorer
from runtime.errors import PlanError, PromptError

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


# Truncation.

class Letters:
    """One id per character, after a BOS, which decodes to nothing."""

    bos_id = -1

    def __init__(self, adds_bos: bool = True):
        self.adds_bos = adds_bos

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i >= 0)


FORMAT = "Text: {context} Q: {input}?"


def built(context: str, question: str, max_length: int, adds_bos: bool = True) -> Prompt:
    return build_prompt(Letters(adds_bos), FORMAT, sample_of("qasper", "", input=question, context=context), max_length)


def test_a_prompt_that_fits_is_left_alone():
    whole = Prompt("Text: ", "abcdef", " Q: w{}?")  # 6 + 6 + 8 letters
    assert built("abcdef", "w{}", 20, adds_bos=False) == whole
    assert built("abcdef", "w{}", 21) == whole
    assert built("abcdef", "w{}", 20) != whole  # the BOS counts


def test_a_long_prompt_keeps_its_first_and_last_half():
    context = "".join(chr(ord("a") + i % 26) for i in range(50))
    # Of 20 tokens: BOS and 9 letters, then 10 letters.
    assert built(context, "why", 20) == Prompt("Text: ", "abc" + "vwx"[-2:], " Q: why?")
    assert built(context, "why", 21) == built(context, "why", 20)  # int(21 / 2) twice
    assert built(context, "why", 20, adds_bos=False) == Prompt("Text: ", "abcd" + "wx", " Q: why?")


def test_a_long_question_loses_its_beginning_and_nothing_twice():
    assert built("abcdefghijkl", "a question much longer than half", 20) == Prompt("Text: ", "abc", "than half?")


@given(context=st.text(min_size=1, max_size=60), question=st.text(max_size=30), max_length=st.integers(2, 120))
def test_truncation_is_the_benchmarks(context, question, max_length):
    whole = FORMAT.format(context=context, input=question)
    ids = [-1, *map(ord, whole)]
    half = int(max_length / 2)
    expected = whole if len(ids) <= max_length else Letters().decode(ids[:half]) + Letters().decode(ids[-half:])
    prompt = built(context, question, max_length)
    assert prompt.before + prompt.context + prompt.after == expected
    assert "Text: ".startswith(prompt.before)
    assert f" Q: {question}?".endswith(prompt.after)


# Files.

def line(**fields: object) -> str:
    return json.dumps({"input": "Who?", "context": "A text.", "answers": ["Ann", "Bob"], "length": 2,
                       "dataset": "qasper", "language": "en", "all_classes": None, "_id": "0"} | fields)


def write(folder, name: str, *lines: str) -> None:
    (folder / f"{name}.jsonl").write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")


def write_formats(folder) -> None:
    (folder / "dataset2prompt.json").write_text(json.dumps(dict.fromkeys(DATASETS, FORMAT)), encoding="utf-8")


def test_samples_are_read_in_order_up_to_the_limit(tmp_path):
    write(tmp_path, "qasper", line(input="1"), line(input="2", all_classes=["A"], context="\u2028"), line(input="3"))
    assert [sample.input for sample in read_samples(tmp_path, "qasper")] == ["1", "2", "3"]
    first, second = read_samples(tmp_path, "qasper", 2)
    assert (first.answers, first.all_classes, second.all_classes) == (("Ann", "Bob"), (), ("A",))


@pytest.mark.parametrize(("bad", "message"), [
    ("{", r"qasper.jsonl, line 2: not JSON"),
    ("[]", r"line 2: expected an object"),
    ('{"input": "Who?"}', r"line 2: no field 'context'; it has 'input'"),
    (line(context=""), r"line 2: field 'context' is empty"),
    (line(input=None), r"line 2: field 'input' is None; expected str"),
    (line(answers="Ann"), r"line 2: field 'answers' is 'Ann'; expected list"),
    (line(answers=[]), r"line 2: field 'answers' is \[\]; expected a list of texts"),
    (line(answers=[1]), r"line 2: field 'answers' is \[1\]"),
    (line(all_classes="A"), r"line 2: field 'all_classes' is 'A'"),
])
def test_a_bad_line_is_named(tmp_path, bad, message):
    write(tmp_path, "qasper", line(), bad)
    with pytest.raises(DataError, match=message):
        read_samples(tmp_path, "qasper")


@pytest.mark.parametrize("field", ["input", "context", "answers", "all_classes", "dataset", "length"])
def test_a_missing_field_is_named(tmp_path, field):
    row = json.loads(line())
    del row[field]
    write(tmp_path, "qasper", json.dumps(row))
    with pytest.raises(DataError, match=f"line 1: no field '{field}'"):
        read_samples(tmp_path, "qasper")


def test_a_missing_folder_file_or_sample_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent is not a folder.*nothing is downloaded"):
        read_samples(tmp_path / "absent", "qasper")
    with pytest.raises(DataError, match=r"has no trec.jsonl .*; it has no .json or .jsonl file at all"):
        read_samples(tmp_path, "trec")
    write(tmp_path, "qasper")
    with pytest.raises(DataError, match=r"has no trec.jsonl .*; it has qasper.jsonl"):
        read_samples(tmp_path, "trec")
    with pytest.raises(DataError, match="holds no samples"):
        read_samples(tmp_path, "qasper")
    write(tmp_path, "trec", line())
    with pytest.raises(DataError, match="'all_classes' is None; expected list"):
        read_samples(tmp_path, "trec")
    (tmp_path / "lcc.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_samples(tmp_path, "lcc")


def test_only_whole_datasets_of_longbench_itself_give_its_scores():
    whole = {"qasper": [sample_of("qasper", "x")] * 200, "lcc": [sample_of("lcc", "x")] * 500}
    assert differences(whole) == []
    assert differences({"lcc": whole["lcc"][:200]}) == ["lcc: 200 samples instead of 500"]
    assert differences({"qasper": [*whole["qasper"][1:], sample_of("made up", "x")]}) == [
        "qasper: samples of 'made up'"]


FORMATS = {"qasper": "Article: {context}\nQ: {input}", "lcc": "{context}Next line:", "trec": "{context}\n{input}"}


def test_formats_are_those_of_the_benchmarks_file(tmp_path):
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(FORMATS | {"other": "{documents}"}), encoding="utf-8")
    assert read_formats(tmp_path, ["lcc", "qasper"]) == {name: FORMATS[name] for name in ("lcc", "qasper")}
    with pytest.raises(DataError, match="no field 'samsum'"):
        read_formats(tmp_path, ["lcc", "samsum"])


@pytest.mark.parametrize("text", [
    "no document: {input}", "{context} {context}", "{input} before {context}", "{context} {input} {input}",
    "{context} {other}", 7])
def test_a_format_that_cannot_be_filled_in_is_refused(tmp_path, text):
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": text}), encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset2prompt.json: .*'qasper'"):
        read_formats(tmp_path, ["qasper"])


def test_a_missing_or_damaged_format_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent is not a folder.*nothing is downloaded"):
        read_formats(tmp_path / "absent", ["qasper"])
    with pytest.raises(DataError, match=r"has no dataset2prompt\.json \(config/ of"):
        read_formats(tmp_path, ["qasper"])
    for damaged in ("{", "[]"):
        (tmp_path / "dataset2prompt.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(DataError, match=r"dataset2prompt\.json"):
            read_formats(tmp_path, ["qasper"])


# Methods.

def test_a_method_is_a_policy_with_its_options():
    method = parse_method("budget:kv_bits=4:scorer=random:7", "bm25")
    assert (method.policy.name, method.policy.kv_bits, method.scorer) == ("budget", 4, "random:7")
    assert parse_method("cocktail", "hybrid:folder").scorer == "hybrid:folder"
    assert parse_method("fp16", "bm25").scorer == "none"


@pytest.mark.parametrize(("text", "message"), [
    ("nothing", "no policy 'nothing'"), ("budget:kv_bits", "no policy 'budget:kv_bits'"),
    ("budget:bits=3", "has no option bits"), ("budget:kv_bits=many", "wrong kind"), ("cocktail:alpha=2", "alpha"),
])
def test_a_wrong_method_is_refused_by_name(text, message):
    with pytest.raises(PlanError, match=message):
        parse_method(text, "bm25")


# Runs.

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cocktail.load(save_tiny_model(tmp_path_factory.mktemp("model")), backend="cpu", threads=1)


LONG = "".join(f"The pan of house {i} was mended by a smith. " for i in range(30))


def test_a_prompt_keeps_its_text_around_the_document(model):
    prompt = Prompt("Before: ", LONG, "\n\nQuestion: Who?\nAnswer:")
    text = prompt.before + prompt.context + prompt.after
    for chat, expected in [
        ("{prompt}", text), ("[INST]{prompt}[/INST]", f"[INST]{text}[/INST]"),
        (None, f"<|start|>user\n{text}<|end|>\n<|start|>assistant\n"),
    ]:
        doc = build_document(model, prompt, chat)
        assert model.tokenizer.decode(doc.prompt(""), skip_special=False) == expected
        assert model.tokenizer.decode(doc.context_ids) == " " + LONG  # a space before it is its own


def test_a_chat_format_that_loses_the_prompt_is_refused(model):
    with pytest.raises(DataError, match="drops or repeats"):
        build_document(model, Prompt("", LONG, ""), "{prompt} {prompt}")


def test_a_length_that_leaves_no_document_is_refused(model):
    wordy = "Read well. " * 50 + "{context}" + " Answer well." * 50
    with pytest.raises(PromptError, match=r"qasper: .*exceed 100 tokens; a larger --max-length"):
        run_sample(model, DATASETS["qasper"], wordy, sample_of("qasper", "x", context=LONG), [], {}, 100)


def test_an_answer_is_the_models_own_greedy_one(model):
    dataset = replace(DATASETS["lcc"], max_new=8)
    sample = sample_of("lcc", "x", context=LONG)
    methods = [parse_method(text, "bm25") for text in ("fp16", "budget:kv_bits=4")]
    scorers = {name: load_scorer(name) for name in ("bm25", "none")}
    exact, mixed = run_sample(model, dataset, FORMAT, sample, methods, scorers, 10**6)
    doc = build_document(model, build_prompt(model.tokenizer, FORMAT, sample, 10**6), "{prompt}")
    answer = doc.ask("", policy="fp16", max_tokens=8)
    assert exact.prediction == answer.text
    assert exact.bits == answer.stats.context_bits_per_value
    assert exact.bits >= 16 > 4 >= mixed.bits


def test_a_stop_text_ends_the_answer_but_never_begins_it(model, monkeypatch):
    methods, scorers, new = [parse_method("fp16", "bm25")], {"none": load_scorer("none")}, 8
    dataset = replace(DATASETS["samsum"], max_new=new, stop="STOP")
    sample = sample_of("samsum", "x", context=LONG, input="Who?")
    doc = build_document(model, build_prompt(model.tokenizer, FORMAT, sample, 10**6), "{prompt}")
    free = doc.ask("", policy="fp16", max_tokens=new).ids
    later = next(i for i in range(1, new) if free[i] not in free[:i])
    encode = model.tokenizer.encode

    def with_stop(token: int) -> str:
        monkeypatch.setattr(model.tokenizer, "encode",
                            lambda text, **options: [0, token] if text == "STOP" else encode(text, **options))
        return run_sample(model, dataset, FORMAT, sample, methods, scorers, 10**6)[0].prediction

    assert with_stop(free[later]) == model.tokenizer.decode(free[: later + 1])

    logits = doc.logits("", [0], policy="fp16")[0]
    logits[[free[0], *model.tokenizer.eos_ids]] = -np.inf
    barred = [int(logits.argmax())]
    while len(barred) < new and barred[-1] not in (free[0], *model.tokenizer.eos_ids):
        barred.append(int(doc.logits("", [*barred, 0], policy="fp16")[-1].argmax()))
    assert barred[0] != free[0]
    assert with_stop(free[0]) == model.tokenizer.decode(barred)


def test_chunks_are_scored_once_and_against_the_samples_own_question():
    class Counting:
        name, calls = "counting", []

        def score(self, chunks, query):
            self.calls.append(query)
            return np.zeros(len(chunks), np.float32)

    asked = Asked(Counting(), "Who?")
    assert asked.score(["a"], "the end of the text") is asked.score(["a"], "the end of the text")
    Asked(Counting(), "").score(["a"], "the end of the text")
    assert Counting.calls == ["Who?", "the end of the text"]


def test_all_eight_datasets_run_and_are_not_called_longbench(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cocktail, "load", lambda *args, **options: model)
    write_formats(tmp_path)
    for name in DATASETS:
        write(tmp_path, name, *[line(context=LONG * 3, dataset="made up", all_classes=["Date", "City"],
                                     answers=["Date"])] * 2)
    longbench.main(["MODEL", "--data", str(tmp_path), "--max-length", "900", "--max-new", "3", "--policies",
                    "fp16,budget:kv_bits=5,cocktail:scorer=none", "--json", str(tmp_path / "out.json"), "--pred",
                    str(tmp_path / "pred")])
    out = capsys.readouterr().out
    header, _, *rows = out.splitlines()[:5]
    assert header.replace(" ", "") == (
        "|method|bits|Qasper|QMSum|MultiNews|TREC|TriviaQA|SAMSum|LCC|RepoBench-P|Average|")
    assert [row.split("|")[1].strip() for row in rows] == ["fp16", "budget:kv_bits=5", "cocktail:scorer=none"]
    assert "NOT LongBench scores" in out
    record = json.loads((tmp_path / "out.json").read_text())
    assert record == json.loads(out.splitlines()[-1])
    assert record["samples"] == dict.fromkeys(DATASETS, 2)
    assert "qasper: samples of 'made up'" in record["not_longbench"]
    exact, budget, _ = record["rows"]
    assert exact["bits"] >= 16 > 5 >= budget["bits"]
    assert set(exact["scores"]) == set(DATASETS)
    written = (tmp_path / "pred/budget_kv_bits=5/trec.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(text).keys() for text in written] == [{"pred", "answers", "all_classes", "length"}] * 2


def test_a_run_on_the_demo_model(tmp_path, capsys):
    """A few tokens from made-up samples: that it runs, not how well the model does."""
    text = " ".join(f"Note {i}: the {what} is in the {where}." for i, (what, where) in enumerate(
        [("lamp", "hall"), ("rope", "shed"), ("kettle", "kitchen")] * 12))
    write(tmp_path, "qasper", line(context=text, input="Where is the rope?", answers=["shed", "in the shed"],
                                   dataset="made up"))
    write_formats(tmp_path)
    write(tmp_path, "samsum", line(context=text, input="Dialogue: Ann: Bye!\nSummary:", dataset="made up"))
    longbench.main([str(demo_model()), "--data", str(tmp_path), "--datasets", "qasper,samsum", "--max-new", "4",
                    "--max-length", "200", "--backend", "cpu", "--threads", "1"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    exact, budget, thresholds = record["rows"]
    assert [row["policy"] for row in record["rows"]] == ["fp16", "budget", "cocktail"]
    assert exact["bits"] >= 16 > max(budget["bits"], thresholds["bits"])
    assert all(0 <= score <= 100 for row in record["rows"] for score in row["scores"].values())
    assert record["not_longbench"]


def test_errors_are_one_line_and_exit_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        longbench.main(["MODEL", "--data", str(tmp_path / "absent")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    ["--datasets", "qasper,nothing"], ["--datasets", "qasper,qasper"], ["--limit", "0"], ["--max-length", "1"],
    ["--chat", "no place for it"], ["--policies", ","],
])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        longbench.main(["MODEL", "--data", "x", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
