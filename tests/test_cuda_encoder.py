"""An encoder's CUDA operations against float64 NumPy, whole models against transformers and the CPU kernels.

Rows are FP16 and products take FP16 with float32 sums, as the bounds say.
"""

from __future__ import annotations

import os
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from encoder_files import SMALL, hidden_rows, minilm, save_bert
from hypothesis import given, settings
from hypothesis import strategies as st

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'",
                           exc_type=ImportError)

from kernels_cu.errors import KernelError, NoDevice  # noqa: E402
from runtime.checkpoint import Tensor  # noqa: E402
from runtime.encoder import Encoder  # noqa: E402

try:
    from kernels_cu.encoder import HEAD_DIMS, CudaEncoder

    BACKEND = CudaEncoder()
except NoDevice as error:
    pytest.skip(str(error), allow_module_level=True)

EXAMPLES = min(int(os.environ.get("COCKTAIL_EXAMPLES", "64")), int(os.environ.get("COCKTAIL_CUDA_EXAMPLES", "64")))
HALF = 2.0**-11  # FP16's unit roundoff
GUARD = 64

lengths = st.lists(st.one_of(st.integers(1, 20), st.sampled_from([33, 34, 63, 64, 65, 128, 150])), min_size=1,
                   max_size=6)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def beside():
    with BACKEND.beside():
        yield


class Guarded:
    """Rows on the GPU, NaN (or `values`) between two guard bands, which check() proves untouched."""

    def __init__(self, shape, values=np.nan):
        n = int(np.prod(shape))
        host = np.full(n + 2 * GUARD, np.nan, np.float16)
        host[GUARD : GUARD + n] = np.asarray(np.broadcast_to(values, shape)).ravel()
        self.whole = up(host)
        self.array = self.whole[GUARD : GUARD + n].reshape(shape)

    def check(self):
        whole = BACKEND.download(self.whole)
        assert np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all(), "wrote outside the output"
        return whole[GUARD:-GUARD].reshape(self.array.shape).astype(np.float64)


def up(array):
    return BACKEND.upload(np.ascontiguousarray(array))


def halves(rng, shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float16)


def matrix(*parts):
    return BACKEND.matrix(*(Tensor("w", "F16", part) for part in parts))


def norm_of(rng, E):
    weight, bias = (rng.standard_normal(E).astype(np.float32) for _ in range(2))
    on_gpu = SimpleNamespace(weight=up(weight), bias=up(bias), eps=1e-12)
    return on_gpu, lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) * weight.astype(np.float64) + bias


def starts_of(lengths):
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    return starts, up(starts)


@settings(max_examples=EXAMPLES, deadline=None)
@given(T=st.integers(1, 20), E=st.sampled_from([8, 48, 128, 384, 768, 1032, 2048]), seed=seeds)
def test_embed(T, E, seed):
    rng = np.random.default_rng(seed)
    words, places = halves(rng, (11, E)), rng.standard_normal((7, E)).astype(np.float32)
    ids, positions = (rng.integers(0, n, T).astype(np.int32) for n in (11, 7))
    norm, exact = norm_of(rng, E)
    x = Guarded((T, E))
    BACKEND.embed(up(ids), up(positions), matrix(words), up(places), norm, x.array)
    expected = exact(words[ids].astype(np.float64) + places[positions])
    assert (np.abs(x.check() - expected) <= 1.01 * HALF * np.abs(expected) + 1e-4).all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(T=st.integers(1, 40), K=st.sampled_from([8, 72, 384, 1536]), E=st.sampled_from([8, 48, 384, 768]), seed=seeds)
def test_add_and_norm(T, K, E, seed):
    """Rows away from zero: a variance made of two large sums would be noise there."""
    rng = np.random.default_rng(seed)
    h, w, x0 = halves(rng, (T, K)), halves(rng, (E, K), K**-0.5), halves(rng, (T, E)) + np.float16(8)
    b, (norm, exact) = rng.standard_normal(E).astype(np.float32), norm_of(rng, E)
    x = Guarded((T, E), x0)
    BACKEND.add(up(h), matrix(w), up(b), norm, x.array)
    expected = exact(h.astype(np.float64) @ w.T.astype(np.float64) + b + x0)
    assert (np.abs(x.check() - expected) <= 1.01 * HALF * np.abs(expected) + 5e-4).all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(T=st.integers(1, 40), E=st.sampled_from([8, 48, 384]), I=st.sampled_from([8, 72, 1536]),
       scale=st.sampled_from([0.1, 1.0, 10.0]), seed=seeds)
def test_gelu(T, E, I, scale, seed):  # noqa: E741
    from math import erf

    rng = np.random.default_rng(seed)
    x, w = halves(rng, (T, E), scale), halves(rng, (I, E), E**-0.5)
    b, out = rng.standard_normal(I).astype(np.float32), Guarded((T, I))
    BACKEND.gelu(up(x), matrix(w), up(b), out.array)
    product = x.astype(np.float64) @ w.T.astype(np.float64)
    y = product + b
    expected = y * 0.5 * (1 + np.vectorize(erf)(y / np.sqrt(2)))
    # The product is rounded before the bias is added; GELU's slope is at most 1.13.
    bound = 1.2 * HALF * np.abs(product) + 1.01 * HALF * np.abs(expected) + 1e-5 * (1 + np.abs(x).sum(1).max())
    assert (np.abs(out.check() - expected) <= bound).all()


@pytest.mark.parametrize("D", HEAD_DIMS)
@settings(max_examples=max(EXAMPLES // 4, 8), deadline=None)
@given(lengths=lengths, H=st.sampled_from([1, 3, 12]), scale=st.sampled_from([0.3, 1.0, 4.0]), seed=seeds)
def test_attention_sees_its_own_sequence_and_all_of_it(D, lengths, H, scale, seed):
    """q, k and v are x itself times a power of two, so that the product in front is exact."""
    rng, E, T = np.random.default_rng(seed), H * D, sum(lengths)
    x, bias = halves(rng, (T, E), scale), (rng.standard_normal(3 * E) * scale).astype(np.float32)
    starts, starts_up = starts_of(lengths)
    factors = [2.0 ** rng.integers(-1, 2, E) for _ in range(3)]
    out = Guarded((T, E))
    BACKEND.attention(up(x), matrix(*(np.diag(f).astype(np.float16) for f in factors)), up(bias), starts_up,
                      max(lengths), H, out.array)
    q, k, v = (x * f + bias[i * E : (i + 1) * E].astype(np.float64) for i, f in enumerate(factors))
    found = out.check()
    for first, last in pairwise(starts):
        for h in range(H):
            at = np.s_[first:last, h * D : (h + 1) * D]
            scores = q[at] @ k[at].T / np.sqrt(D)
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            # q and k are rounded to FP16, and so are probabilities and v; the former walk at random over D channels.
            off = 6 * HALF * np.sqrt((q[at] ** 2) @ (k[at] ** 2).T / D) + 1e-5
            bound = (p * np.expm1(2 * off.max(1, keepdims=True))) @ np.abs(v[at]) + 4 * HALF * (p @ np.abs(v[at]))
            assert (np.abs(found[at] - p @ v[at]) <= bound + 1e-4).all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=lengths, E=st.sampled_from([8, 48, 384, 768]), seed=seeds)
def test_pool(lengths, E, seed):
    x = halves(np.random.default_rng(seed), (sum(lengths), E))
    starts, starts_up = starts_of(lengths)
    rows = [x[first:last].astype(np.float64).mean(0) for first, last in pairwise(starts)]
    np.testing.assert_allclose(BACKEND.download(BACKEND.pool(up(x), starts_up, "mean")), rows, atol=1e-5)
    assert (BACKEND.download(BACKEND.pool(up(x), starts_up, "cls")) == x[starts[:-1]]).all()


@pytest.mark.parametrize("config", [
    {}, {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6},
    {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}])
def test_random_berts_equal_transformers(tmp_path, config):
    """Of unit length, as they are compared; weights of a wider model are drawn smaller, or nothing could be learned."""
    model = save_bert(tmp_path, **config)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, SMALL["vocab_size"], length).tolist() for length in (1, 2, 40, 7, 33, 12, 34, 34)]
    rows = [hidden_rows(model, ids) for ids in sequences]
    encoder, before = Encoder(tmp_path, BACKEND), BACKEND.tile
    try:
        for BACKEND.tile in (1, 60, before):
            for pooling in ("mean", "cls"):
                expected = np.array([part.mean(0) if pooling == "mean" else part[0] for part in rows])
                found = np.concatenate([BACKEND.download(part) for part in encoder.embed(sequences, pooling)])
                again = np.concatenate([BACKEND.download(part) for part in encoder.embed(sequences, pooling)])
                assert (found == again).all()
                unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found.astype(np.float64), expected)]
                np.testing.assert_allclose(*unit, atol=1e-3)
    finally:
        BACKEND.tile = before


def test_minilm_equals_its_float64_reference():
    """1e-3 is asked for; its embeddings have 384 values of about .05."""
    import torch
    from transformers import AutoModel

    from cocktail.scorers.encoder import EncoderScorer
    from cocktail.scorers.folder import EncoderFolder

    path = os.environ.get("COCKTAIL_ENCODER") or minilm()
    scorer = EncoderScorer(str(path), device="cuda")
    model = AutoModel.from_pretrained(path).double().eval()
    texts = ["The old mill stands by the river and grinds flour.", "", "日本の首都は東京です", "long words " * 300,
             *(f"Clause {i} of the contract names {i * 7} parties and the day on which it ends." for i in range(200))]
    found = scorer.embed(texts)
    for i, ids in enumerate(EncoderFolder.open(scorer._folder.weights).passages(texts)):
        if i < 20:
            with torch.inference_mode():
                row = model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(found[i], row / np.linalg.norm(row), atol=1e-3)


def test_what_the_kernels_do_not_have_is_refused(tmp_path):
    with pytest.raises(KernelError, match="5 heads of 8 channels"):
        BACKEND.check_model(5, 8)
    with pytest.raises(KernelError, match="beyond FP16"):
        BACKEND.matrix(Tensor("w", "F32", np.full((8, 8), 1e5, np.float32)))
