"""What bench.policies computes without a GPU: plans, bytes of a step, options, conclusions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

import cocktail
from bench import policies
from bench.gpu import PREFIX, SHAPES, SUFFIX, shape_of
from bench.policies import EIGHT_BITS, EXACT, FROM_FILE, IN_PLACE, PAIRS, PAPERS, POLICIES, Figure
from runtime.arena import ArenaLayout
from runtime.config import ModelConfig

CONFIG = ModelConfig.from_json({**SHAPES["mistral-7b"], "max_position_embeddings": 8192})
# As far as a plan and a floor ask.
MODEL = SimpleNamespace(config=CONFIG, weights=SimpleNamespace(
    nbytes=10**10, embed=SimpleNamespace(array=SimpleNamespace(nbytes=10**8))))


def plan_of(name, tmp_path, tokens=4096):
    policy, options = POLICIES[name]
    return policies.plan_of(MODEL, shape_of(CONFIG, tokens, 41), policy, options, tmp_path)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != FROM_FILE])
def test_every_policy_has_a_plan_whose_step_reads_what_it_stores(name, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "fingerprint", lambda model: "0123456789abcdef")
    plan = plan_of(name, tmp_path)
    layout, read = plan.layout, policies.step_bytes(MODEL, plan.layout, 32)
    arena = ArenaLayout(layout)
    assert 10**10 - 10**8 + arena.context_bytes < read < 10**10 - 10**8 + arena.nbytes
    if layout.flush is None:
        visible = PREFIX + SUFFIX + 24  # in the middle of the timed steps
        assert read == 10**10 - 10**8 + arena.context_bytes + visible * 4 * 32 * 8 * 128


def test_what_the_plans_keep(tmp_path):
    sizes = {name: ArenaLayout(plan_of(name, tmp_path).layout) for name in (EXACT, EIGHT_BITS, "K4V4", PAIRS, PAPERS,
                                                                            IN_PLACE)}
    bits = {name: size.context_bits_per_value for name, size in sizes.items()}
    assert bits[EXACT] > bits[EIGHT_BITS] > bits["K4V4"] > bits[PAIRS] > bits[PAPERS] > 2.5
    assert bits[PAIRS] == pytest.approx(3.25 + 0.32, abs=0.02)  # codes and metadata
    assert plan_of(IN_PLACE, tmp_path).layout.in_place is not None
    assert 1 <= bits[IN_PLACE] / bits[PAPERS] < 1.05
    counts = dict(zip(map(str, plan_of(PAPERS, tmp_path).layout.tiers), plan_of(PAPERS, tmp_path).layout.counts[0],
                      strict=True))
    assert counts["K2V2"] > counts["K4V4"] > counts["FP16"] >= 1


def test_a_file_of_another_model_is_spread_over_the_layers(tmp_path):
    """Its first layer is this one's first, its last one the last; its losses make plans of as many bits as without."""
    file = policies._pairs_file(pairs_file(tmp_path, 5))
    assert [str(pair) for pair in policies.spread_pairs(file.pairs, 7).pairs] == [
        "K2V2", "K2V3", "K2V3", "K3V2", "K3V4", "K3V4", "K4V4"]
    assert policies.spread_losses(file.losses, 3).k[2] == (0.5, 0.25, 0.125)
    assert policies.spread((1, 2, 3), 1) == (1,) and policies.spread((1,), 3) == (1, 1, 1)
    shape = shape_of(CONFIG, 4096, 41)
    spread = policies.spread_losses(file.losses, shape.n_layers)
    with_file, without = (policies.plan_of(MODEL, shape, "budget", {"kv_bits": 3.3} | given, tmp_path).layout
                          for given in ({"pairs": spread}, {}))
    assert len(set(with_file.counts)) > 1 == len(set(without.counts))
    assert ArenaLayout(with_file).context_bits_per_value == pytest.approx(
        ArenaLayout(without).context_bits_per_value, abs=0.01)


def pairs_file(folder, layers):
    """Of some other model: the earlier a layer, the more it loses, and the fewer bits it has."""
    pairs = ["K2V2", "K2V3", "K3V2", "K3V4", "K4V4"]
    losses = [0.5 / 2 ** (layer / 2) for layer in range(layers)]
    side = {str(width): [loss * 4.0 ** (2 - width) for loss in losses] for width in (2, 3, 4, 8)}
    path = folder / "pairs.json"
    path.write_text(json.dumps({"version": 1, "pairs": pairs[:layers], "losses": {"K": side, "V": side},
                                "model": {"n_layers": layers, "fingerprint": "of another model"}}))
    return str(path)


def test_an_arena_is_packed_and_decoded_without_a_prompt(tmp_path, monkeypatch):
    """On the CPU, with NumPy in CuPy's place."""
    model = cocktail.load(tiny_model.save_tiny_model(tmp_path), backend="cpu", threads=1).engine
    free = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(policies, "cupy", SimpleNamespace(
        random=np.random, get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
        cuda=SimpleNamespace(runtime=SimpleNamespace(memGetInfo=lambda: (next(free), 0)))))
    monkeypatch.setattr(policies, "release", lambda: None)
    monkeypatch.setattr(policies, "unread_weights", lambda model: 0)
    figures = policies.measure(model, "tiny", 300, [EXACT, "K4V4", PAIRS, FROM_FILE, IN_PLACE],
                               {"5": 5.0, "0.1": 0.1}, 1e9, 2 * 10**9, policies._pairs_file(pairs_file(tmp_path, 5)))
    assert [figure.policy for figure in figures] == [EXACT, "K4V4", PAIRS, FROM_FILE, IN_PLACE, "budget 5",
                                                     "budget 0.1"]
    assert "expected at least" in figures.pop().error
    for figure in figures:
        assert not figure.error
        assert figure.cache > 0 and figure.total > 0
        assert figure.floor > 0
        assert figure.tpot > 0
    assert figures[0].bpv == pytest.approx(16, abs=0.1)


def test_conclusions_hold_figures_against_the_papers_and_each_other():
    def figure(name, cache, tpot):
        return Figure("mistral-7b", 4096, name, "", 4.0, cache, cache + 100, tpot, tpot / 2)

    known = {each.policy: each for each in (
        figure(EXACT, 100, 0.010), figure(EIGHT_BITS, 50, 0.0075), figure("K4V4", 25, 0.006), figure(PAIRS, 24, 0.005),
        figure(PAPERS, 20, 0.004), figure(IN_PLACE, 21, 0.006), figure("budget K4V4 = 3.1", 20, 0.0066))}
    text = "\n".join(policies.conclusions(known, {"K4V4 = 3.1": 3.1, "atom = 3.0": 3.0}))
    assert "memory saved of FP16's: cocktail 40.0%, budget K4V4 = 3.1 40.0%; the paper: 12-42%" in text
    assert "TPOT saved of FP16's: cocktail 60.0%, budget K4V4 = 3.1 34.0%; the paper: 32-52%" in text
    assert "TPOT x 1.50, total memory x 1.01, cache x 1.05; the paper: x 1.95 and x 1.50" in text
    assert "kvtuner's tokens/s over K8V8: +50.0%" in text
    assert "budget K4V4 = 3.1: cache 0.800 of K4V4's, met; TPOT 6.600 against 6.000 ms, MISSED" in text
    assert "atom" not in text


def test_a_policy_without_figures_says_why(capsys):
    known = [Figure("mistral-7b", 4096, EXACT, "", 16.0, 2**30, 2**31, 0.01, 0.009),
             Figure("mistral-7b", 4096, "atom", "no kernel for it")]
    policies.report("mistral-7b", 4096, known, {})
    lines = capsys.readouterr().out.splitlines()
    assert "no kernel for it" in next(line for line in lines if line.startswith("| atom"))
    assert "1.11" in next(line for line in lines if line.startswith("| fp16"))


def test_options(tmp_path):
    args = policies._arguments(["--budgets", "3.3,kivi-4=2.95", "--contexts", "4096", "--shapes", "mistral-7b"])
    assert args.budgets == {"3.3": 3.3, "kivi-4 = 2.95": 2.95}
    assert (args.contexts, args.shapes) == ([4096], ["mistral-7b"])
    assert args.policies == [policy for policy in POLICIES if policy != FROM_FILE]
    file = pairs_file(tmp_path, 3)
    assert policies._arguments(["--pairs", file]).policies == [*POLICIES]
    for wrong in (["--budgets", "int4=3"], ["--budgets", "much"], ["--policies", "gguf"], ["--policies", FROM_FILE],
                  ["--pairs", f"{file}.missing"]):
        with pytest.raises(SystemExit):
            policies._arguments(wrong)
    # Shapes of equal sizes share their weights.
    assert policies._sizes("llama-2-7b") == policies._sizes("longchat-7b") != policies._sizes("mistral-7b")
