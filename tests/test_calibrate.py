"""`python -m cocktail.calibrate kvquant`: what the file holds, what its levels are worth, what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_model import HANDBOOK

from cocktail import calibrate
from cocktail.model import Model
from cocktail.policies.pairs import fingerprint
from runtime.calibration import load_calibration
from runtime.config import RopeConfig
from runtime.errors import PlanError
from runtime.formats import kvquant, turn_back
from runtime.model import prefill

TEXT = HANDBOOK[:3000]


@pytest.fixture(scope="module")
def written(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "levels.safetensors"
    assert calibrate.main(["kvquant", str(path), "--out", str(out), "--tokens", "700", "--threads", "1"]) == 0
    assert [each.name for each in out.parent.iterdir()] == [out.name]
    return out


def test_the_file_holds_what_the_format_needs(written, model):
    config, tensors = model.config, load_file(written)
    shapes = {"k_centre": (config.n_kv_heads, config.head_dim), "k_half": (config.n_kv_heads, config.head_dim)}
    shapes |= {f"{kind}_levels.{bits}": (2**bits,) for kind in "kv" for bits in kvquant.WIDTHS}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"layers.{layer}.{name}": shape for layer in range(config.n_layers) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        if "levels" in name:
            assert (np.diff(tensor) > 0).all()
            assert (np.abs(tensor) <= 1).all()
    with safe_open(written, "numpy") as file:
        assert file.metadata() == {"version": "1", "fingerprint": fingerprint(model.engine), "weighting": "none",
                                   "tokens": "700"}
    load_calibration(written).check(config.n_layers, config.n_kv_heads, config.head_dim)


def test_the_same_every_time(written, path):
    again = written.with_name("again.safetensors")
    calibrate.main(["kvquant", str(path), "--out", str(again), "--tokens", "700", "--threads", "1"])
    assert load_file(again).keys() == load_file(written).keys()
    for name, tensor in load_file(again).items():
        np.testing.assert_array_equal(tensor, load_file(written)[name])


def kv_before_rope(model, text):
    """K before RoPE and V of every layer, (G, T, D) each."""
    ids, engine, found = model.tokenizer.encode(text), model.engine, []

    class Keeper:
        def pack(self, layer, k, v):
            found.append((turn_back(k, np.asarray(rope[0]), np.asarray(rope[1])), np.array(v)))

    rope = engine.rope(len(ids), len(ids))
    logits = engine.backend.empty((1, model.config.vocab_size), np.float32)
    for _ in prefill(engine, ids, rope, (Keeper(),), logits, 64):
        pass
    return found


def far(values, levels):
    """Mean square of the way to the nearest level."""
    return np.square(values[:, None] - levels).min(axis=1).mean()


def test_levels_and_ranges_fit_text_that_they_were_not_made_from(written, model):
    tensors = load_file(written)
    for layer, (k, v) in enumerate(kv_before_rope(model, TEXT)):
        centre, half = (tensors[f"layers.{layer}.{name}"] for name in ("k_centre", "k_half"))
        outside = np.abs(k - centre[:, None]) > half[:, None]
        assert outside.mean() < 0.05
        middle, radius = calibrate.token_range(v)
        normal = {"k": (k - centre[:, None]) / half[:, None], "v": (v - middle[:, None]) / radius[:, None]}
        for bits in kvquant.WIDTHS:
            even = np.linspace(-1, 1, 2**bits)
            for kind, values in normal.items():
                inside = values[np.abs(values) <= 1]
                assert far(inside, tensors[f"layers.{layer}.{kind}_levels.{bits}"]) < 0.95 * far(inside, even)


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([8, 16, 64]), st.integers(0, 2**32 - 1))
def test_the_range_of_a_token_is_the_formats_own(heads, tokens, head_dim, seed):
    v = np.random.default_rng(seed).standard_t(3, (heads, tokens, head_dim)).astype(np.float16)
    coded = kvquant.encode_v(v, 4, np.linspace(-1, 1, 16, dtype=np.float32))
    centre, half = calibrate.token_range(v)
    np.testing.assert_array_equal(centre, coded.centre.astype(np.float32))
    np.testing.assert_array_equal(half, coded.half.astype(np.float32))


def test_channel_ranges_are_percentiles():
    k = np.random.default_rng(0).standard_normal((2, 20001, 3)).astype(np.float32) * 5 + 2
    centre, half = calibrate.channel_range(k)
    np.testing.assert_allclose(centre, 2, atol=0.4)
    np.testing.assert_allclose(half, 5 * 2.5758, rtol=0.03)
    assert abs((np.abs(k - centre[:, None]) > half[:, None]).mean() - 0.01) < 1e-3


@pytest.mark.parametrize("bits", kvquant.WIDTHS)
def test_levels_find_what_values_cluster_around(bits):
    rng = np.random.default_rng(bits)
    centres = np.sort(rng.uniform(-0.98, 0.98, 2**bits))
    values = (rng.choice(centres, 20000) + rng.normal(0, 1e-4, 20000)).astype(np.float32)
    outliers = rng.uniform(2, 3, 500).astype(np.float32)
    found = calibrate.levels(np.append(values, outliers), bits)
    assert far(values, found) < 0.1 * far(values, np.linspace(-1, 1, 2**bits))


def test_what_cannot_be_calibrated_is_named(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "short.txt").write_text("Nine.", encoding="utf-8")
    out = ["--out", str(tmp_path / "x.safetensors"), "--threads", "1"]
    for arguments, message in (
        ([str(path), "--text", str(tmp_path / "short.txt"), *out], r"has \d+ tokens; expected at least 256"),
        ([str(path), "--text", str(tmp_path / "none.txt"), *out], "none.txt: No such file"),
        ([str(path), "--tokens", "9000", *out], "the model has 8192 positions"),
        ([str(path), "--tokens", "9", *out], "--tokens is 9; expected at least 256"),
        ([str(path), "--out", str(tmp_path / "no" / "x")], "folder does not exist"),
        ([str(tmp_path / "no"), *out], "no"),
    ):
        assert calibrate.main(["kvquant", *arguments]) == 2
        assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)
    assert not list(tmp_path.glob("x*"))
    (tmp_path / "x.safetensors").mkdir()
    assert calibrate.main(["kvquant", str(path), "--tokens", "256", *out]) == 2
    assert "directory" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".part"] == []


def test_degenerate_values_and_scaled_tables_are_refused(model):
    with pytest.raises(PlanError, match="1 different values for 4 levels"):
        calibrate.levels(np.zeros(50, np.float32), 2)
    rope = RopeConfig(kind="yarn", theta=1e4, factor=4.0, original_max_positions=2048)
    scaled = replace(model.engine, config=replace(model.config, rope=rope))
    with pytest.raises(PlanError, match=r"scales what it turns \(yarn\)"):
        calibrate.calibrate(Model(scaled, model.tokenizer, model.template), [1] * 300)
