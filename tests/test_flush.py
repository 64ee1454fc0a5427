"""Every family of formats, with and without a tail that is packed as it grows: the runtime against tests/decoded_ref.py
on models with a sliding window, dynamic NTK and grouped heads; answers that start again; what is refused."""

from __future__ import annotations

import decoded_ref
import numpy as np
import pytest
from numpy_backend import NumpyBackend
from tiny_model import save_tiny_model

from runtime.calibration import load_calibration
from runtime.checkpoint import Checkpoint
from runtime.engine import read
from runtime.errors import PlanError
from runtime.format_data import format_data
from runtime.model import Model
from runtime.plan import FP16, HIDDEN, CalibrationFile, DocumentShape, Layout, Plan, Tier
from runtime.sampler import SamplingParams
from runtime.weights import load_weights

MODELS = {
    "plain": {},
    "window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 70},
    "dynamic": {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}
WIDTHS = {"rotated": (Tier(3, 2), Tier(4, 4)), "kivi": (Tier(2, 2), Tier(4, 2)), "atom": (Tier(4, 4),),
          "kvquant": (Tier(3, 2), Tier(4, 4))}
CHUNK, PREFIX, PROMPT, ANSWER = 16, 5, 107, 50


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny_model(folder / name, **changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module", params=MODELS)
def path(request, files):
    return files[request.param]


def load(path, backend=None):
    backend = backend or NumpyBackend()
    with Checkpoint.open(path) as checkpoint:
        return Model(checkpoint.config, load_weights(checkpoint, backend), backend)


def ids_of(model, n=PROMPT + ANSWER, seed=5):
    return [int(i) for i in np.random.default_rng(seed).integers(2, model.config.vocab_size, n)]


def plan_for(model, family, flush, folder, remainder=3):
    """FP16, hidden and the family's tiers in turn, no tier in the same chunks of every layer."""
    config = model.config
    n_chunks = (PROMPT - PREFIX - remainder) // CHUNK - 1
    shape = dict(n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, chunk=CHUNK,
                 n_chunks=n_chunks, prefix=PREFIX, remainder=remainder,
                 suffix=PROMPT - PREFIX - n_chunks * CHUNK - remainder, max_new=ANSWER, window=config.sliding_window)
    hidden = len(DocumentShape(**shape | {"remainder": 0, "suffix": shape["suffix"] + remainder}).hidden_chunks())
    tiers = (FP16, *WIDTHS[family], HIDDEN)
    rng = np.random.default_rng(2)
    layers = [[len(tiers) - 1] * hidden + [int(t) for t in rng.integers(len(tiers) - 1, size=n_chunks - hidden)]
              for _ in range(config.n_layers)]
    calibration = None
    if family == "kvquant":
        file = load_calibration(decoded_ref.save_calibration(folder / "calibration.safetensors", config))
        calibration = CalibrationFile(file.path, file.digest)
    layout = Layout(**shape, tiers=tiers, counts=tuple(tuple(map(layer.count, range(len(tiers)))) for layer in layers),
                    formats=family, flush=flush, calibration=calibration)
    return Plan(layout, tuple(map(tuple, layers)), "test", "none")


@pytest.mark.parametrize("flush", [None, 0, 20, 64])
@pytest.mark.parametrize("family", WIDTHS)
def test_logits_equal_the_reference_on_decoded_values(path, family, flush, tmp_path):
    model = load(path)
    ids = ids_of(model)
    plan = plan_for(model, family, flush, tmp_path, remainder=3 if flush is None else 3 + CHUNK)
    rope = model.rope(PROMPT, PROMPT + ANSWER)
    data = format_data(model.backend, model.config, plan.layout, rope)
    expected = decoded_ref.forced(model, ids[:PROMPT], plan, ids[PROMPT:], data)
    reading = read(model, ids[:PROMPT], [plan])
    np.testing.assert_allclose(reading.force(ids[PROMPT:]), expected, atol=2e-4)
    if flush is not None:
        assert plan.layout.flushed(ANSWER - 1) > plan.layout.flushed(0) or flush == 64
        assert reading.caches[0].state[4] == plan.layout.flushed(ANSWER - 2)
        unflushed = read(model, ids[:PROMPT], [plan_for(model, family, None, tmp_path)]).force(ids[PROMPT:])
        assert np.abs(unflushed - expected).max() > 1e-3  # the test would see a tail that is left alone


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("family", ["kivi", "atom"])
def test_answers_start_again_on_the_same_cache(files, family, asynchronous, tmp_path):
    """Teacher forcing, a short answer that is left, and a long one: none leaves anything for the next."""
    model = load(files["plain"], NumpyBackend(asynchronous=asynchronous))
    ids = ids_of(model)
    plan = plan_for(model, family, 0, tmp_path)
    reading = read(model, ids[:PROMPT], [plan])
    first = list(reading.generate(SamplingParams(), ANSWER, ()))
    rows = reading.force(ids[PROMPT:])
    answer = reading.generate(SamplingParams(), ANSWER, ())
    assert [next(answer) for _ in range(30)] == first[:30]
    answer.close()
    assert list(reading.generate(SamplingParams(), ANSWER, ())) == first
    assert reading.force(ids[PROMPT:]).tobytes() == rows.tobytes()
    forced = read(model, ids[:PROMPT], [plan]).force(first)
    assert forced.argmax(axis=1).tolist() == first  # generating and forcing flush at the same steps


def test_room_for_the_flushed_tail_is_exact(files, tmp_path):
    model = load(files["plain"])
    for flush in (0, 20, 64, 10**6):
        layout = plan_for(model, "kivi", flush, tmp_path).layout
        cache = read(model, ids_of(model)[:PROMPT], [plan_for(model, "kivi", flush, tmp_path)]).caches[0]
        tokens = layout.remainder + layout.suffix + ANSWER
        room = max(0, tokens - flush) // CHUNK
        assert all((span.n if span else 0) == room for span in cache.flushed)


def test_yarn_is_refused_for_formats_before_rope(tmp_path):
    path = save_tiny_model(tmp_path / "yarn", max_position_embeddings=512, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128})
    model = load(path)
    ids = ids_of(model)[:PROMPT]
    with pytest.raises(PlanError, match=r"atom formats store K before RoPE.*attention factor 1\.1.*yarn"):
        read(model, ids, [plan_for(model, "atom", None, tmp_path)])
    read(model, ids, [plan_for(model, "kivi", None, tmp_path)])


@pytest.mark.parametrize(("name", "family", "flush", "refused"), [
    ("dynamic", "atom", 0, True), ("dynamic", "kvquant", 20, True), ("dynamic", "kivi", 0, False),
    ("dynamic", "atom", None, False), ("dynamic", "atom", 64, False),  # nothing is packed behind the prompt
    ("plain", "atom", 0, False),
])
def test_frequencies_that_change_within_a_chunk_are_refused_where_keys_are_turned_by_their_place(
        files, tmp_path, name, family, flush, refused):
    model = load(files[name], NumpyBackend(turns_by_place=True))
    plan = plan_for(model, family, flush, tmp_path, remainder=3 if flush is None else 3 + CHUNK)
    if not refused:
        read(model, ids_of(model)[:PROMPT], [plan])
        return
    with pytest.raises(PlanError, match=rf"{family} formats .* dynamic RoPE has others from position {PROMPT} on"):
        read(model, ids_of(model)[:PROMPT], [plan])


def test_kvquant_needs_the_calibration_that_the_plan_names(files, tmp_path):
    model = load(files["plain"])
    ids = ids_of(model)[:PROMPT]
    plan = plan_for(model, "kvquant", None, tmp_path)
    decoded_ref.save_calibration(tmp_path / "calibration.safetensors", model.config, seed=1)
    with pytest.raises(PlanError, match="has changed: its digest is"):
        read(model, ids, [plan])
    (tmp_path / "calibration.safetensors").unlink()
    with pytest.raises(PlanError, match=r"calibration .*no such file"):
        read(model, ids, [plan])
