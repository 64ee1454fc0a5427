"""BERT encoders on the CPU kernels: every operation against float64 NumPy, whole models against transformers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from encoder_files import SMALL, hidden_rows, save_bert
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_c import available_isas
from kernels_c.encoder import CpuEncoder
from runtime.checkpoint import Tensor
from runtime.encoder import Encoder
from runtime.errors import CheckpointError, UnsupportedEncoder

ISAS = available_isas()
BACKENDS = {isa: CpuEncoder(isa=isa) for isa in ISAS}
EPS, GUARD = 2.0**-24, 64

sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 160]))
lengths = st.lists(st.one_of(st.integers(1, 9), st.sampled_from([13, 33, 64, 100])), min_size=1, max_size=5)


class Guarded:
    """An output filled with NaN between two guard bands, which check() proves untouched."""

    def __init__(self, shape: tuple[int, ...], values: Any = np.nan):
        n = int(np.prod(shape))
        self.whole = np.full(n + 2 * GUARD, np.nan, np.float32)
        self.array = self.whole[GUARD : GUARD + n].reshape(shape)
        self.array[...] = values

    def check(self) -> np.ndarray:
        assert np.isnan(self.whole[:GUARD]).all() and np.isnan(self.whole[-GUARD:]).all(), "wrote outside the output"
        return self.array.astype(np.float64)


def matrix(backend: CpuEncoder, *parts: np.ndarray) -> Any:
    return backend.matrix(*(Tensor("w", "F32", part) for part in parts))


def norm_of(rng: np.random.Generator, E: int) -> Any:
    weight, bias = (rng.standard_normal(E).astype(np.float32) for _ in range(2))
    return SimpleNamespace(weight=weight, bias=bias, eps=1e-12)


def layer_norm(x: np.ndarray, norm: Any) -> np.ndarray:
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x * x).mean(1, keepdims=True) + norm.eps) * norm.weight.astype(np.float64) + norm.bias


def erf(x: np.ndarray) -> np.ndarray:
    from math import erf as exact

    return np.vectorize(exact)(x)


# Operations.

@pytest.mark.parametrize("isa", ISAS)
def test_gelu_everywhere(isa: str) -> None:
    """As the function of one weight, 1, so that nothing but GELU can be wrong."""
    x = np.concatenate([np.linspace(-30, 30, 4001), [0, -0.0, 1e-30, -1e-30, 1e30, -1e30]]).astype(np.float32)
    out, zero, one = Guarded((len(x), 1)), np.zeros(1, np.float32), np.ones((1, 1), np.float32)
    BACKENDS[isa].gelu(x[:, None], matrix(BACKENDS[isa], one), zero, out.array)
    exact = x.astype(np.float64)
    expected = exact * 0.5 * (1 + erf(exact / np.sqrt(2)))
    assert (np.abs(out.check()[:, 0] - expected) <= 3e-7 * np.abs(exact) + 1e-37).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 40), E=sizes, I=sizes, seed=st.integers(0, 2**32 - 1))
def test_gelu_of_a_product(isa: str, T: int, E: int, I: int, seed: int) -> None:  # noqa: E741
    rng = np.random.default_rng(seed)
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((T, E), (I, E), (I,)))
    out = Guarded((T, I))
    BACKENDS[isa].gelu(x, matrix(BACKENDS[isa], w), b, out.array)
    y = x.astype(np.float64) @ w.T + b
    expected = y * 0.5 * (1 + erf(y / np.sqrt(2)))
    bound = 1.2 * 4 * (np.sqrt(E) + 4) * EPS * (np.abs(x) @ np.abs(w.T) + np.abs(b)) + 3e-7 * np.abs(y)
    assert (np.abs(out.check() - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 40), K=sizes, E=st.integers(2, 70), seed=st.integers(0, 2**32 - 1))
def test_add_and_norm(isa: str, T: int, K: int, E: int, seed: int) -> None:
    """Rows far from zero: a variance made of two large sums would be noise there."""
    rng = np.random.default_rng(seed)
    h, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((T, K), (E, K), (E,)))
    x0, norm = (rng.standard_normal((T, E)) + 50).astype(np.float32), norm_of(rng, E)
    x = Guarded((T, E), x0)
    BACKENDS[isa].add(h, matrix(BACKENDS[isa], w), b, norm, x.array)
    before = h.astype(np.float64) @ w.T + b + x0
    error = 4 * (np.sqrt(K) + np.sqrt(E) + 8) * EPS * (np.abs(h) @ np.abs(w.T) + np.abs(b) + np.abs(x0)).max(1)
    bound = 4 * error / before.std(1) * np.abs(norm.weight).max() + 8 * EPS * (1 + np.abs(norm.bias).max())
    assert (np.abs(x.check() - layer_norm(before, norm)).max(1) <= bound * (1 + before.std(1) ** -2)).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 20), E=st.integers(2, 70), dtype=st.sampled_from(["F32", "F16", "BF16"]),
       seed=st.integers(0, 2**32 - 1))
def test_embed(isa: str, T: int, E: int, dtype: str, seed: int) -> None:
    from dense_ref import stored

    rng = np.random.default_rng(seed)
    (words, exact), norm = stored(rng, (11, E), dtype), norm_of(rng, E)
    places = rng.standard_normal((7, E)).astype(np.float32)
    ids, positions = (rng.integers(0, n, T).astype(np.int32) for n in (11, 7))
    x = Guarded((T, E))
    BACKENDS[isa].embed(ids, positions, BACKENDS[isa].matrix(Tensor("words", dtype, words)), places, norm, x.array)
    before = exact[ids] + places[positions]
    np.testing.assert_allclose(x.check(), layer_norm(before, norm), atol=1e-5 / before.std(1).min())


@pytest.mark.parametrize("wrong", ["id", "position"])
def test_embed_refuses_what_lies_outside_its_tables(wrong: str) -> None:
    backend, zeros = BACKENDS[ISAS[-1]], np.zeros(2, np.int32)
    outside = np.array([0, 5], np.int32)
    ids, positions = (outside, zeros) if wrong == "id" else (zeros, outside)
    table, x = np.ones((5, 4), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(RuntimeError, match="outside its table"):
        backend.embed(ids, positions, matrix(backend, table), table, norm_of(np.random.default_rng(0), 4), x)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(lengths=lengths, H=st.integers(1, 3), D=st.one_of(st.integers(1, 40), st.sampled_from([32, 64])),
       scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 2**32 - 1))
@example(lengths=[512], H=1, D=32, scale=1.0, seed=0)
def test_attention_sees_its_own_sequence_and_all_of_it(isa: str, lengths: list[int], H: int, D: int, scale: float,
                                                       seed: int) -> None:
    """q, k and v are x itself times a diagonal, so that the products in front add no error to speak of."""
    rng, E, T = np.random.default_rng(seed), H * D, sum(lengths)
    x, bias = rng.standard_normal((T, E)).astype(np.float32), rng.standard_normal(3 * E).astype(np.float32)
    factors = [2.0 ** rng.integers(-2, 1, E) * by for by in (scale, 1, 1)]
    parts = [np.diag(factor).astype(np.float32) for factor in factors]
    starts, out = np.cumsum([0, *lengths], dtype=np.int32), Guarded((T, E))
    BACKENDS[isa].attention(x, matrix(BACKENDS[isa], *parts), bias, starts, max(lengths), H, out.array)
    q, k, v = (x * np.diag(part).astype(np.float64) + bias[i * E : (i + 1) * E] for i, part in enumerate(parts))
    found = out.check()
    for first, last in pairwise(starts):
        for h in range(H):
            at = np.s_[first:last, h * D : (h + 1) * D]
            scores = q[at] @ k[at].T / np.sqrt(D)
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            off = 4 * (np.sqrt(D) + 8) * EPS * (np.abs(q[at]) @ np.abs(k[at]).T) / np.sqrt(D) + 16 * EPS
            bound = (p * np.expm1(2 * off.max(1, keepdims=True))) @ np.abs(v[at]) + 40 * EPS * (p @ np.abs(v[at]))
            assert (np.abs(found[at] - p @ v[at]) <= bound + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(lengths=lengths, E=sizes, seed=st.integers(0, 2**32 - 1))
def test_pool(isa: str, lengths: list[int], E: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((sum(lengths), E)).astype(np.float32)
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    rows = [x[first:last].astype(np.float64) for first, last in pairwise(starts)]
    np.testing.assert_allclose(BACKENDS[isa].pool(x, starts, "mean"), [part.mean(0) for part in rows], atol=1e-5)
    assert (BACKENDS[isa].pool(x, starts, "cls") == x[starts[:-1]]).all()


# Models.

@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("config", "options"), [
    ({}, {}), ({}, {"dtype": "float16"}), ({}, {"dtype": "bfloat16"}), ({}, {"head": True}),
    ({"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 37}, {}),
    ({"hidden_size": 130, "num_attention_heads": 2, "num_hidden_layers": 1, "type_vocab_size": 1}, {}),
])
def test_random_berts_equal_transformers(tmp_path: Path, isa: str, config: dict[str, Any],
                                         options: dict[str, Any]) -> None:
    model = save_bert(tmp_path, seed=len(config), **options, **config)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, SMALL["vocab_size"], length).tolist() for length in (1, 2, 40, 7, 33, 12)]
    rows = [hidden_rows(model, ids) for ids in sequences]
    backend = CpuEncoder(isa=isa)
    for backend.tile in (1, 45, 512):  # one by one, some together, all together
        encoder = Encoder(tmp_path, backend)
        for pooling in ("mean", "cls"):
            expected = [part.mean(0) if pooling == "mean" else part[0] for part in rows]
            found = np.concatenate(list(encoder.embed(sequences, pooling)))
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_results_do_not_depend_on_threads(tmp_path: Path) -> None:
    from kernels_c.isa import lib

    save_bert(tmp_path)
    encoder, before = Encoder(tmp_path, BACKENDS[ISAS[-1]]), lib.pool_threads()
    found = []
    for threads in (1, 3):
        lib.pool_set_threads(threads, threads)
        found.append(np.concatenate(list(encoder.embed([[5] * 40, [7, 9], [1] * 33], "mean"))))
    lib.pool_set_threads(before, before)
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"model_type": "mpnet"}, UnsupportedEncoder, "model_type is 'mpnet'"),
    ({"hidden_act": "gelu_new"}, UnsupportedEncoder, "hidden_act is 'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, UnsupportedEncoder, "position_embedding_type"),
    ({"is_decoder": True}, UnsupportedEncoder, "is_decoder"),
    ({"model_type": None}, CheckpointError, "model_type is None"),
    ({"hidden_size": 49}, CheckpointError, "no multiple"),
    ({"hidden_size": "48"}, CheckpointError, "hidden_size is '48'"),
    ({"num_hidden_layers": 3}, CheckpointError, r"encoder.layer.2.attention.self.query.weight' .* is missing"),
    ({"intermediate_size": 71}, CheckpointError, r"expected shape \[71, 48\], got \[72, 48\]"),
    ({"layer_norm_eps": 0}, CheckpointError, "layer_norm_eps"),
])
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], error: type[Exception],
                                      message: str) -> None:
    save_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        Encoder(tmp_path, BACKENDS[ISAS[-1]])


def test_sequences_that_are_empty_or_too_long_are_refused(tmp_path: Path) -> None:
    save_bert(tmp_path)
    encoder = Encoder(tmp_path, BACKENDS[ISAS[-1]])
    for ids in ([], [1] * 41):
        with pytest.raises(CheckpointError, match="takes 1 to 40"):
            list(encoder.embed([ids], "mean"))
