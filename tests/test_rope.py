"""RoPE tables against transformers' own LlamaRotaryEmbedding, run as generation runs it: a prompt, then token by token.

Two claims. Every float32 operation is transformers' own, in its order: with torch's powers the frequencies are equal
bit for bit. Torch's vectorised power is off by one unit in the last place in about one value of a hundred, where ours
is correctly rounded: that, magnified by the position, is the only difference of the tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from runtime import rope
from runtime.config import ROPE_KINDS, ModelConfig
from runtime.rope import rope_tables

ULP = 2.0**-23
THETAS = (10000.0, 500000.0, 1e6, 130000, 123456.7)
HEAD_DIMS = (4, 16, 64, 80, 96, 128)


@st.composite
def configs(draw: st.DrawFn, kind: str | None = None) -> dict[str, Any]:
    """A config.json as transformers 5 writes it."""
    kind = kind or draw(st.sampled_from(ROPE_KINDS))
    positions = draw(st.sampled_from([48, 2048, 131072]))
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from(THETAS))}
    if kind != "default":
        parameters["factor"] = draw(st.sampled_from([1.0, 1.5, 2, 3.3, 8.0, 32.0]))
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = draw(st.sampled_from([32, 4096, 8192]))
    if kind == "llama3":
        parameters["low_freq_factor"] = draw(st.sampled_from([1.0, 0.9]))
        parameters["high_freq_factor"] = draw(st.sampled_from([4.0, 1.7]))
    if kind == "yarn":
        choices = {"beta_fast": [64.0, 16], "beta_slow": [2.0, 0.5], "truncate": [True, False],
                   "attention_factor": [0.8, 1.3], "mscale": [0.707, 0.0], "mscale_all_dim": [1.0, 0.5]}
        for key in draw(st.sets(st.sampled_from(sorted(choices)))):
            parameters[key] = draw(st.sampled_from(choices[key]))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    return llama(head_dim, positions, parameters)


def llama(head_dim: int, positions: int, parameters: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=8, hidden_size=2 * head_dim, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=positions,
        rope_parameters=parameters).to_dict()
    return config


def reference(config: dict[str, Any], prompt: int, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cos, sin, frequencies), each (total, D/2): one forward pass for the prompt, one for every later token."""
    module = LlamaRotaryEmbedding(LlamaConfig(**config))
    parts: list[list[torch.Tensor]] = [[], [], []]
    for positions in ([torch.arange(prompt)] if prompt else []) + [torch.tensor([p]) for p in range(prompt, total)]:
        cos, sin = module(torch.zeros(1), positions[None])
        frequencies = module.inv_freq.expand(len(positions), -1)
        half = cos.shape[-1] // 2
        for part, value in zip(parts, (cos[0, :, :half], sin[0, :, :half], frequencies), strict=True):
            part.append(value)
    cos, sin, frequencies = (torch.cat(part).numpy() for part in parts)
    return cos, sin, frequencies


def torch_powers(theta: Any, head_dim: int) -> np.ndarray:
    """runtime.rope._powers by torch, as transformers has it: a number, or a 0-d tensor, to a tensor's power."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    theta = np.asarray(theta, np.float32)
    if theta.ndim == 0:
        return (float(theta) ** exponents).numpy()
    return np.stack([(torch.tensor(row[0]) ** exponents).numpy() for row in theta])


DYNAMIC = llama(64, 48, {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 3.3})


@settings(max_examples=150, deadline=None)
@given(configs(), st.integers(0, 120), st.integers(1, 40))
@example(DYNAMIC, 47, 4)  # grows past the trained positions while decoding
@example(DYNAMIC, 48, 1)
@example(DYNAMIC, 49, 3)
@example(DYNAMIC, 0, 60)
def test_every_operation_is_the_references(config: dict[str, Any], prompt: int, new: int) -> None:
    total = prompt + new
    ours = ModelConfig.from_json(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope, "_powers", torch_powers)
        frequencies = np.broadcast_to(rope._frequencies(ours, np.arange(total), prompt), (total, ours.head_dim // 2))
        cos, sin = rope_tables(ours, prompt, total)
    their_cos, their_sin, their_frequencies = reference(config, prompt, total)
    np.testing.assert_array_equal(frequencies, their_frequencies)
    # Equal angles: the two libraries' cosines differ by at most a unit in the last place, times the attention factor.
    scale = max(1.0, float(np.abs(their_cos).max()), float(np.abs(their_sin).max()))
    np.testing.assert_allclose(cos, their_cos, rtol=0, atol=ULP * scale)
    np.testing.assert_allclose(sin, their_sin, rtol=0, atol=ULP * scale)


@pytest.mark.parametrize("kind", ROPE_KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tables_are_the_references(kind: str, data: st.DataObject) -> None:
    """Within 3 units in the last place of a frequency (a power off by one, then two roundings) times the position."""
    config = data.draw(configs(kind))
    prompt = data.draw(st.sampled_from([1, 40, 5000]))
    total = prompt + data.draw(st.integers(1, 6))
    cos, sin = rope_tables(ModelConfig.from_json(config), prompt, total)
    assert cos.shape == sin.shape == (total, config["head_dim"] // 2) and cos.dtype == sin.dtype == np.float32
    their_cos, their_sin, frequencies = reference(config, prompt, total)
    scale = max(1.0, float(np.abs(their_cos).max()), float(np.abs(their_sin).max()))
    # A dynamic base is itself a power; in llama3's middle band 1 - smooth and smooth magnify the wavelength's error.
    units = {"dynamic": 4, "llama3": 12}.get(kind, 3)
    bound = (units * ULP * np.arange(total)[:, None] * frequencies + 2 * ULP) * scale
    assert np.all(np.abs(cos - their_cos) <= bound)
    assert np.all(np.abs(sin - their_sin) <= bound)


@pytest.mark.parametrize("head_dim, theta", [(64, 10000.0), (64, 500000.0), (128, 10000.0), (128, 500000.0), (64, 1e6)])
def test_common_models_agree_to_the_last_unit(head_dim: int, theta: float) -> None:
    """Where torch's powers are correctly rounded too, as for these, so is everything that follows, at any position."""
    config = llama(head_dim, 131072, {"rope_type": "default", "rope_theta": theta})
    cos, sin = rope_tables(ModelConfig.from_json(config), 20000, 20000)
    their_cos, their_sin, _ = reference(config, 20000, 20000)
    np.testing.assert_allclose(cos, their_cos, rtol=0, atol=ULP)
    np.testing.assert_allclose(sin, their_sin, rtol=0, atol=ULP)


def test_only_dynamic_depends_on_the_prompt() -> None:
    for kind, extra in (("default", {}), ("linear", {"factor": 2.0})):
        config = ModelConfig.from_json(llama(16, 8, {"rope_type": kind, "rope_theta": 1e4} | extra))
        np.testing.assert_array_equal(rope_tables(config, 0, 40), rope_tables(config, 40, 40))
    dynamic = ModelConfig.from_json(DYNAMIC)
    short, long = rope_tables(dynamic, 50, 100)[0], rope_tables(dynamic, 100, 100)[0]
    assert not np.array_equal(short[:50], long[:50])  # prefill's rows have the prompt's length
    np.testing.assert_array_equal(short[99], long[99])  # the last row has the whole length either way


@pytest.mark.parametrize("prompt, total", [(-1, 4), (5, 4)])
def test_prompt_lies_within_the_total(prompt: int, total: int) -> None:
    with pytest.raises(ValueError, match="prompt_tokens"):
        rope_tables(ModelConfig.from_json(DYNAMIC), prompt, total)
