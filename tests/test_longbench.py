"""LongBench's truncation, its files, and a whole run on made-up samples."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from demo_model import demo_model
from hypothesis import given
from hypothesis import strategies as st
from test_longbench_metrics import sample_of

import cocktail
from bench import longbench
from bench.longbench import Asked, Prompt, build_document, build_prompt, parse_method, run_sample
from bench.longbench_data import DATASETS, DataError, differences, read_formats, read_samples
from cocktail.scorers import load_scorer
from runtime.errors import PlanError, PromptError

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
