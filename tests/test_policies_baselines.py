"""kivi, atom, kvquant and the option `formats`: their plans and bytes; then every policy end to end on a tiny model:
its logits are those of attention over the decoded values (tests/decoded_ref.py)."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decoded_ref
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_backend import NumpyBackend
from test_policies import SHAPES, shape_of, tiers_of
from test_policies_layers import bits_per_value
from tiny_model import HANDBOOK

from cocktail import summary
from cocktail.model import Model
from cocktail.policies import load_policy
from cocktail.policies.pairs import fingerprint
from runtime.arena import ArenaLayout
from runtime.backend import load_backend
from runtime.chat import ChatTemplate
from runtime.checkpoint import Checkpoint
from runtime.engine import read
from runtime.errors import PlanError
from runtime.format_data import format_data
from runtime.formats import kvquant, turn_back
from runtime.model import Model as Engine
from runtime.model import prefill
from runtime.plan import FP16, HIDDEN, DocumentShape, Plan, Tier
from runtime.tokenizer import Tokenizer
from runtime.weights import load_weights

QUESTION = "Who mended the cracked iron pan?"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: Any) -> Path:
    """Of the shapes that shape_of gives."""
    return decoded_ref.save_calibration(tmp_path_factory.mktemp("c") / "levels.safetensors",
                                        SimpleNamespace(n_layers=2, n_kv_heads=3, head_dim=64))


# Plans.

@settings(deadline=None)
@given(shape=SHAPES, bits=st.sampled_from([2, 3, 4, 8]), residual=st.sampled_from([0, 1, 40, 128, 10**5]))
def test_kivi_packs_all_but_the_window_and_the_prefix(shape: DocumentShape, bits: int, residual: int) -> None:
    plan = load_policy("kivi", bits=bits, residual=residual).plan(shape)
    layout = plan.layout
    assert layout.prompt_tokens == shape.prompt_tokens and layout.context_tokens == shape.context_tokens
    for generated in (0, 1, shape.chunk, shape.max_new):
        behind = shape.prompt_tokens - shape.prefix + generated
        packed = (layout.n_chunks + layout.flushed(generated)) * shape.chunk
        assert packed == max(0, (behind - residual) // shape.chunk) * shape.chunk
    hidden = len(layout.hidden_chunks())
    assert tiers_of(plan) == [HIDDEN] * hidden + [Tier(bits, bits)] * (layout.n_chunks - hidden)
    assert hidden == min(len(shape.hidden_chunks()), layout.n_chunks)
    assert (plan.policy, layout.formats, layout.flush, layout.lowest) == ("kivi", "kivi", residual, Tier(bits, bits))
    assert Plan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(shape=SHAPES)
def test_atom_and_kvquant_keep_no_window(shape: DocumentShape) -> None:
    plan = load_policy("atom").plan(shape)
    assert plan.layout.flush == 0 and plan.layout.n_chunks == shape.n_chunks
    assert set(tiers_of(plan)) <= {Tier(4, 4), HIDDEN} and FP16 not in plan.layout.tiers


@pytest.mark.parametrize(("name", "options", "head_dim", "nominal"), [
    ("kivi", {"bits": 4}, 128, 4 + 1), ("kivi", {"bits": 2}, 64, 2 + 1), ("atom", {}, 128, 4.25), ("atom", {}, 64, 4.5),
])
def test_bits_per_value_are_the_published_ones_and_the_positions(name: str, options: dict[str, int], head_dim: int,
                                                                 nominal: float) -> None:
    shape = shape_of(500, head_dim=head_dim, heads=8)
    plan = load_policy(name, **options).plan(shape)
    positions = Fraction(32, 2 * 8 * head_dim * 32)
    assert nominal + positions <= bits_per_value(plan) < nominal + positions + Fraction(1, 500)


def test_kvquants_sparse_store_and_shared_scales_are_counted(calibration: Path) -> None:
    for bits in (2, 3, 4):
        plan = load_policy("kvquant", bits=bits, calibration=calibration).plan(shape_of(500))
        assert (plan.layout.calibration is not None) and plan.layout.calibration.path == str(calibration)
        sparse = 2 * 3 * 8 * (4 + 4 * 26)  # bits of 26 entries, the capacity of 32 x 64 values, in K and V of 3 heads
        extra = Fraction(sparse + 8 * 4 * 32 + 32, 2 * 3 * 64 * 32)
        assert bits + extra <= bits_per_value(plan) < bits + extra + Fraction(1, 300)
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("family", "tier"), [("kivi", "K8V2"), ("atom", "K4V4"), ("kvquant", "K3V4")])
def test_uniform_takes_any_family(family: str, tier: str, calibration: Path) -> None:
    options = {"calibration": calibration} if family == "kvquant" else {}
    plan = load_policy("uniform", tier=tier, sink=1, formats=family, **options).plan(shape_of(9))
    assert tiers_of(plan) == [FP16] + [Tier.parse(tier)] * 8
    assert (plan.layout.formats, plan.layout.flush, plan.policy) == (family, None, f"uniform ({family} formats)")


def test_cocktail_with_plain_min_max_has_the_same_chunks() -> None:
    scores = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    for options in ({}, {"no_reorder": True}, {"no_search": True, "seed": 3}):
        ours, plain = (load_policy("cocktail", formats=family, **options).plan(shape_of(40), scores)
                       for family in ("rotated", "kivi"))
        assert (ours.assignment, ours.layout.tiers) == (plain.assignment, plain.layout.tiers)
        assert plain.layout.formats == "kivi" and plain.policy.endswith("kivi formats)")
        assert ArenaLayout(plain.layout).context_bytes > ArenaLayout(ours.layout).context_bytes


@pytest.mark.parametrize(("name", "options", "message"), [
    ("kivi", {"bits": 5}, "bits is 5; expected one of 2, 3, 4, 8"), ("kivi", {"bits": True}, "bits is True"),
    ("kivi", {"residual": -1}, "residual is -1"), ("kivi", {"sink": 1}, "no option sink"),
    ("atom", {"bits": 4}, "no option bits"), ("kvquant", {}, "need a calibration"),
    ("kvquant", {"bits": 8, "calibration": "x"}, "bits is 8; expected one of 2, 3, 4"),
    ("kvquant", {"calibration": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ("uniform", {"tier": "K4V4", "formats": "int4"}, "formats are 'int4'; expected one of rotated, kivi"),
    ("uniform", {"tier": "K4V2", "formats": "atom"}, "no K4V2 in the atom formats; their widths are 4 and 16"),
    ("uniform", {"tier": "K4V2", "formats": "kivi", "calibration": "x"}, "the kivi formats read no calibration"),
    ("cocktail", {"formats": "atom"}, "no K2V2 in the atom formats"),
    ("cocktail", {"formats": "kvquant"}, "need a calibration"), ("budget", {"formats": "kivi"}, "no option formats"),
])
def test_invalid_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_policy(name, **options)


def test_a_calibration_for_another_model_is_refused(calibration: Path) -> None:
    policy = load_policy("kvquant", calibration=calibration)
    with pytest.raises(PlanError, match="is for 2 layers, 3 KV heads and head_dim 64; the model has 1, 3 and 64"):
        policy.plan(shape_of(3, layers=1))


# End to end.

POLICIES = {
    "fp16": ("fp16", {}), "budget": ("budget", {"kv_bits": 4}), "cocktail": ("cocktail", {}),
    "cocktail, no reorder": ("cocktail", {"no_reorder": True}), "uniform": ("uniform", {"tier": "K8V4"}),
    "kvtuner": ("kvtuner", {}), "kivi-2": ("kivi", {"bits": 2, "residual": 40}), "kivi-4": ("kivi", {}),
    "atom": ("atom", {}), "kvquant-2": ("kvquant", {"bits": 2}), "kvquant-3": ("kvquant", {"bits": 3}),
    "kvquant-4": ("kvquant", {}), "uniform kivi": ("uniform", {"tier": "K3V2", "formats": "kivi"}),
    "uniform atom": ("uniform", {"tier": "K4V4", "formats": "atom"}),
    "uniform kvquant": ("uniform", {"tier": "K4V2", "formats": "kvquant"}),
    "cocktail kivi": ("cocktail", {"formats": "kivi"}),
    "cocktail kvquant, no reorder": ("cocktail", {"formats": "kvquant", "no_reorder": True}),
}
ANSWER = 45


def load(path: Path, backend: Any) -> Model:
    with Checkpoint.open(path) as checkpoint:
        return Model(Engine(checkpoint.config, load_weights(checkpoint, backend), backend),
                     Tokenizer.from_checkpoint(checkpoint), ChatTemplate.from_checkpoint(checkpoint))


def options_for(options: dict[str, Any], name: str, model: Model, folder: Path) -> dict[str, Any]:
    """With the files that they name, which need the model."""
    if "kvquant" in (name, options.get("formats")):
        options = options | {"calibration": decoded_ref.save_calibration(folder / "levels.safetensors", model.config)}
    if name == "kvtuner":
        (folder / "pairs.json").write_text(json.dumps({"version": 1, "pairs": ["K4V2", "K3V4"]}))
        options = options | {"pairs": folder / "pairs.json"}
    return options


@pytest.mark.parametrize("label", POLICIES)
def test_logits_are_those_of_attention_over_the_decoded_values(label: str, path: Path, tmp_path: Path) -> None:
    (name, options), model = POLICIES[label], load(path, NumpyBackend())
    document = model.read(HANDBOOK[:2500])
    options = options_for(options, name, model, tmp_path)
    answer = document.ask(QUESTION, policy=name, max_tokens=ANSWER, **options)
    plan = answer.plan
    assert plan.layout.formats == options.get("formats", name if name in ("kivi", "atom", "kvquant") else "rotated")
    prompt, ids = document.prompt(QUESTION), list(answer.ids)
    rope = model.engine.rope(len(prompt), len(prompt) + ANSWER)
    data = format_data(model.engine.backend, model.config, plan.layout, rope)
    expected = decoded_ref.forced(model.engine, prompt, plan, ids, data)
    np.testing.assert_allclose(document.logits(QUESTION, ids, plan=plan), expected, atol=3e-4)
    assert expected.argmax(axis=1).tolist() == ids
    if name in ("atom", "kvquant", "kivi"):
        assert plan.layout.flushed(ANSWER - 1) > plan.layout.flushed(0)
    again = document.ask(QUESTION, plan=Plan.from_json(plan.to_json()))
    assert again.ids == answer.ids and again.stats.cache_bytes == answer.stats.cache_bytes


@pytest.mark.parametrize("label", POLICIES)
def test_the_cpu_backend_follows_every_policy(label: str, path: Path, tmp_path: Path) -> None:
    (name, options), oracle = POLICIES[label], load(path, NumpyBackend())
    options = options_for(options, name, oracle, tmp_path)
    plan = oracle.read(HANDBOOK[:2500]).plan(QUESTION, policy=name, max_tokens=ANSWER, **options)
    expected, actual = (forced_by(model, plan) for model in (oracle, load(path, load_backend("cpu", threads=1))))
    exact = forced_by(oracle, oracle.read(HANDBOOK[:2500]).plan(QUESTION, policy="fp16", max_tokens=ANSWER))
    # Float32 here and float64 there round some K and V to other FP16 values, and now and then one to another code.
    assert rms(actual - expected) <= 2e-3 + 0.05 * rms(expected - exact)


def test_outliers_that_find_no_room_are_counted(path: Path, tmp_path: Path) -> None:
    """As many as the reference keeps of the same K and V."""
    model = load(path, load_backend("cpu", threads=1))
    file = decoded_ref.save_calibration(tmp_path / "levels.safetensors", model.config)
    document, C = model.read(HANDBOOK[:2500]), 32
    plan, ids = document.plan(QUESTION, policy="kvquant", calibration=file, max_tokens=4), document.prompt(QUESTION)
    rope, expected = model.engine.rope(len(ids), len(ids) + 4), np.zeros(2, np.int64)
    data = format_data(NumpyBackend(), model.config, plan.layout, rope)
    n = plan.layout.n_chunks + plan.layout.flushed(0)
    rows = plan.layout.prefix + np.arange(n * C).reshape(n, C)

    def count(layer: int, k: Any, v: Any) -> None:
        d, (k, v) = data[layer], (np.asarray(x)[:, rows].swapaxes(0, 1) for x in (k, v))
        before = turn_back(k, *(np.asarray(table)[rows][:, None] for table in (d.cos, d.sin)))
        for encoded in (kvquant.encode_k(before, 4, kvquant.levels_of(d.k_levels, 4), d.k_centre, d.k_half),
                        kvquant.encode_v(v, 4, kvquant.levels_of(d.v_levels, 4))):
            expected[:] += [int(x.sum()) for x in (encoded.sparse.kept, encoded.sparse.overflowed)]

    logits = model.engine.backend.empty((1, model.config.vocab_size), np.float32)
    for _ in prefill(model.engine, ids, rope, [SimpleNamespace(pack=count)], logits, 512):  # type: ignore[list-item]
        pass
    cache = read(model.engine, ids, [plan]).caches[0]
    cache.start()
    assert cache.outliers() == tuple(expected) and expected.min() > 0
    assert read(model.engine, ids, [document.plan(QUESTION, policy="fp16")]).caches[0].outliers() == (0, 0)

    answer = document.ask(QUESTION, plan=plan, max_tokens=2)
    assert (answer.stats.outliers_kept, answer.stats.outliers_without_room) == tuple(expected)
    assert f"outliers {expected[0]:,} kept exactly, {expected[1]:,} found no room" in summary.table(answer)
    exact = document.ask(QUESTION, policy="fp16", max_tokens=1)
    assert (exact.stats.outliers_kept, exact.stats.outliers_without_room) == (0, 0)
    assert "outliers" not in summary.table(exact)


def rms(x: Any) -> float:
    return float(np.sqrt(np.square(x).mean()))


def forced_by(model: Model, plan: Plan) -> Any:
    ids = np.random.default_rng(8).integers(2, model.config.vocab_size, ANSWER)
    return model.read(HANDBOOK[:2500]).logits(QUESTION, ids.tolist(), plan=plan)


def test_a_calibration_with_another_fingerprint_is_refused(path: Path, tmp_path: Path) -> None:
    model = load(path, NumpyBackend())
    file = tmp_path / "levels.safetensors"
    document = model.read(HANDBOOK[:600])
    decoded_ref.save_calibration(file, model.config, fingerprint=fingerprint(model.engine))
    document.plan(QUESTION, policy="kvquant", calibration=file)
    decoded_ref.save_calibration(file, model.config, fingerprint="0123456789abcdef")
    with pytest.raises(PlanError, match="is for the model with fingerprint '0123456789abcdef'"):
        document.plan(QUESTION, policy="kvquant", calibration=file)


@pytest.mark.parametrize(("break_", "message"), [
    (lambda t, m: t.pop("layers.1.k_half"), "layers.1.k_half is missing"),
    (lambda t, m: t.update({"layers.0.v_levels.3": np.zeros(4, np.float32)}), r"v_levels.3 is F32 \(4,\); expected"),
    (lambda t, m: t.update({"layers.0.k_levels.2": np.array([1, 0, 2, 3], np.float32)}), "k_levels.2 does not ascend"),
    (lambda t, m: t.update({"layers.0.k_half": -t["layers.0.k_half"]}), "k_half has negative values"),
    (lambda t, m: t.update({"layers.1.k_centre": np.full((3, 64), np.nan, np.float32)}), "k_centre has values that"),
    (lambda t, m: m.update(version="2"), "\"version\" is '2'; expected '1'"), (lambda t, m: t.clear(), "has no tensor"),
    (lambda t, m: t.update({"layers.0.k_centre": np.zeros(3, np.float32)}), r"has shape \(3,\)"),
])
def test_a_damaged_calibration_is_refused(break_: Any, message: str, calibration: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors, metadata = load_file(calibration), {"version": "1"}
    break_(tensors, metadata)
    save_file(tensors, tmp_path / "broken.safetensors", metadata)
    with pytest.raises(PlanError, match=message):
        load_policy("kvquant", calibration=tmp_path / "broken.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(PlanError, match="calibration"):
        load_policy("kvquant", calibration=tmp_path / "broken.safetensors")
