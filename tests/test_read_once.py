"""A document that is read once: every later question gets what a fresh reading gives, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import HANDBOOK

import cocktail
from kernels_c.backend import CpuBackend
from runtime.engine import read, read_in_steps
from runtime.errors import DocumentError, OutOfMemory, PromptError
from runtime.master import Master
from runtime.model import _tiles

QUESTION = "Who mended the cracked iron pan?"
WINDOWS = {"none": None, "short": 90, "long": 400}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By sliding window: random models whose attention does not fade, so that every chunk counts."""
    def load(window):
        changes = {"num_hidden_layers": 3} if window is None else {
            "num_hidden_layers": 3, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
            "sliding_window": window}
        path = tiny_model.save_tiny_model(tmp_path_factory.mktemp("model"), **changes)
        return cocktail.load(path, backend="cpu", threads=1)

    return {name: load(window) for name, window in WINDOWS.items()}


@pytest.fixture(scope="module")
def model(models):
    return models["none"]


@dataclass(frozen=True)
class Asked:
    window: str
    system: str
    text: str
    queries: tuple[str, ...]
    chunk: int
    tile: int
    place: str
    options: dict


policies = st.one_of(
    st.just({"policy": "fp16"}), st.just({"policy": "cocktail"}), st.just({"policy": "atom"}),
    st.just({"policy": "uniform", "tier": "K4V2"}), st.just({"policy": "budget", "shares": "0.3,0.2"}),
    st.sampled_from((2, 4)).map(lambda bits: {"policy": "kivi", "bits": bits, "residual": 8 * bits}),
    st.sampled_from(("bm25", "attention")).map(
        lambda scorer: {"policy": "budget", "scorer": scorer, "tiers": "K3V2,K4V4,FP16", "shares": "0.3,0.2"}))
queries = st.one_of(st.just(""), st.integers(0, 200).map(lambda n: HANDBOOK[n : n + n // 2 + 1]))


@st.composite
def asked(draw):
    begin, length = draw(st.integers(0, 9000)), draw(st.integers(1, 1200))
    options = draw(policies)
    if options["policy"] == "budget" and "tiers" not in options:
        options = {"policy": "budget", "tiers": "K2V2,K4V3,FP16", **options}
    return Asked(draw(st.sampled_from(list(WINDOWS))), HANDBOOK[: draw(st.integers(0, 80))],
                 HANDBOOK[begin : begin + length], tuple(draw(st.lists(queries, min_size=2, max_size=3))),
                 draw(st.sampled_from((8, 16, 32, 64))), draw(st.sampled_from((40, 128, 512))),
                 draw(st.sampled_from(("file", "memory"))), options)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(asked())
def test_a_later_question_gets_the_logits_of_a_fresh_reading(models, case):
    """To the last bit, however short the question; where tiles of few rows are multiplied in another order (only tiles
    as small as here leave such), within what that changes."""
    model, answer = models[case.window], [5, 70, 9, 301, 8]
    model.backend.prefill_tile = case.tile
    kept, fresh = (model.read(case.text, chunk=case.chunk, system=case.system, keep=keep)
                   for keep in (case.place, False))
    known = len(kept.prefix_ids) + len(kept.context_ids)
    filled = _tiles(0, len(kept.prompt(case.queries[0])), case.tile)
    for i, query in enumerate(case.queries):
        expected, found = (doc.logits(query, answer, **case.options) for doc in (fresh, kept))
        n = len(kept.prompt(query))
        tiles = [*_tiles(0, n, case.tile), *filled]
        if i:
            tiles += _tiles(max(0, min(known, n - model.backend.prefill_rows)), n, case.tile)
        if min(end - start for start, end in tiles) >= model.backend.prefill_rows or not i:
            np.testing.assert_array_equal(found, expected)
        elif case.options.get("scorer") != "attention":  # which may choose otherwise between equals
            np.testing.assert_allclose(found, expected, atol=2e-3)
    kept.close()
    assert kept.nbytes == 0


class Lazy(CpuBackend):
    """Stands for a device whose copies take as long as they may: each is made when somebody waits for it."""

    asynchronous = True

    def beside(self, copies):
        pending = [copies]

        def wait():
            while pending:
                pending.pop()()
        return wait


@pytest.mark.parametrize("tile", [40, 512])
def test_copies_that_take_their_time_are_waited_for(tmp_path, tile):
    path = tiny_model.save_tiny_model(tmp_path, num_hidden_layers=5)
    lazy, prompt = cocktail.load(path, backend="cpu", threads=1), HANDBOOK[:3000]
    model = cocktail.load(path, backend="cpu", threads=1)
    lazy.engine = dataclasses.replace(lazy.engine, backend=Lazy(threads=1))
    lazy.backend.prefill_tile = model.backend.prefill_tile = tile
    docs = [lazy.read(prompt, keep="memory"), model.read(prompt, keep=False)]
    for query in (QUESTION, "Who keeps the keys of the boathouse?", QUESTION):
        found, expected = (doc.logits(query, [5, 70, 9], policy="uniform", tier="K4V2") for doc in docs)
        np.testing.assert_array_equal(found, expected)
    assert docs[0].nbytes


def test_what_is_kept_is_said_and_counted(model):
    doc = model.read(HANDBOOK[:3000])
    config, tokens = model.config, len(doc.prefix_ids) + len(doc.context_ids)
    assert doc.nbytes == 0
    first, second = (doc.ask(QUESTION, max_tokens=4).stats for _ in range(2))
    assert (first.reused_tokens, second.reused_tokens) == (0, tokens)
    assert first.master_bytes == second.master_bytes == doc.nbytes
    assert doc.nbytes == 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * tokens
    doc.close()
    assert doc.ask(QUESTION, max_tokens=4).stats.reused_tokens == 0
    with model.read(HANDBOOK[:3000], keep=False) as once:
        stats = [once.ask(QUESTION, max_tokens=4).stats for _ in range(2)]
    assert [(s.reused_tokens, s.master_bytes) for s in stats] == [(0, 0)] * 2


def test_prefill_reads_the_document_before_any_question(model):
    doc, steps = model.read(HANDBOOK[:3000]), []
    doc.prefill(lambda stage, done, total: steps.append((stage, done, total)))
    assert doc.nbytes
    assert steps[-1][:2] == ("prefill", steps[-1][2])
    answer = doc.ask(QUESTION, max_tokens=6)
    assert answer.stats.reused_tokens == len(doc.prefix_ids) + len(doc.context_ids)
    assert answer.ids == model.read(HANDBOOK[:3000], keep=False).ask(QUESTION, max_tokens=6).ids
    steps.clear()
    doc.prefill(lambda *step: steps.append(step))
    assert steps == []


def test_every_layer_is_computed_once_whoever_asks_first(model, monkeypatch):
    """Eight threads at once: one reads the document, the others wait for it; all answers are a fresh reading's."""
    words = ("ferry", "pan", "keys", "bread", "dogs", "rain", "tea", "oil")
    questions = [f"What is said about {word}?" for word in words]
    fresh = model.read(HANDBOOK[:3000], keep=False)
    expected = [fresh.ask(query, max_tokens=6).ids for query in questions]
    doc, rows = model.read(HANDBOOK[:3000]), []
    embed = model.backend.embed
    monkeypatch.setattr(model.backend, "embed", lambda ids, *rest: (rows.append(len(ids)), embed(ids, *rest)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: doc.ask(query, max_tokens=6).ids, questions))
    assert found == expected
    assert sum(n > len(doc.context_ids) for n in rows) == 1


def test_a_batch_of_questions_shares_one_reading(model):
    """In the scheduler, whose passes are paused for those that run: the first question keeps what the others take."""
    questions = [f"What is said about {word}?" for word in ("ferry", "pan", "keys", "bread")]
    fresh, doc = (model.read(HANDBOOK[:3000], keep=keep) for keep in (False, True))
    with model.serve():
        found = [answer.result(60) for answer in [doc.submit(query, max_tokens=6) for query in questions]]
    assert [answer.ids for answer in found] == [fresh.ask(query, max_tokens=6).ids for query in questions]
    known = len(doc.prefix_ids) + len(doc.context_ids)
    assert [answer.stats.reused_tokens for answer in found] == [0, known, known, known]


def test_a_paused_first_reading_holds_nobody_back(model):
    doc, engine = model.read(HANDBOOK[:3000]), model.engine
    expected = model.read(HANDBOOK[:3000], keep=False).ask(QUESTION, max_tokens=6).ids
    plan = doc.plan(QUESTION, max_tokens=6)
    paused = read_in_steps(engine, doc.prompt(QUESTION), [plan], master=doc._master)
    next(paused)
    between = doc.ask(QUESTION, max_tokens=6)
    assert (between.ids, between.stats.reused_tokens, doc.nbytes) == (expected, 0, 0)
    for _ in paused:
        pass
    assert doc.nbytes
    assert doc.ask(QUESTION, max_tokens=6).ids == expected


def test_an_interrupted_question_leaves_the_document_to_the_next_one(model):
    """Also while somebody keeps the traceback, and with it the frames."""
    doc = model.read(HANDBOOK[:3000])

    def stop(stage, done, total):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError) as kept:
        doc.ask(QUESTION, policy="fp16", max_tokens=2, progress=stop)
    assert doc.ask(QUESTION, max_tokens=2).stats.master_bytes == doc.nbytes > 0
    assert kept.traceback


@pytest.mark.parametrize("how", ["interrupt", "close", "error"])
def test_a_reading_that_is_given_up_keeps_nothing_and_the_next_one_does(model, how):
    doc = model.read(HANDBOOK[:3000])
    if how == "close":
        steps = read_in_steps(model.engine, doc.prompt(QUESTION), [doc.plan(QUESTION)], master=doc._master)
        next(steps)
        steps.close()
    else:
        wrong = KeyboardInterrupt if how == "interrupt" else ZeroDivisionError

        def stop(stage, done, total):
            if stage == "prefill" and done > 1:
                raise wrong
        with pytest.raises(wrong):
            doc.prefill(stop)
    assert doc.nbytes == 0
    assert doc.ask(QUESTION, max_tokens=4).stats.reused_tokens == 0
    assert doc.ask(QUESTION, max_tokens=4).stats.reused_tokens > 0


@pytest.mark.parametrize("scorer", ["bm25", "attention"])
def test_a_conversation_keeps_its_turns_behind_the_document(model, scorer):
    """Bit for bit what the whole conversation gives when it is read at once; and the document is read once for it."""
    options = {"scorer": scorer, "kv_bits": 6, "max_tokens": 6}
    kept, fresh, turns = model.read(HANDBOOK[:3000]), model.read(HANDBOOK[:3000], keep=False), []
    for query in (QUESTION, "And when was that?", "Is it known who paid?"):
        answer = kept.after(turns).ask(query, **options)
        assert answer.ids == fresh.after(turns).ask(query, **options).ids
        assert answer.stats.reused_tokens == (len(kept.prefix_ids) + len(kept.context_ids) if turns else 0)
        turns.append((query, answer.text))
    later = kept.after(turns)
    assert later.prompt("x")[: len(kept.prompt(QUESTION))] != kept.prompt("x")
    assert model.tokenizer.decode(later.prompt("x")).count("And when was that?") == 1
    assert later.context_ids == kept.context_ids
    assert kept.turns == ()


def test_scorers_hear_the_question_before_too(model):
    heard = []

    class Spy:
        name = "spy"

        def score(self, chunks, query):
            heard.append(query)
            return np.arange(len(chunks), dtype=np.float32)
    doc = model.read(HANDBOOK[:1000])
    doc.after([("Who?", "Odo."), ("Where?", "There.")]).plan("And when?", scorer=Spy())
    doc.plan(" When? ", scorer=Spy())
    assert heard == ["Where? And when?", "When?"]


def test_a_template_that_begins_otherwise_with_turns_is_refused(tmp_path):
    template = tiny_model.TEMPLATE.replace("{% for", "{{ 'Long ' if messages | length > 2 }}{% for", 1)
    other = cocktail.load(tiny_model.save_tiny_model(tmp_path, template=template), backend="cpu", threads=1)
    with pytest.raises(PromptError, match="begins otherwise"):
        other.read(HANDBOOK[:500]).after([("Who?", "Odo.")])


def test_a_disk_without_room_is_named_and_nothing_is_left(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    doc = model.read(HANDBOOK[:3000])

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DocumentError, match=r"no file of [\d,]+ bytes .*No space left.*TMPDIR"):
            doc.ask(QUESTION, max_tokens=2)
    assert not list(tmp_path.iterdir())
    assert doc.ask(QUESTION, max_tokens=2).ids  # the document is as before
    assert not list(tmp_path.iterdir())  # the file has no name
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(DocumentError, match="missing: no file of"):
        model.read(HANDBOOK[:3000]).ask(QUESTION, max_tokens=2)


def test_memory_that_does_not_suffice_is_named(model, monkeypatch):
    monkeypatch.setattr("kernels_c.backend.available_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"[\d,]+ bytes of host memory are needed, but 1,000 are free"):
        model.read(HANDBOOK[:3000], keep="memory").prefill()


def test_without_tmpdir_the_file_goes_where_there_is_a_disk(model, monkeypatch):
    folders, make = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: (folders.append(how["dir"]), make(**how))[1])
    monkeypatch.delenv("TMPDIR", raising=False)
    Master.empty(model.backend, model.config, 10, "file")
    assert folders == ["/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()]


def test_what_cannot_be_kept_is_refused_by_name(model, tmp_path):
    with pytest.raises(DocumentError, match="keep is 'disk'; expected"):
        model.read(HANDBOOK[:500], keep="disk")
    once = model.read(HANDBOOK[:500], keep=False)
    with pytest.raises(DocumentError, match="not kept between questions"):
        once.prefill()
    dynamic = cocktail.load(tiny_model.save_tiny_model(
        tmp_path, max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), backend="cpu",
        threads=1)
    with pytest.raises(DocumentError, match="dynamic NTK"):
        dynamic.read(HANDBOOK[:500], keep=True)
    doc = dynamic.read(HANDBOOK[:500])
    assert [doc.ask(QUESTION, max_tokens=2).stats.reused_tokens for _ in range(2)] == [0, 0]
    with pytest.raises(PromptError, match="8192 positions"):
        model.read(HANDBOOK * 3).prefill()


def test_another_prompt_than_the_documents_is_refused(model):
    doc, other = model.read(HANDBOOK[:500]), model.read(HANDBOOK[500:1000])
    plan = doc.plan(QUESTION)
    with pytest.raises(PromptError, match="does not begin with"):
        read(model.engine, doc.prompt(QUESTION), [plan], master=other._master)
