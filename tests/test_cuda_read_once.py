"""A document that is read once, on the GPU: copies beside computing bring what was kept, whole and in time."""

import numpy as np
import pytest
import tiny_model

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from kernels_cu.backend import CudaBackend
from kernels_cu.errors import NoDevice

try:
    CUDA = CudaBackend()
except NoDevice as error:
    pytest.skip(str(error), allow_module_level=True)

import cocktail
from runtime.master import Master

TEXT = "The ferry to Merrow Point leaves at nine. " * 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cocktail.load(tiny_model.save_tiny_model(tmp_path_factory.mktemp("model"), head_dim=64,
                                                    num_hidden_layers=7), backend="cuda")


@pytest.mark.parametrize("place", ["memory", "file"])
def test_what_is_kept_comes_back(model, place):
    """Every layer's values, of sizes that take a while to copy."""
    tokens, config = 9001, model.config
    kept = Master.empty(CUDA, config, tokens, place)
    shape = config.n_kv_heads, tokens + 13, config.head_dim
    rng = np.random.default_rng(0)
    values = rng.standard_normal((config.n_layers, 2, *shape)).astype(np.float16)
    for layer, (k, v) in enumerate(values):
        buffers = CUDA.upload(k), CUDA.upload(v)
        CUDA.beside(lambda layer=layer, buffers=buffers: kept.keep(layer, *buffers))()
    CUDA.launched()()
    for layer in range(config.n_layers):
        k, v = (CUDA.upload(np.zeros(shape, np.float16)) for _ in range(2))
        CUDA.beside(lambda layer=layer, k=k, v=v: kept.fetch(layer, k, v))()
        for found, expected in zip((k, v), values[layer], strict=True):
            np.testing.assert_array_equal(CUDA.download(found)[:, :tokens], expected[:, :tokens])


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("tile", [300, 2048])
def test_later_questions_get_a_fresh_readings_logits(model, place, tile, monkeypatch):
    """Within a tenth of what quantization does, as other kernels multiply few rows; the same bits every time."""
    monkeypatch.setattr(model.backend, "prefill_tile", tile)
    kept, fresh = (model.read(TEXT, keep=keep) for keep in (place, False))
    answer = [5, 70, 9, 301, 8]
    for query in ("When does the ferry leave?", "Where to?", "When does the ferry leave?"):
        exact, mixed = (fresh.logits(query, answer, **options)
                        for options in ({"policy": "fp16"}, {"policy": "uniform", "tier": "K4V2"}))
        found = kept.logits(query, answer, policy="uniform", tier="K4V2")
        assert np.linalg.norm(found - mixed) < 0.1 * np.linalg.norm(mixed - exact)
        np.testing.assert_array_equal(kept.logits(query, answer, policy="uniform", tier="K4V2"),
                                      kept.logits(query, answer, policy="uniform", tier="K4V2"))
