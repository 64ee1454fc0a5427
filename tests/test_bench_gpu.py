"""What the GPU benches compute without a GPU: floors, plans, scorers to be timed, tables, which command shows what."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from bench import decode, memory, scoring, shapes
from bench.gpu import SHAPES, Case, multiply_adds, plan_of, shape_of
from bench.report import on_gpu
from runtime.config import ModelConfig
from runtime.errors import BackendError
from runtime.plan import FP16

CONFIG = {**SHAPES["mistral-7b"], "max_position_embeddings": 4096}


@settings(max_examples=50)
@given(tokens=st.integers(1, 40), window=st.none() | st.integers(1, 50), kv_heads=st.sampled_from([1, 2, 4]),
       layers=st.integers(1, 3))
def test_multiply_adds_are_those_of_every_matrix_and_visible_pair(tokens, window, kv_heads, layers):
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4, head_dim=6,
                 num_key_value_heads=kv_heads, sliding_window=window)
    config = ModelConfig.from_json(CONFIG | sizes)
    count = 0
    for layer in range(layers):
        for token in range(tokens):
            count += 24 * (4 + 2 * kv_heads) * 6  # q, k, v
            if layer < layers - 1:
                count += 24 * 24 + 3 * 24 * 40  # o; gate, up, down
                seen = sum(0 <= token - key < (window or tokens) for key in range(tokens))
                count += 2 * 4 * 6 * seen  # q k and p v
    assert multiply_adds(config, tokens) == count


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [0, 32, 4100])
def test_every_shape_has_plans_of_every_policy(name, tokens):
    shape = shape_of(ModelConfig.from_json({**SHAPES[name], "max_position_embeddings": 8192}), tokens, 8)
    exact, mix = (plan_of(shape, policy) for policy in ("fp16", "mix"))
    assert exact.layout.tiers == (FP16,)
    assert exact.layout.prompt_tokens == mix.layout.prompt_tokens == tokens + 32
    if tokens == 4100:
        assert mix.layout.counts[0] == (128 - 19 - 6, 19, 6)  # 80, 15 and 5% of 128
        assert list(mix.assignment[0]) != sorted(mix.assignment[0])


def test_texts_to_score_are_as_many_and_as_long_as_chunks():
    texts = scoring.chunk_texts(9000)  # more than the text has: it begins anew
    assert len(texts) == 9000
    assert {len(text) for text in texts} == {scoring.CHARACTERS}
    assert len(set(texts)) > 4000


def test_scorers_to_be_timed_score(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "ENCODERS", dict.fromkeys(scoring.ENCODERS, (32, 2, 2)))
    monkeypatch.setattr(scoring, "EMBEDDINGS", scoring.VOCABULARY)
    texts = scoring.chunk_texts(12)
    for name in scoring.SCORERS:
        scorer = scoring.make_scorer(name, texts, tmp_path)
        scores = scorer.score(texts, scoring.QUERY)
        assert scores.shape == (12,) and np.ptp(scores) > 0
        assert scoring.score_seconds(scorer, texts, 1) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"minilm", "contriever"}


def test_encoders_without_kernels_end_the_bench_before_it_measures(monkeypatch):
    def missing():
        raise BackendError("the C kernels are not built")

    monkeypatch.setattr(scoring, "load_encoder_backend", missing)
    monkeypatch.setattr(shapes, "CudaBackend", lambda: pytest.fail("a GPU was looked for"))
    with pytest.raises(SystemExit, match=r"minilm, hybrid: the C kernels are not built; or give .*library:minilm"):
        shapes.main(["--scorers", "bm25,minilm,hybrid"])
    scoring.check_scorers([*scoring.LIBRARY, "bm25", shapes.ATTENTION])


@pytest.mark.parametrize(("module", "figures"), [(decode, ("TPOT",)), (memory, ("memory",))])
@pytest.mark.parametrize("options", [["--shape", "mistral-7b"], ["--backend=cuda"]])
def test_the_commands_show_their_figures_of_the_gpu(module, figures, options, monkeypatch):
    calls = []
    monkeypatch.setattr(shapes, "main", lambda *call: calls.append(call))
    module.main(options)
    assert calls == [(options, figures, module.__name__.split(".")[1])]
    assert not on_gpu(["--backend", "cpu", "--depth", "3"], figures, "decode")
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    assert on_gpu(None, figures, "decode")


def case(name: str) -> Case:
    gib = 2**30
    return Case(name, 0.0 if name == "depth 0" else 3.7, step_bytes=10**10, multiply_adds=10**15,
                parts={"weights": 12 * gib, "packed cache": 4 * gib}, ttft=[2.0, 4.0, 9.0], pack=[0.1] * 3,
                plan=[9.0, 0.03, 0.05], wait=[9.0, 0.01, 0.01], steps=[0.004, 0.005, 0.006], memory=17 * gib,
                pool=16 * gib)


def test_the_table_has_floors_goals_and_peers():
    rates = {"copy": 2e12, "sum": 1e12, "matrix-vector": 2.5e12, "matrix product": 1e15}
    peers = {"quanto 4-bit": "not run: no optimum", "FP16": None}
    (tpot,) = shapes.rows_of(case("depth 0"), "llama-2-7b", shapes.FIGURES, rates, {}, on_card=True)
    assert tpot[:5] == ("depth 0", "TPOT", "5.000 ms (200.0 tokens/s)", "4.000", "1.25")
    assert tpot[5:] == ("met (goal: at most 5.3)", "", "5.6")
    rows = shapes.rows_of(case("mix"), "llama-2-7b", shapes.FIGURES, rates, peers, on_card=True)
    assert [row[1] for row in rows] == ["TTFT", "pack", "TPOT", "memory"]
    assert rows[0][2:6] == ("4.000 s", "2.000", "2.00", "MISSED (goal: at most 1.52)")
    assert rows[0][6] == "quanto 4-bit not run: no optimum"
    assert rows[1][2] == "0.100 s, 2.5% of TTFT" and rows[1][5].startswith("met")
    assert rows[3][2:6] == ("17.000 GiB", "16.000", "1.06", "met (goal: at most 18)")
    (only,) = shapes.rows_of(case("mix"), "llama-2-7b", ("memory",), rates, {}, on_card=False)
    assert only[5:] == ("", "", "")


def test_memory_and_scorers_are_accounted_for(capsys):
    shapes.print_memory([case("depth 0"), case("mix")])
    shapes.print_scorers({"bm25": (0.02, case("bm25"))})
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert table[2] == ["mix", "12,288", "4,096", "16,384", "16,384", "17,408", "1,024", "1.062"]
    assert table[-1] == ["bm25", "20.0", "0.3%", "40.0", "10.0", "0.2%", "6.500"]  # the first round only warms up


def test_options_follow_the_command():
    args = shapes._arguments(["--shape", "llama-2-13b", "--quick"], shapes.FIGURES, "shapes")
    assert (args.shape, args.scorers, args.rounds) == ("llama-2-13b", [], 1)
    args = shapes._arguments(["--model", "x", "--scorers", "bm25,minilm"], ("TPOT",), "decode")
    assert (args.shape, args.model, args.scorers) == (None, "x", ["bm25", "minilm"])
    assert shapes._arguments([], ("TTFT",), "prefill").scorers == [*scoring.SCORERS, shapes.ATTENTION]
    for wrong in (["--shape", "llama-2-7b", "--model", "x"], ["--policies", "int4"]):
        with pytest.raises(SystemExit):
            shapes._arguments(wrong, shapes.FIGURES, "shapes")
