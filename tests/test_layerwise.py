"""Plans that come layer by layer from the model's own attention: the masses, the plan, what follows it, refusals."""

import json

import numpy as np
import pytest
import tiny_model
from mass_ref import mass_reference
from numpy_backend import NumpyBackend

import cocktail
from cocktail.model import Model
from cocktail.policies import load_policy
from cocktail.scorers import load_scorer
from cocktail.scorers.attention import DEFAULT_ROWS, AttentionScorer
from kernels_c import CpuBackend
from runtime.checkpoint import Checkpoint
from runtime.engine import read
from runtime.errors import PlanError, ScorerError
from runtime.layerwise import LayerwisePlan
from runtime.model import Model as Engine
from runtime.plan import FP16, Plan
from runtime.weights import load_weights

TEXT = "The ferry to Merrow Point leaves at nine. Nobody has ever mended the cracked iron pan of the boathouse. " * 20
QUESTION = "When does the ferry leave?"
KV_BITS = 4.6  # of a text so short, whose sink weighs much


class Spy(NumpyBackend):
    """Keeps every layer's q and k, whatever prefill does with them afterwards."""

    def qkv(self, *arguments):
        super().qkv(*arguments)
        q, k, _ = arguments[-3:]
        if len(q) > 1:
            self.layers = [*getattr(self, "layers", []), (q.copy(), k.copy())]


def load(folder, backend, window=None):
    with pytest.MonkeyPatch.context() as patch:
        if window is not None:
            patch.setitem(tiny_model.CONFIG, "sliding_window", window)
            patch.setitem(tiny_model.CONFIG, "architectures", ["MistralForCausalLM"])
            patch.setitem(tiny_model.CONFIG, "model_type", "mistral")
        path = tiny_model.save_tiny_model(folder)
    model = cocktail.load(path, backend="cpu", threads=1)
    if isinstance(backend, CpuBackend):
        return model
    with Checkpoint.open(path) as checkpoint:
        return Model(Engine(checkpoint.config, load_weights(checkpoint, backend), backend), model.tokenizer,
                     model.template)


@pytest.fixture(scope="module", params=["numpy", "cpu"])
def doc(request, tmp_path_factory):
    backend = NumpyBackend() if request.param == "numpy" else CpuBackend(threads=1)
    return load(tmp_path_factory.mktemp("model"), backend).read(TEXT)


def observed(doc, tile, rows=None):
    """What every layer's choice is given, by way of a plan that keeps all chunks at FP16."""
    seen, layout = [], doc.shape(QUESTION, 2).layout([FP16], [doc.n_chunks])

    def choose(layer, masses):
        seen.append(masses.copy())
        return [0] * layout.n_chunks

    def make(chunks, masses):
        np.testing.assert_array_equal(masses, seen)
        return Plan(layout, chunks, "test", "attention")

    prompt = doc.prompt(QUESTION)
    rows = rows or doc.pending(QUESTION, scorer="attention").rows
    reading = read(doc.model.engine, prompt, [LayerwisePlan(layout, rows, choose, make)], tile=tile)
    assert reading.plans[0].assignment == ((0,) * layout.n_chunks,) * layout.n_layers
    return np.array(seen), rows


@pytest.mark.parametrize("window", [None, 150])
def test_masses_are_the_attention_of_the_querys_rows(tmp_path, window):
    spy = Spy()
    doc = load(tmp_path, spy, window).read(TEXT)
    masses, rows = observed(doc, 4096)
    shape = doc.shape(QUESTION, 2)
    assert len(spy.layers) == shape.n_layers
    for (q, k), found in zip(spy.layers, masses, strict=True):
        expected, _ = mass_reference(q[rows.start : rows.stop], k, rows.start, window, shape.prefix, shape.chunk,
                                     (shape.n_kv_heads, shape.n_chunks), lambda x, y: np.zeros((len(x), len(y))))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("tile", [5, 64])
def test_tiles_that_cut_the_rows_apart_add_up(doc, tile):
    whole, rows = observed(doc, 4096)
    parts, _ = observed(doc, tile)
    assert len(rows) > 5
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-7)
    every, _ = observed(doc, 4096, range(len(doc.prompt(QUESTION))))
    assert (every.sum(axis=(1, 2)) > whole.sum(axis=(1, 2))).all()


def test_the_rows_are_the_querys_own(doc):
    prompt = doc.prompt(QUESTION)
    rows = doc.pending(QUESTION, scorer="attention").rows
    assert doc.model.tokenizer.decode(prompt[rows.start : rows.stop]).strip() == QUESTION
    for nothing in ("", "  \n"):
        rows = doc.pending(nothing, scorer="attention").rows
        assert (len(rows), rows.stop) == (DEFAULT_ROWS, len(doc.prompt(nothing)))
        assert doc.plan(nothing, scorer="attention", kv_bits=KV_BITS, max_tokens=2).scores


def test_every_layer_ranks_by_its_own_attention(doc):
    options = {"scorer": "attention", "kv_bits": KV_BITS, "sink": 1, "max_tokens": 2}
    planned, plan, policy = doc.pending(QUESTION, **options), doc.plan(QUESTION, **options), load_policy()
    masses, _ = observed(doc, doc.model.backend.prefill_tile)
    assert plan.layout == planned.layout
    assert len(set(plan.assignment)) == len(masses)
    shares = []
    for layer, found in enumerate(masses.sum(axis=1, dtype=np.float64)):
        bits = np.array([sum((plan.layout.tiers[tier].k_bits, plan.layout.tiers[tier].v_bits))
                         for tier in plan.assignment[layer]])
        assert bits[0] == 32
        best_first = 1 + np.argsort(-found[1:], kind="stable")
        assert (np.diff(bits[best_first]) <= 0).all()
        assert len(set(bits[best_first])) > 1
        shares.append(np.append(0, found[1:] / found[1:].sum()))
    np.testing.assert_allclose(plan.scores, np.mean(shares, axis=0), rtol=1e-4, atol=1e-9)
    assert (plan.policy, plan.scorer) == (policy.name, "attention")
    assert Plan.from_json(plan.to_json()) == plan


def test_ask_plan_compare_and_logits_agree(doc):
    arguments = {"scorer": "attention", "kv_bits": KV_BITS, "max_tokens": 6}
    answer, plan = doc.ask(QUESTION, **arguments), doc.plan(QUESTION, **arguments)
    assert answer.plan == plan
    assert answer.ids == doc.ask(QUESTION, plan=plan).ids
    stats = answer.stats
    assert 0 < stats.score_wait_s <= stats.score_s
    assert stats.ttft_s >= stats.score_wait_s + stats.prefill_s
    plans = {"fp16": doc.plan(QUESTION, policy="fp16", max_tokens=6), "text": doc.pending(QUESTION, max_tokens=6),
             "own": doc.pending(QUESTION, **arguments), "more": doc.pending(QUESTION, **arguments | {"kv_bits": 6}),
             "again": plan}
    for _ in range(2):  # what is pending can be followed any number of times
        compared = doc.compare(QUESTION, plans, max_tokens=6)
        assert compared["own"].plan == compared["again"].plan == plan
        assert compared["text"].plan == doc.plan(QUESTION, max_tokens=6)
        assert compared["own"].ids == answer.ids
        np.testing.assert_array_equal(compared["own"].logits, compared["again"].logits)
    alone = doc.logits(QUESTION, compared["fp16"].ids, scorer="attention", kv_bits=KV_BITS)
    np.testing.assert_array_equal(alone, compared["own"].logits[: len(alone)])


def test_each_layer_has_the_counts_that_its_losses_ask_for(doc, tmp_path):
    losses = {side: {width: [row, row / 1e4] for width, row in (("2", 1.0), ("3", 0.3), ("4", 0.1), ("8", 1e-3))}
              for side in "KV"}
    (tmp_path / "pairs.json").write_text(json.dumps({"version": 1, "losses": losses}))
    plan = doc.plan(QUESTION, scorer="attention", kv_bits=7, pairs=tmp_path / "pairs.json", max_tokens=2)
    first, second = ([plan.layout.tiers[tier] for tier in chunks] for chunks in plan.assignment)
    assert min(tier.k_bits for tier in first) > min(tier.k_bits for tier in second)
    assert sum(tier.k_bits + tier.v_bits for tier in first) > sum(tier.k_bits + tier.v_bits for tier in second)
    assert plan.policy == "budget (pairs)"


def test_what_a_window_hides_is_not_ranked(tmp_path):
    doc = load(tmp_path, CpuBackend(threads=1), 150).read(TEXT)
    plan = doc.plan(QUESTION, scorer="attention", kv_bits=6, max_tokens=2)
    hidden = len(plan.layout.hidden_chunks())
    assert 0 < hidden < doc.n_chunks
    for chunks in plan.assignment:
        assert [str(plan.layout.tiers[tier]) == "K0V0" for tier in chunks].count(True) == hidden
    assert not any(plan.scores[:hidden])
    assert any(plan.scores[hidden:])
    assert doc.ask(QUESTION, plan=plan).ids == doc.ask(QUESTION, scorer="attention", kv_bits=6, max_tokens=2).ids


def test_a_document_without_a_whole_chunk_needs_no_scores(doc):
    short = doc.model.read("Nine.")
    assert short.n_chunks == 0
    assert short.ask(QUESTION, scorer="attention", max_tokens=3).ids == short.ask(QUESTION, max_tokens=3).ids


@pytest.mark.parametrize(("options", "message"), [
    ({"policy": "cocktail"}, "policy cocktail sizes the cache by the scores"),
    ({"policy": "fp16"}, "policy fp16 looks at no scores"),
    ({"policy": "uniform", "tier": "K4V2"}, "policy uniform looks at no scores"),
])
def test_policies_without_a_use_for_it_are_refused_by_name(doc, options, message):
    for scorer in ("attention", AttentionScorer()):
        for call in (doc.ask, doc.plan, doc.pending):
            with pytest.raises(PlanError, match=message):
                call(QUESTION, scorer=scorer, **options)


def test_misuse_is_named(doc):
    with pytest.raises(ScorerError, match="knows no texts"):
        load_scorer("attention").score(["a"], "b")
    planned = doc.pending(QUESTION, scorer="attention", kv_bits=KV_BITS, max_tokens=2)
    layout, engine, prompt = planned.layout, doc.model.engine, doc.prompt(QUESTION)

    def planned_by(choose=planned.choose, make=planned.make, rows=planned.rows, layout=layout):
        return LayerwisePlan(layout, rows, choose, make)

    with pytest.raises(PlanError, match=r"layer 0 was given .* the layout expects"):
        read(engine, prompt, [planned_by(choose=lambda layer, masses: [0] * layout.n_chunks)])
    with pytest.raises(PlanError, match="not what was packed"):
        read(engine, prompt, [planned_by(make=lambda chunks, masses: planned.make(chunks[::-1], masses))])
    for rows in (range(5, 5), range(len(prompt) + 1), range(-2, 3)):
        with pytest.raises(PlanError, match=r"attention of rows .* is asked for; the prompt has"):
            planned_by(rows=rows)
    placed = doc.plan(QUESTION, policy="cocktail", max_tokens=2, no_reorder=True).layout
    with pytest.raises(PlanError, match="cannot stay in place"):
        planned_by(layout=placed)
