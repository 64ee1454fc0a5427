"""The forward pass on the GPU against the oracle: prefill, packing, decode over a mixed cache, captured or not."""

import time

import numpy as np
import numpy_backend
import pytest
from dense_ref import drawn
from numpy_backend import NumpyBackend

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from kernels_cu.backend import CudaBackend
from kernels_cu.build import in_order
from kernels_cu.errors import NoDevice

try:
    CUDA = CudaBackend()
except NoDevice as error:
    pytest.skip(str(error), allow_module_level=True)

from runtime.config import ModelConfig
from runtime.engine import PendingPlan, read
from runtime.model import Model, StepBuffers, decode_step
from runtime.plan import FP16, DocumentShape, Plan, Tier
from runtime.sampler import SamplingParams
from runtime.weights import LayerWeights, Weights

PROMPT, ANSWER, CHUNK, PREFIX = 333, 9, 32, 7
CONFIGS = {
    "llama": dict(head_dim=64, num_attention_heads=4, num_key_value_heads=2),
    "window": dict(head_dim=128, num_attention_heads=8, num_key_value_heads=2, sliding_window=100,
                   model_type="mistral"),
    "odd": dict(head_dim=80, num_attention_heads=3, num_key_value_heads=3),
}
TIERS = {"fp16": [FP16], "mixed": [Tier(2, 2), Tier(3, 2), Tier(4, 4), Tier(8, 8), FP16]}


def config_of(name):
    architecture = "MistralForCausalLM" if name == "window" else "LlamaForCausalLM"
    base = dict(model_type="llama", vocab_size=104, hidden_size=128, intermediate_size=176, num_hidden_layers=3,
                max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
                bos_token_id=1, eos_token_id=2, architectures=[architecture])
    return ModelConfig.from_json({**base, **CONFIGS[name]})


def model_of(config, backend, dtype="F16"):
    """The same random weights on any backend."""
    rng = np.random.default_rng(11)
    E, I, D, H, G = (config.hidden_size, config.intermediate_size, config.head_dim, config.n_heads,  # noqa: E741
                     config.n_kv_heads)

    def matrix(rows, columns):
        values = (rng.standard_normal((rows, columns)) * 1.5 * columns**-0.5).astype(np.float32)
        stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values.astype(np.float16)
        return backend.matrix(stored, dtype)

    def norm():
        return backend.vector((1 + 0.1 * rng.standard_normal(E)).astype(np.float32), "F32")

    def layer():
        return LayerWeights(attn_norm=norm(), mlp_norm=norm(), wq=matrix(H * D, E), wk=matrix(G * D, E),
                            wv=matrix(G * D, E), wo=matrix(E, H * D), bq=None, bk=None, bv=None, bo=None,
                            gate=matrix(I, E), up=matrix(I, E), down=matrix(E, I), gate_bias=None, up_bias=None,
                            down_bias=None)

    embed, layers = matrix(config.vocab_size, E), tuple(layer() for _ in range(config.n_layers))
    return Model(config, Weights(embed, layers, norm(), matrix(config.vocab_size, E), 0), backend)


def plan_of(config, tiers):
    n_chunks = (PROMPT - PREFIX) // CHUNK - 1
    shape = DocumentShape(n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, chunk=CHUNK,
                          n_chunks=n_chunks, prefix=PREFIX, remainder=3,
                          suffix=PROMPT - PREFIX - n_chunks * CHUNK - 3, max_new=ANSWER, window=config.sliding_window)
    spread = np.arange(n_chunks) * 7 % len(tiers)
    layout = shape.layout(tiers, [int((spread == tier).sum()) for tier in range(len(tiers))])
    return Plan(layout, (tuple(int(tier) for tier in spread),) * config.n_layers, "test", "none")


def ids_of(config):
    return [int(i) for i in np.random.default_rng(3).integers(3, config.vocab_size, PROMPT + ANSWER)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tiers", TIERS)
def test_logits_equal_the_oracle(name, tiers, monkeypatch):
    """At most twice the error that the oracle itself makes when prefill rounds its activations to FP16, as tensor cores
    need them. (A last bit of K or V can move a code by one, and one code of two bits is a third of the range.)"""
    config = config_of(name)
    ids, plan = ids_of(config), plan_of(config, TIERS[tiers])

    def logits(backend, tile=PROMPT):
        return read(model_of(config, backend), ids[:PROMPT], [plan], tile=tile).force(ids[PROMPT:])

    exact = logits(NumpyBackend())
    linear = numpy_backend._linear
    with monkeypatch.context() as patched:
        patched.setattr(numpy_backend, "_linear",
                        lambda x, *rest: linear(x.astype(np.float16) if len(x) > 1 else x, *rest))
        allowed = 2 * rms(logits(NumpyBackend()) - exact)
    for tile in (PROMPT, 100, 11):  # cuBLAS; cuBLAS and a rest; tensor-core panels
        error = rms(logits(CUDA, tile) - exact)
        assert error <= allowed, f"tile {tile}: rms logit error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_step_equals_the_step(name):
    """Also where kernels start while those before them still run."""
    config = config_of(name)
    ids, plan = ids_of(config), plan_of(config, TIERS["mixed"])
    model = model_of(config, CUDA)
    reading = read(model, ids[:PROMPT], [plan])
    with in_order():
        expected = reading.force(ids[PROMPT:])
    cache, buffers = reading.caches[0], StepBuffers.allocate(config, CUDA, 1)
    logits = CUDA.empty((1, config.vocab_size), np.float32)
    step = CUDA.captured(lambda: decode_step(model, cache, reading.rope, buffers, logits))
    for _ in range(2):  # the graph outlives one answer
        cache.start()
        for i, token in enumerate(ids[PROMPT:-1], 1):
            CUDA.advance(cache.state, token)
            step()
            assert np.array_equal(CUDA.download(logits)[0], expected[i])


def test_a_plan_made_behind_the_first_layer_changes_nothing():
    config = config_of("llama")
    ids, plan = ids_of(config), plan_of(config, TIERS["mixed"])
    model = model_of(config, CUDA)

    def make():
        time.sleep(0.05)
        return plan

    ready, later = (read(model, ids[:PROMPT], [p]) for p in (plan, PendingPlan(plan.layout, make)))
    assert np.array_equal(ready.force(ids[PROMPT:]), later.force(ids[PROMPT:]))
    assert (ready.timing.plan, ready.timing.wait) == (0, 0)
    # So short a layer leaves the GPU idle for nearly all of it, which is not counted as prefill.
    assert later.timing.plan >= later.timing.wait > 0.03
    assert 0 < later.timing.pack < later.timing.prefill


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.5, top_k=40, repetition_penalty=1.3,
                                                                     seed=5)])
def test_answers_are_those_of_single_steps(params):
    """generate(), which launches a step ahead, draws what the same logits give one at a time; so do later answers from
    the same cache, after one that was left early."""
    config = config_of("llama")
    ids, plan = ids_of(config), plan_of(config, TIERS["mixed"])
    reading = read(model_of(config, CUDA), ids[:PROMPT], [plan, plan])
    answer = list(reading.generate(params, ANSWER, ()))
    assert len(answer) == ANSWER and len(set(answer)) > 1
    logits, uniforms = reading.force(answer), np.random.default_rng(params.seed).random(ANSWER)
    options = params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty
    for i, row in enumerate(logits):
        seen = np.array(ids[:PROMPT] + answer[:i], np.int32)
        assert drawn(CUDA, row[None], options, seen, uniforms[i]) == answer[i]
    early = reading.generate(params, ANSWER, ())
    assert [next(early) for _ in range(4)] == answer[:4]
    early.close()
    assert list(reading.generate(params, ANSWER, answer[5:6])) == answer[: answer.index(answer[5]) + 1]
    turns = [reading.generate(params, ANSWER, (), cache) for cache in (0, 1)]
    assert list(zip(*turns, strict=True)) == [(i, i) for i in answer]
    assert np.array_equal(reading.force(answer), logits)


def rms(x):
    return np.sqrt(np.mean(x**2))
