"""Document: plans, answers, teacher forcing and comparisons agree with one another; misuse is refused by name."""

import json
import time

import numpy as np
import pytest
import tiny_model
from tiny_model import HANDBOOK

import cocktail
from runtime.engine import PendingPlan, read
from runtime.errors import BackendError, OutOfMemory, PlanError, PromptError, ScorerError
from runtime.plan import Plan
from runtime.sampler import SamplingParams

QUESTION = "Who mended the cracked iron pan?"


@pytest.fixture(scope="module")
def text():
    return HANDBOOK


@pytest.fixture(scope="module")
def doc(model, text):
    return model.read(text[:5000])


def test_compare_equals_single_runs(doc):
    plans = {"fp16": doc.plan(QUESTION, policy="fp16", max_tokens=10),
             "budget": doc.plan(QUESTION, max_tokens=10, kv_bits=4),
             "cocktail": doc.plan(QUESTION, policy="cocktail", max_tokens=10)}
    compared = doc.compare(QUESTION, plans, max_tokens=10)
    reference = compared["fp16"].ids
    for name, plan in plans.items():
        answer = doc.ask(QUESTION, plan=plan)
        assert answer.ids == compared[name].ids
        assert answer.text == compared[name].text
        assert answer.stats.cache_bytes == compared[name].arena_bytes
        np.testing.assert_array_equal(doc.logits(QUESTION, reference, plan=plan), compared[name].logits)
    np.testing.assert_array_equal(compared["fp16"].logits.argmax(-1), reference)
    # The first token comes from the exact prefill whatever the plan, later ones have read the mixed cache.
    np.testing.assert_array_equal(compared["budget"].logits[0], compared["fp16"].logits[0])
    assert (compared["budget"].logits[1:] != compared["fp16"].logits[1:]).any()


def test_a_plan_survives_json(doc):
    plan = doc.plan(QUESTION, max_tokens=8)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert doc.ask(QUESTION, plan=again).ids == doc.ask(QUESTION, plan=plan).ids


def test_context_ids_do_not_depend_on_the_question(doc):
    ids = {doc.prompt(query)[: len(doc.prefix_ids) + len(doc.context_ids)] for query in (QUESTION, "", "\n <|end|>")}
    assert ids == {(*doc.prefix_ids, *doc.context_ids)}


def test_streamed_pieces_join_to_the_answer(doc):
    stream = doc.ask(QUESTION, max_tokens=12, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text
    assert stream.answer.finish_reason == "length"


def test_a_stop_string_ends_the_answer_before_it(doc):
    whole = doc.ask(QUESTION, max_tokens=20).text
    stop = whole[len(whole) // 2 :][:3]
    answer = doc.ask(QUESTION, max_tokens=20, stop=[stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_ctrl_c_in_prefill_and_between_tokens_keeps_what_there_is(doc):
    def interrupt(stage, done, total):
        if stage == "prefill" and done > total // 2:
            raise KeyboardInterrupt
    answer = doc.ask(QUESTION, max_tokens=4, progress=interrupt)
    assert (answer.finish_reason, answer.ids, answer.text) == ("interrupted", (), "")
    assert answer.plan == doc.plan(QUESTION, max_tokens=4)

    stream = doc.ask(QUESTION, max_tokens=50, stream=True)
    first = next(stream)
    stream.close()
    assert stream.answer.finish_reason == "interrupted"
    assert stream.answer.text == first
    assert len(stream.answer.ids) < 50


class Spy:
    """A scorer that says what had happened when it was called, and then does as it is told."""

    name = "spy"

    def __init__(self, act=lambda scores: scores):
        self.events, self.act = [], act

    def score(self, chunks, query):
        self.events.append("score")
        return self.act(np.arange(len(chunks), dtype=np.float32))

    def report(self, stage, done, total):
        self.events.append(f"{stage} {done}/{total}")


def test_chunks_are_scored_behind_the_first_layer_where_the_layout_can_be_known_before(model, text, monkeypatch):
    doc = model.read(text[:5000], keep=False)
    spy = Spy()
    pack = doc.model.backend.pack
    monkeypatch.setattr(doc.model.backend, "pack", lambda *args, **kw: (spy.events.append("pack"), pack(*args, **kw)))
    monkeypatch.setattr(doc.model.backend, "prefill_tile", 512)
    answer = doc.ask(QUESTION, max_tokens=6, scorer=spy, progress=spy.report)
    at = spy.events.index("score")
    tiles, layers = -(-len(doc.prompt(QUESTION)) // 512), doc.model.config.n_layers
    total = tiles * layers
    assert tiles > 1
    assert spy.events[:at] == [f"prefill {i + 1}/{total}" for i in range(tiles - 1)] + ["score 0/1"]
    assert spy.events[at + 1 : at + 3] == ["score 1/1", "pack"]
    assert spy.events.count("score") == 1
    # The same plan and answer as when the plan is made first.
    assert answer.plan == doc.plan(QUESTION, max_tokens=6, scorer=spy)
    assert answer.ids == doc.ask(QUESTION, plan=answer.plan).ids


def test_thresholds_need_the_scores_first(doc):
    spy = Spy()
    doc.ask(QUESTION, policy="cocktail", max_tokens=2, scorer=spy, progress=spy.report)
    assert spy.events[:4] == ["score 0/1", "score", "score 1/1", f"prefill 1/{spy.events[3].split('/')[1]}"]


def test_what_scoring_took_is_told_apart_from_prefill(doc):
    def slowly(scores):
        time.sleep(0.2)
        return scores
    for options in ({}, {"policy": "cocktail"}):
        stats = doc.ask(QUESTION, max_tokens=2, scorer=Spy(slowly), **options).stats
        assert stats.score_s >= stats.score_wait_s >= 0.2  # a CPU does one thing at a time
        assert stats.ttft_s >= stats.score_wait_s + stats.prefill_s  # so prefill_s leaves it out


@pytest.mark.parametrize(("error", "message"), [(ScorerError, "no such word"), (KeyboardInterrupt, "stopped")])
@pytest.mark.parametrize("policy", ["budget", "cocktail"])
def test_a_scorer_that_fails_fails_the_answer_and_nothing_else(doc, error, message, policy):
    def fail(scores):
        raise error(message)
    with pytest.raises(error, match=message):
        doc.ask(QUESTION, max_tokens=2, scorer=Spy(fail), policy=policy)
    stream = doc.ask(QUESTION, max_tokens=2, scorer=Spy(fail), stream=True)
    with pytest.raises(error, match=message):
        next(stream)
    with pytest.raises(PromptError, match="nothing to return"):
        _ = stream.answer
    with pytest.raises(PlanError, match="one per chunk"):
        doc.ask(QUESTION, max_tokens=2, scorer=Spy(lambda scores: scores[1:]), policy=policy)
    assert doc.ask(QUESTION, max_tokens=2, policy=policy).ids  # the document and the model are as before


def test_a_plan_for_another_layout_is_refused_however_late(doc):
    engine, prompt = doc.model.engine, doc.prompt(QUESTION)
    plan, other = (doc.plan(QUESTION, max_tokens=4, kv_bits=bits) for bits in (3.5, 5))
    with pytest.raises(PlanError, match="layout"):
        read(engine, prompt, [PendingPlan(plan.layout, lambda: other)])
    reading = read(engine, prompt, [PendingPlan(plan.layout, lambda: plan), other])
    assert [cache.plan for cache in reading.caches] == [plan, other]


def test_sampling_repeats_with_its_seed_and_changes_with_it(doc):
    def ids(seed):
        return doc.ask(QUESTION, max_tokens=12, sampling=SamplingParams(temperature=1.5, seed=seed)).ids
    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_without_any_question_the_end_of_the_document_is_scored(doc):
    plan = doc.plan("", max_tokens=4, scorer="bm25")
    assert max(plan.scores) > 0


def test_an_edited_plan_is_followed(doc):
    plan = doc.plan(QUESTION, max_tokens=4, kv_bits=3.3)
    data = json.loads(plan.to_json())
    best = data["tiers"].index(str(max(plan.layout.tiers, key=lambda tier: tier.k_bits + tier.v_bits)))
    data["assignments"] = [chunks[:3] + str(best) + chunks[4:] for chunks in data["assignments"]]
    edited = Plan.from_json(json.dumps(data))
    assert {chunks[3] for chunks in edited.assignment} == {best}
    assert doc.ask(QUESTION, plan=edited).stats.cache_bytes >= doc.ask(QUESTION, plan=plan).stats.cache_bytes


def test_a_plan_of_another_document_of_as_many_tokens_is_refused(doc, model, text):
    plan = doc.plan(QUESTION, max_tokens=4)
    other = model.read(text[:4999] + ("a" if text[4999] != "a" else "b"))
    assert other.shape(QUESTION).context_tokens == plan.layout.context_tokens
    with pytest.raises(PlanError, match=f"another document.* is {doc.digest}, expected {other.digest}"):
        other.ask(QUESTION, plan=plan)
    unsigned = json.loads(plan.to_json())
    unsigned["shape"]["digest"] = None
    assert other.ask(QUESTION, plan=Plan.from_json(json.dumps(unsigned))).ids


def test_a_plan_that_drops_what_the_answer_can_see_is_refused(doc):
    plan = doc.plan(QUESTION, policy="uniform", tier="K4V4", max_tokens=4)
    data = json.loads(plan.to_json())
    data["tiers"].append("K0V0")
    dropped = str(len(data["tiers"]) - 1)
    data["assignments"] = [data["assignments"][0], data["assignments"][0][:2] + dropped + data["assignments"][0][3:]]
    data["layers"] = [0] * (plan.layout.n_layers - 1) + [1]
    with pytest.raises(PlanError, match=r"chunk 2 of layer 1 is not stored \(K0V0\)"):
        doc.ask(QUESTION, plan=Plan.from_json(json.dumps(data)))


def test_misuse_is_refused(doc, model, text):
    plan = doc.plan(QUESTION, max_tokens=4)
    with pytest.raises(PlanError, match="kv_bits would change nothing"):
        doc.ask(QUESTION, plan=plan, kv_bits=3)
    with pytest.raises(PlanError, match="room for 4"):
        doc.ask(QUESTION, plan=plan, max_tokens=5)
    with pytest.raises(PlanError, match="does not fit"):
        model.read(text[:4000]).ask(QUESTION, plan=plan)
    with pytest.raises(PlanError, match="no option alpha"):
        doc.ask(QUESTION, alpha=0.5)
    with pytest.raises(PlanError, match="chunk"):
        model.read(text, chunk=33)
    with pytest.raises(PromptError, match="context is empty"):
        model.read("")
    with pytest.raises(PromptError, match="8192 positions"):
        model.read(text * 3).ask(QUESTION)
    with pytest.raises(PromptError, match="at least 1"):
        doc.ask(QUESTION, max_tokens=0)
    with pytest.raises(PromptError, match="stop string is empty"):
        doc.ask(QUESTION, stop=[""])
    with pytest.raises(PromptError, match="prompt is empty"):
        model.generate("", raw=True)


def test_memory_that_does_not_suffice_is_named(doc, model, monkeypatch):
    def refuse(nbytes):
        raise MemoryError("nothing left")
    monkeypatch.setattr(model.backend, "arena", refuse)
    with pytest.raises(OutOfMemory, match=r"cache needs .* MiB: nothing left"):
        doc.ask(QUESTION, max_tokens=2)


def test_a_head_size_without_a_kernel_is_refused_at_load(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_model.CONFIG, "head_dim", 12)
    with pytest.raises(BackendError, match="multiple of 8"):
        cocktail.load(tiny_model.save_tiny_model(tmp_path), backend="cpu", threads=1)


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendError, match="unknown backend"):
        from runtime.backend import load_backend
        load_backend("tpu")
