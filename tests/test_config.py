"""ModelConfig.from_json: reads what transformers writes, in both styles, and refuses by name what it cannot run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from checkpoint_files import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from runtime.config import ModelConfig, RopeConfig
from runtime.errors import CheckpointError
from runtime.rope import rope_tables


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_json(tiny_config(**changes))


def mistral(**changes: Any) -> ModelConfig:
    return parse(architectures=["MistralForCausalLM"], model_type="mistral", **changes)


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in tiny_config(**changes).items() if key not in keys}


def test_every_field() -> None:
    assert parse() == ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=32, hidden_size=16, intermediate_size=24, n_layers=2, n_heads=4,
        n_kv_heads=2, head_dim=8, rms_norm_eps=1e-5, rope=RopeConfig("default", 10000.0), max_positions=128,
        sliding_window=None, tie_embeddings=False, attention_bias=False, mlp_bias=False, bos_id=1, eos_ids=(2, 3),
        generation={})


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([LlamaConfig, MistralConfig]), st.sampled_from([1, 2, 4]), st.sampled_from([None, 8, 24]),
       st.booleans(), st.sampled_from([None, 7, [3, 5]]), st.sampled_from([None, 0]), st.sampled_from([None, 64]),
       st.sampled_from([1e-5, 1e-6]))
def test_agrees_with_transformers(kind: Any, kv_heads: int, head_dim: int | None, tied: bool, eos: Any, bos: int | None,
                                  window: int | None, eps: float) -> None:
    extra = {"sliding_window": window} if kind is MistralConfig else {"attention_bias": tied, "mlp_bias": not tied}
    theirs = kind(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied, eos_token_id=eos,
                  bos_token_id=bos, rms_norm_eps=eps, architectures=[kind.__name__[:-6] + "ForCausalLM"], **extra)
    for written in (theirs.to_dict(), json.loads(theirs.to_json_string(use_diff=True))):
        ours = ModelConfig.from_json(written)
        for mine, name in (("vocab_size", "vocab_size"), ("hidden_size", "hidden_size"), ("head_dim", "head_dim"),
                           ("intermediate_size", "intermediate_size"), ("n_layers", "num_hidden_layers"),
                           ("n_heads", "num_attention_heads"), ("n_kv_heads", "num_key_value_heads"),
                           ("rms_norm_eps", "rms_norm_eps"), ("max_positions", "max_position_embeddings"),
                           ("bos_id", "bos_token_id"), ("tie_embeddings", "tie_word_embeddings")):
            assert getattr(ours, mine) == getattr(theirs, name), mine
        assert ours.sliding_window == (window if kind is MistralConfig else None)
        assert ours.attention_bias == getattr(theirs, "attention_bias", False)
        assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
        assert ours.eos_ids == (() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos))


@pytest.mark.parametrize("kind, make, key, mine", [
    ("llama", LlamaConfig, "num_key_value_heads", "n_kv_heads"), ("llama", LlamaConfig, "rms_norm_eps", "rms_norm_eps"),
    ("llama", LlamaConfig, "max_position_embeddings", "max_positions"), ("llama", LlamaConfig, "head_dim", "head_dim"),
    ("llama", LlamaConfig, "tie_word_embeddings", "tie_embeddings"), ("llama", LlamaConfig, "bos_token_id", "bos_id"),
    ("mistral", MistralConfig, "num_key_value_heads", "n_kv_heads"),
    ("mistral", MistralConfig, "max_position_embeddings", "max_positions"),
    ("mistral", MistralConfig, "sliding_window", "sliding_window")])
def test_an_absent_key_has_the_value_transformers_gives_it(kind: str, make: Any, key: str, mine: str) -> None:
    stated = without(key, "architectures", "model_type", "rope_theta", num_attention_heads=16, hidden_size=64)
    theirs = make(**stated)
    ours = ModelConfig.from_json(stated | {"architectures": [f"{kind.title()}ForCausalLM"]})
    assert getattr(ours, mine) == getattr(theirs, key)


@pytest.mark.parametrize("key", ["architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads"])
def test_sizes_must_be_stated(key: str) -> None:
    for config in (without(key), tiny_config(**{key: None})):
        with pytest.raises(CheckpointError, match=key):
            ModelConfig.from_json(config)


def test_sliding_window_is_mistrals() -> None:
    assert parse(sliding_window=64).sliding_window is None
    assert mistral(sliding_window=64).sliding_window == 64
    assert mistral(sliding_window=None).sliding_window is None


def test_null_means_derived() -> None:
    assert parse(head_dim=None).head_dim == 4
    assert mistral(num_key_value_heads=None).n_kv_heads == 4


# RoPE -----------------------------------------------------------------------------------------------------------

SCALED = [
    ({"factor": 2.0}, RopeConfig("linear", 5e5, 2.0)),
    ({"factor": 4}, RopeConfig("dynamic", 5e5, 4.0)),
    ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 32},
     RopeConfig("llama3", 5e5, 8.0, 32, low_freq_factor=1.0, high_freq_factor=3.0)),
    ({"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2.0, "mscale": 0.7,
      "mscale_all_dim": 1.0, "attention_factor": 1.1, "truncate": False},
     RopeConfig("yarn", 5e5, 4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.1, mscale=0.7,
                mscale_all_dim=1.0, truncate=False)),
]


@pytest.mark.parametrize("parameters, expected", SCALED)
def test_three_styles_of_rope_are_one(parameters: dict[str, Any], expected: RopeConfig) -> None:
    kind = expected.kind
    assert parse(rope_theta=5e5, rope_scaling={"type": kind} | parameters).rope == expected
    assert parse(rope_theta=5e5, rope_scaling={"rope_type": kind} | parameters).rope == expected
    new_style = without("rope_theta", rope_parameters={"rope_type": kind, "rope_theta": 5e5} | parameters)
    assert ModelConfig.from_json(new_style).rope == expected
    both = tiny_config(rope_theta=1e3, rope_scaling=None, rope_parameters=new_style["rope_parameters"])
    assert ModelConfig.from_json(both).rope == expected  # the theta inside wins, and a null rope_scaling says nothing


def test_what_rope_leaves_out() -> None:
    assert ModelConfig.from_json(without("rope_theta")).rope == RopeConfig("default", 10000.0)
    assert parse(rope_scaling={}).rope == RopeConfig("default", 10000.0)
    yarn = parse(rope_scaling={"type": "yarn", "factor": 2.0}).rope
    assert yarn == RopeConfig("yarn", 10000.0, 2.0, 128)  # original positions: the model's own
    ratio = parse(rope_scaling={"type": "yarn", "factor": None}, original_max_position_embeddings=32).rope
    assert (ratio.factor, ratio.original_max_positions) == (4.0, 32)


@pytest.mark.parametrize("rope, words", [
    ({"rope_type": "longrope", "factor": 2.0}, "rope_type.*longrope"),
    ({"rope_type": "linear"}, "factor is missing"),
    ({"rope_type": "linear", "factor": 0.5}, "factor.*0.5"),
    ({"rope_type": "linear", "factor": "2"}, "factor.*'2'"),
    ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor is missing"),
    ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate.*true or false.*1"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 1000}, "factor"),  # the ratio would shrink
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_type": "default", "rope_theta": 1.0}, "rope_theta"),
    ({"full_attention": {"rope_type": "default"}}, "every layer"),
    ([], "JSON object"), (False, "JSON object"), ("linear", "JSON object"),
])
def test_rope_that_cannot_be_run(rope: Any, words: str) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        with pytest.raises(CheckpointError, match=words):
            parse(**{key: rope})


def test_dynamic_needs_more_than_one_pair() -> None:
    with pytest.raises(CheckpointError, match="head_dim above 2"):
        parse(head_dim=2, rope_scaling={"type": "dynamic", "factor": 2.0})


# generation_config.json -----------------------------------------------------------------------------------------

def test_generation_defaults_and_eos() -> None:
    def eos(config: dict[str, Any], generation: Any) -> tuple[int, ...]:
        return ModelConfig.from_json(config, {"eos_token_id": generation}).eos_ids

    assert eos(tiny_config(), [3, 9]) == (2, 3, 9)
    assert eos(tiny_config(eos_token_id=None), 9) == (9,)
    assert eos(tiny_config(), None) == (2, 3)
    # The default of a key that config.json leaves out must not stop a model that states its own elsewhere.
    assert eos(without("eos_token_id"), [9]) == (9,)
    assert ModelConfig.from_json(without("eos_token_id")).eos_ids == (2,)

    stated = {"temperature": 0.6, "top_k": 50, "top_p": 1, "repetition_penalty": 1.1, "do_sample": True}
    config = ModelConfig.from_json(tiny_config(), stated | {"max_length": 5, "pad_token_id": -1})
    assert config.generation == stated
    assert ModelConfig.from_json(tiny_config(), dict.fromkeys(stated)).generation == {}
    with pytest.raises(TypeError):
        config.generation["top_k"] = 1  # type: ignore[index]


@pytest.mark.parametrize("key, value", [("temperature", -1), ("temperature", math.nan), ("top_k", 1.5), ("top_k", True),
                                        ("top_p", 1.5), ("repetition_penalty", 0), ("do_sample", 1),
                                        ("eos_token_id", 32), ("eos_token_id", [2, "3"])])
def test_generation_values_are_checked(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key}"):
        ModelConfig.from_json(tiny_config(), {key: value})


# refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    ({"architectures": ["Qwen2ForCausalLM"]}, "LlamaForCausalLM, MistralForCausalLM.*Qwen2ForCausalLM"),
    ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "architectures"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
    ({"model_type": "qwen2"}, "model_type.*'llama'.*'qwen2'"),
    ({"hidden_act": "gelu"}, "hidden_act.*'silu'.*'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple.*4 and 3"),
    ({"head_dim": 7}, "even head_dim, got 7"),
    ({"head_dim": None, "hidden_size": 18}, "multiple.*18 and 4"),
    ({"bos_token_id": [1, 2]}, "bos_token_id"),
    ({"eos_token_id": 32}, "eos_token_id.*0 to 31"),
    ({"eos_token_id": -1}, "eos_token_id"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
])
def test_refusals_say_expected_and_actual(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse(**changes)


def test_mistral_refusals() -> None:
    for changes in ({"attention_bias": True}, {"mlp_bias": True},
                    {"layer_types": ["sliding_attention", "full_attention"]}):
        with pytest.raises(CheckpointError, match=next(iter(changes))):
            mistral(**changes)


HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([10**5000, -(10**5000), 10**400, 2**63, 2**31, math.nan, math.inf, 1e308, "32", "\ud800"]),
    st.lists(st.integers(-1, 40), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
ROPE_KEYS = ("factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
             "mscale", "beta_fast", "beta_slow", "attention_factor", "mscale_all_dim", "truncate", "rope_type", "type",
             "partial_rotary_factor")
GENERATION_KEYS = ("eos_token_id", "temperature", "top_k", "top_p", "do_sample")
KEYS = (*tiny_config(), "sliding_window", "quantization_config", "layer_types", "rope_scaling", "rope_parameters",
        "partial_rotary_factor", "original_max_position_embeddings")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["Llama", "Mistral"]), st.dictionaries(st.sampled_from(KEYS), HOSTILE, max_size=3),
       st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]),
       st.dictionaries(st.sampled_from(ROPE_KEYS), HOSTILE, max_size=3),
       st.dictionaries(st.sampled_from(GENERATION_KEYS), HOSTILE, max_size=2))
def test_hostile_values_are_refused_or_harmless(name: str, changes: dict[str, Any], kind: str, rope: dict[str, Any],
                                                generation: dict[str, Any]) -> None:
    """Whatever the values, the outcome is a CheckpointError or a config whose every invariant holds."""
    parameters = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | rope
    config = tiny_config(architectures=[f"{name}ForCausalLM"], model_type=name.lower(), rope_parameters=parameters)
    try:
        ours = ModelConfig.from_json(config | changes, generation)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        str(error).encode()  # printable
        return
    assert ours.n_heads % ours.n_kv_heads == 0 and ours.head_dim % 2 == 0
    assert all(0 <= token < ours.vocab_size for token in ours.eos_ids)
    for record in (ours, ours.rope):
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if isinstance(value, float):
                assert math.isfinite(value) and value >= 0, field.name
            elif isinstance(value, int):
                assert 0 <= value <= 1 << 30, field.name
            kind_name = "None" if value is None else type(value).__name__
            assert kind_name in re.findall(r"\w+", str(field.type)) or field.name == "generation", field.name
    with np.errstate(all="ignore"):
        assert np.isfinite(rope_tables(ours, 3, 5)).all()
