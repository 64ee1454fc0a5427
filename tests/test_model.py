"""The forward pass against transformers on tiny random models, each checkpoint feature in at least one of them."""

import numpy as np
import pytest
import torch
from numpy_backend import NumpyBackend
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from runtime.backend import STATE_DRAWN, load_backend
from runtime.checkpoint import Checkpoint
from runtime.engine import read
from runtime.errors import PromptError
from runtime.model import Model
from runtime.plan import FP16, DocumentShape, Plan, Tier
from runtime.sampler import SamplingParams
from runtime.weights import load_weights

BASE = dict(vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=256, initializer_range=0.08, eos_token_id=[1, 2])
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
CASES = {
    "mha": ("llama", dict(num_key_value_heads=4, head_dim=None)),
    "gqa-tied": ("llama", dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "head-dim": ("llama", dict(num_key_value_heads=1, head_dim=24)),
    "biases": ("llama", dict(num_key_value_heads=2, head_dim=16, attention_bias=True, mlp_bias=True)),
    "linear": ("llama", dict(num_key_value_heads=2, head_dim=16,
                             rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=3.0))),
    "dynamic": ("llama", dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
                              rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))),
    "llama3": ("llama", dict(num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3)),
    "yarn": ("llama", dict(num_key_value_heads=2, head_dim=16, rope_parameters=YARN)),
    "mistral": ("mistral", dict(num_key_value_heads=2, head_dim=16, sliding_window=None)),
    "window": ("mistral", dict(num_key_value_heads=2, head_dim=16, sliding_window=40)),
}
DTYPES = {"mha": torch.float32, "gqa-tied": torch.float16, "biases": torch.bfloat16}
PROMPT, ANSWER, CHUNK, PREFIX = 109, 9, 16, 7


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(transformers' teacher-forced logits in float32 on the saved weights, folder).

    Computed once: its dynamic NTK remembers how long the sequences before were.
    """
    torch.manual_seed(7)
    kind, options = CASES[request.param]
    config, cls = ((LlamaConfig, LlamaForCausalLM) if kind == "llama" else (MistralConfig, MistralForCausalLM))
    model = cls(config(**{**BASE, **options}, attn_implementation="eager")).to(DTYPES.get(request.param, torch.float32))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return reference(model.to(torch.float32).eval(), ids_for(model.config)[:-1]), folder


@pytest.fixture(params=["numpy", "cpu"])
def backend(request):
    return NumpyBackend() if request.param == "numpy" else load_backend("cpu", threads=1)


def load(folder, backend):
    with Checkpoint.open(folder) as checkpoint:
        return Model(checkpoint.config, load_weights(checkpoint, backend), backend)


def plan_for(config, tiers, layers_counts, assignment, max_new=ANSWER):
    n_chunks = (PROMPT - PREFIX) // CHUNK - 1
    shape = DocumentShape(n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim,
                          chunk=CHUNK, n_chunks=n_chunks, prefix=PREFIX, remainder=3,
                          suffix=PROMPT - PREFIX - n_chunks * CHUNK - 3, max_new=max_new, window=config.sliding_window)
    layout = shape.layout(tiers, layers_counts(n_chunks))
    return Plan(layout, (tuple(assignment(n_chunks)),) * config.n_layers, "test", "none")


def all_fp16(config, **options):
    return plan_for(config, [FP16], lambda n: [n], lambda n: [0] * n, **options)


def reference(model, ids):
    """Teacher forcing step by step, as generate() runs it (dynamic NTK depends on how far the sequence has come)."""
    rows, past = [], None
    with torch.no_grad():
        for start, end in [(0, PROMPT)] + [(i, i + 1) for i in range(PROMPT, len(ids))]:
            out = model(torch.tensor([ids[start:end]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, -1])
    return torch.stack(rows).numpy()


def ids_for(config, seed=3):
    return [int(i) for i in np.random.default_rng(seed).integers(3, config.vocab_size, PROMPT + ANSWER)]


def test_logits_equal_transformers(case, backend):
    expected, folder = case
    model = load(folder, backend)
    ids = ids_for(model.config)
    actual = read(model, ids[:PROMPT], [all_fp16(model.config)]).force(ids[PROMPT:])
    error = np.abs(actual - expected).max()
    print(f"\n{folder.name} on {backend.name}: max abs logit error {error:.1e}")
    assert error < 2e-3, f"max abs logit error {error:.2e} at logits of magnitude {np.abs(expected).max():.1f}"


def test_any_tile_gives_the_same_logits(case, backend):
    model = load(case[1], backend)
    ids = ids_for(model.config)
    rows = [read(model, ids[:PROMPT], [all_fp16(model.config)], tile=tile).force(ids[PROMPT:])
            for tile in (PROMPT, 64, 31, 36)]  # 36: the first of three tiles takes one row more
    for other in rows[1:]:
        np.testing.assert_allclose(other, rows[0], atol=2e-3)


def test_mixed_cache_equals_the_oracle(case):
    ids = None
    rows = []
    for backend in (NumpyBackend(), load_backend("cpu", threads=1)):
        model = load(case[1], backend)
        ids = ids or ids_for(model.config)
        tiers = [Tier(2, 2), Tier(3, 2), Tier(4, 4), Tier(8, 8), FP16]
        spread = np.arange(1000) * 7 % len(tiers)
        plan = plan_for(model.config, tiers, lambda n, s=spread: [int((s[:n] == t).sum()) for t in range(5)],
                        lambda n, s=spread: [int(t) for t in s[:n]])
        rows.append(read(model, ids[:PROMPT], [plan]).force(ids[PROMPT:]))
    np.testing.assert_allclose(rows[1], rows[0], atol=5e-3)
    assert np.isfinite(rows[0]).all()


def test_hidden_chunks_are_not_stored_and_not_missed(case, backend):
    """A window that hides the first chunks: width 0 gives the same logits as storing them."""
    model = load(case[1], backend)
    if model.config.sliding_window is None:
        return
    ids = ids_for(model.config)
    full = all_fp16(model.config)
    hidden = len(full.layout.hidden_chunks())
    assert hidden > 0
    short = plan_for(model.config, [Tier(0, 0), FP16], lambda n: [hidden, n - hidden],
                     lambda n: [0] * hidden + [1] * (n - hidden))
    reading = read(model, ids[:PROMPT], [full, short])
    assert reading.caches[1].sizes.nbytes < reading.caches[0].sizes.nbytes
    np.testing.assert_array_equal(reading.force(ids[PROMPT:], 1), reading.force(ids[PROMPT:], 0))


def test_greedy_text_repeats_on_the_same_cache(case, backend):
    model = load(case[1], backend)
    reading = read(model, ids_for(model.config)[:PROMPT], [all_fp16(model.config)])
    first = list(reading.generate(SamplingParams(), ANSWER, ()))
    assert len(first) == ANSWER
    assert list(reading.generate(SamplingParams(), ANSWER, ())) == first


@pytest.mark.parametrize("case", ["mha"], indirect=True)
def test_no_more_is_decoded_than_the_cache_has_room_for(case):
    model = load(case[1], NumpyBackend())
    ids = ids_for(model.config)
    reading = read(model, ids[:PROMPT], [all_fp16(model.config, max_new=3)])
    assert len(list(reading.generate(SamplingParams(), 3, ()))) == 3
    with pytest.raises(PromptError, match="4 new tokens were asked for; the cache was sized for 3"):
        next(reading.generate(SamplingParams(), 4, ()))
    assert len(reading.force(ids[PROMPT : PROMPT + 4])) == 4  # the last one is predicted, not decoded
    for answer in (ids[PROMPT : PROMPT + 5], []):
        with pytest.raises(PromptError, match=f"has {len(answer)} ids; expected 1 to 4"):
            reading.force(answer)


def test_running_ahead_shows_nothing(case):
    """An asynchronous backend has the next id drawn while the caller has the one before, one at most, and never more
    than were asked for; answers are the same, also after one that was left early."""
    steps = []

    class Ahead(NumpyBackend):
        def sample(self, logits, draws, state):
            super().sample(logits, draws, state)
            steps.append(int(state[STATE_DRAWN]))

    config = load(case[1], NumpyBackend()).config
    ids, plan = ids_for(config)[:PROMPT], all_fp16(config)
    expected = list(read(load(case[1], NumpyBackend()), ids, [plan]).generate(SamplingParams(), ANSWER, ()))
    reading = read(load(case[1], Ahead(asynchronous=True)), ids, [plan])
    for stops in ([expected[3]], []):
        steps.clear()
        seen = []
        for token in reading.generate(SamplingParams(), ANSWER, stops):
            seen.append(token)
            assert steps[-1] == min(len(seen) + (len(seen) > 1), ANSWER)
        assert seen == expected[: expected.index(stops[0]) + 1 if stops else ANSWER]
