"""What policies, the search for pairs and scoring by attention ask of the GPU, beside the oracle's."""

import json

import numpy as np
import pytest
import tiny_model
from numpy_backend import NumpyBackend
from strategies import Case
from test_in_place import attended, plan_of

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from kernels_cu.backend import CudaBackend
from kernels_cu.errors import NoDevice

try:
    CUDA = CudaBackend()
except NoDevice as error:
    pytest.skip(str(error), allow_module_level=True)

import cocktail
from cocktail.model import Model
from cocktail.policies.pairs import fingerprint
from cocktail.tuning import calibration as calibration_module
from cocktail.tuning.calibration import Prompt, calibrate
from cocktail.tuning.profile import profile
from runtime.checkpoint import Checkpoint
from runtime.engine import read
from runtime.layerwise import LayerwisePlan
from runtime.model import Model as Engine
from runtime.plan import FP16, DocumentShape, Tier
from runtime.weights import load_weights

TEXT = "The ferry to Merrow Point leaves at nine. " * 60
TIERS = (Tier(2, 2), Tier(4, 4), FP16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model whose heads the GPU has kernels for: on the oracle, on the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_model.CONFIG, "head_dim", 64)
        path = tiny_model.save_tiny_model(tmp_path_factory.mktemp("model"))
    cuda = cocktail.load(path, backend="cuda")
    with Checkpoint.open(path) as checkpoint:
        oracle = Engine(checkpoint.config, load_weights(checkpoint, NumpyBackend()), NumpyBackend())
    return Model(oracle, cuda.tokenizer, cuda.template), cuda


@pytest.mark.parametrize(("head_dim", "group", "kv_heads", "n_chunks", "window"), [
    (128, 4, 8, 301, None), (64, 2, 2, 40, None), (128, 4, 2, 90, 1500)])
def test_attention_over_chunks_in_place(head_dim, group, kv_heads, n_chunks, window):
    """Hundreds of short spans: the float64 reference within what FP16 operands cost; the same bits every time."""
    rng = np.random.default_rng(n_chunks)
    assignment = tuple(int(tier) for tier in rng.integers(len(TIERS), size=n_chunks))
    shape = DocumentShape(n_layers=1, n_kv_heads=kv_heads, head_dim=head_dim, chunk=32, n_chunks=n_chunks, prefix=5,
                          remainder=3, suffix=20, max_new=4, window=window)
    layout = shape.layout(TIERS, [assignment.count(tier) for tier in range(len(TIERS))])
    case = Case(layout, tuple(range(n_chunks)), assignment, group, 2, "normal", "normal", 1.0, 7)
    plan = plan_of(case)
    expected = attended(NumpyBackend(), case, plan.without_reordering())
    placed = attended(CUDA, case, plan.without_reordering())
    np.testing.assert_allclose(placed, expected, rtol=0, atol=5e-3)
    np.testing.assert_allclose(placed, attended(CUDA, case, plan), rtol=0, atol=5e-3)
    np.testing.assert_array_equal(attended(CUDA, case, plan.without_reordering()), placed)


def test_profile_and_cost_equal_the_oracles(models, monkeypatch):
    """The cost along the answer a token at a time, and in one pass."""
    tiers, found, in_one_pass = [Tier(2, 2), Tier(4, 4)], [], calibration_module.force
    for model, force in zip(models, (lambda reading, answer, cache: reading.force(answer, cache), in_one_pass),
                            strict=True):
        monkeypatch.setattr(calibration_module, "force", force)
        calibration = calibrate(model, [Prompt(TEXT, "When?", "It leaves at nine, every day.")], answer_tokens=8)
        found.append((profile(calibration, tiers), calibration.kl(tiers), fingerprint(model.engine)))
    (errors, kl, mark), (cuda_errors, cuda_kl, cuda_mark) = found
    np.testing.assert_allclose(cuda_errors, errors, rtol=0.05, atol=1e-3)
    assert cuda_kl == pytest.approx(kl, rel=0.1, abs=1e-4)
    assert cuda_mark == mark


@pytest.mark.parametrize(("policy", "options"), [
    ("uniform", {"tier": "K4V4"}), ("kvtuner", {"pairs": True}),
    ("cocktail", {"pairs": True, "no_search": True, "no_reorder": True}), ("budget", {"pairs": True, "kv_bits": 5.0})])
def test_every_policys_logits_are_the_oracles(models, tmp_path, policy, options):
    """Up to a few codes, as on the CPU: prefill rounds some K and V to the other side."""
    losses = {side: {"2": [1, 0.1], "3": [0.3, 0.03], "4": [0.1, 0.01], "8": [1e-3, 1e-4]} for side in "KV"}
    (tmp_path / "pairs.json").write_text(json.dumps({"version": 1, "pairs": ["K4V4", "K2V2"], "losses": losses}))
    given = options | ({"pairs": tmp_path / "pairs.json"} if "pairs" in options else {})
    oracle, cuda = (model.read(TEXT) for model in models)
    plan, exact = (oracle.plan("When?", policy=name, max_tokens=8, **more)
                   for name, more in ((policy, given), ("fp16", {})))
    answer = cuda.ask("When?", plan=exact).ids
    expected, unquantized = (oracle.logits("When?", answer, plan=each) for each in (plan, exact))
    error, effect = cuda.logits("When?", answer, plan=plan) - expected, unquantized - expected
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(effect)


def test_layers_that_rank_by_their_own_attention(models):
    """The oracle's choices but for chunks that are almost equal; the same bits every time, whoever reads the prompt."""
    oracle, cuda = (model.read(TEXT) for model in models)
    options = {"scorer": "attention", "kv_bits": 5.0, "max_tokens": 8}
    plan, expected = cuda.plan("When?", **options), oracle.plan("When?", **options)
    assert plan.layout == expected.layout
    differ = np.array(plan.assignment) != np.array(expected.assignment)
    assert differ.mean() < 0.05
    np.testing.assert_allclose(plan.scores, expected.scores, rtol=0.02, atol=1e-4)
    exact = oracle.plan("When?", policy="fp16", max_tokens=8)
    answer = cuda.ask("When?", **options)
    assert answer.plan == plan
    assert "attention_mass" in answer.stats.kernels
    assert answer.ids == cuda.ask("When?", plan=plan).ids
    compared = cuda.compare("When?", {"fp16": exact, "own": cuda.pending("When?", **options)}, max_tokens=8)
    assert compared["own"].plan == plan
    ids = compared["fp16"].ids
    wanted, unquantized = (oracle.logits("When?", ids, plan=each) for each in (plan, exact))
    error, effect = compared["own"].logits - wanted, unquantized - wanted
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(effect)


@pytest.mark.parametrize("tile", [48, 300])
def test_masses_arrive_whole_whatever_the_tiles(models, tile):
    """A buffer that the host reads while the device works on: every layer's own, not the one before or half of it."""
    found = []
    for model in models:
        doc, seen = model.read(TEXT), []
        layout = doc.shape("When does the last ferry leave?", 2).layout([FP16], [doc.n_chunks])
        rows = range(len(doc.prompt("When does the last ferry leave?")) - 20, layout.prompt_tokens)

        def choose(layer, masses, seen=seen, layout=layout):
            seen.append(masses.copy())
            return [0] * layout.n_chunks

        def make(chunks, masses, layout=layout):
            return cocktail.Plan(layout, chunks, "test", "attention")

        for _ in range(3):
            planned = LayerwisePlan(layout, rows, choose, make)
            read(model.engine, doc.prompt("When does the last ferry leave?"), [planned], tile=tile)
        n = layout.n_layers
        np.testing.assert_array_equal(seen[:n], seen[-n:])
        found.append(seen[:n])
    np.testing.assert_allclose(found[1], found[0], rtol=0.02, atol=1e-4)
