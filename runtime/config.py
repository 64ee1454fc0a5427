"""What a checkpoint's config.json says, validated: `ModelConfig.from_json` is the only way a configuration enters.

Two architectures: LlamaForCausalLM and MistralForCausalLM. A key that config.json leaves out has the value that the
architecture's transformers class gives it; sizes must be stated. Every value is checked for type and range, so that
a damaged configuration fails here by name and never as a huge allocation or a NaN later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from runtime.errors import CheckpointError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles; runtime.rope has the formulas. A kind ignores the fields of others."""

    kind: str  # one of ROPE_KINDS
    theta: float
    factor: float = 1.0  # linear, dynamic, llama3, yarn: how far the context is stretched
    original_max_positions: int | None = None  # llama3, yarn: positions before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: None follows from factor, mscale and mscale_all_dim
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and how it is run. Letters in comments as in the kernels."""

    architecture: str  # "LlamaForCausalLM" | "MistralForCausalLM"
    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # I
    n_layers: int  # L
    n_heads: int  # H
    n_kv_heads: int  # G; divides H
    head_dim: int  # D; even
    rms_norm_eps: float
    rope: RopeConfig
    max_positions: int  # tokens the model was made for
    sliding_window: int | None  # tokens, the query's own included; Mistral only
    tie_embeddings: bool  # the head is the embedding matrix
    attention_bias: bool  # on q, k, v and o
    mlp_bias: bool  # on gate, up and down
    bos_id: int | None
    eos_ids: tuple[int, ...]  # config.json's first, then what generation_config.json adds
    generation: Mapping[str, float | int | bool]  # temperature, top_k, top_p, repetition_penalty, do_sample; if stated

    @classmethod
    def from_json(cls, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
        """From the parsed config.json and, if there is one, generation_config.json. Raises CheckpointError."""
        c = _Fields("config.json", config)
        architecture = _architecture(c)
        mistral = architecture == "MistralForCausalLM"
        _refuse_unsupported(c, mistral)

        vocab_size = c.integer("vocab_size", 1, 1 << 24)
        hidden_size = c.integer("hidden_size", 1, 1 << 17)
        n_heads = c.integer("num_attention_heads", 1, 1 << 12)
        n_kv_heads = c.optional_integer("num_key_value_heads", 1, 1 << 12, default=8 if mistral else None) or n_heads
        if n_heads % n_kv_heads:
            raise CheckpointError(f"config.json: num_attention_heads must be a multiple of num_key_value_heads, "
                                  f"got {n_heads} and {n_kv_heads}")
        head_dim = _head_dim(c, hidden_size, n_heads)
        max_positions = c.integer("max_position_embeddings", 1, 1 << 30, default=131072 if mistral else 2048)

        g = _Fields("generation_config.json", {} if generation is None else generation)
        more_eos_ids = _token_ids(g, "eos_token_id", vocab_size)
        eos_ids = _token_ids(c, "eos_token_id", vocab_size, default=None if more_eos_ids else 2) + more_eos_ids
        bos_ids = _token_ids(c, "bos_token_id", vocab_size, default=1)
        if len(bos_ids) > 1:
            raise CheckpointError(f"config.json: bos_token_id: expected one id or null, got {list(bos_ids)}")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=c.integer("intermediate_size", 1, 1 << 20),
            n_layers=c.integer("num_hidden_layers", 1, 1 << 10),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=c.number("rms_norm_eps", 1e-12, 0.1, default=1e-6),
            rope=_rope(c, head_dim, max_positions),
            max_positions=max_positions,
            sliding_window=c.optional_integer("sliding_window", 1, 1 << 30, default=4096) if mistral else None,
            tie_embeddings=c.flag("tie_word_embeddings", default=False),
            attention_bias=c.flag("attention_bias", default=False),
            mlp_bias=c.flag("mlp_bias", default=False),
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=tuple(dict.fromkeys(eos_ids)),
            generation=_generation_defaults(g),
        )


_ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}  # name -> model_type
_REQUIRED: Any = object()  # default of a key that must be stated


class _Fields:
    """Typed, bounded access to one JSON object. Null counts as a value: only the optional readers accept it."""

    def __init__(self, source: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{source}: expected a JSON object, got {_show(values)}")
        self.source = source
        self.values = values

    def integer(self, key: str, low: int, high: int, default: int = _REQUIRED) -> int:
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:  # bool is a subclass of int: refused
            raise self.error(key, f"an integer from {low} to {high}", value)
        return value

    def optional_integer(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.values.get(key, default)
        return None if value is None else self.integer(key, low, high, value)

    def number(self, key: str, low: float, high: float, default: float = _REQUIRED) -> float:
        value = self._get(key, default)
        # The comparison is exact for huge integers, which float() would refuse, and false for NaN.
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return None if self.values.get(key) is None else self.number(key, low, high)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def error(self, key: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key}: expected {expected}, got {_show(value)}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self.source}: {key} is missing")
        return value


def _architecture(c: _Fields) -> str:
    """The one supported name in `architectures`, which model_type, where stated, must not contradict."""
    names = c.values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise c.error("architectures", f"one of {', '.join(_ARCHITECTURES)}", names)
    if c.values.get("model_type", _ARCHITECTURES[name]) != _ARCHITECTURES[name]:
        raise c.error("model_type", f"{_ARCHITECTURES[name]!r} for {name}", c.values["model_type"])
    return name


def _refuse_unsupported(c: _Fields, mistral: bool) -> None:
    for key in ("quantization_config", "compression_config"):
        if c.values.get(key) is not None:
            raise c.error(key, "no quantized weights (use the F32, F16 or BF16 original, or convert a GGUF)",
                          c.values[key])
    if c.values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise c.error("hidden_act", "'silu'", c.values["hidden_act"])
    for key in ("attention_bias", "mlp_bias"):
        if mistral and c.flag(key, default=False):
            raise c.error(key, "false (MistralForCausalLM has no biases)", True)
    kinds = c.values.get("layer_types")
    if mistral and kinds is not None and (not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds)):
        raise c.error("layer_types", "one kind of attention in every layer", kinds)


def _head_dim(c: _Fields, hidden_size: int, n_heads: int) -> int:
    head_dim = c.optional_integer("head_dim", 2, 1 << 12)
    if head_dim is None:
        if hidden_size % n_heads:
            raise CheckpointError(f"config.json: without head_dim, hidden_size must be a multiple of "
                                  f"num_attention_heads, got {hidden_size} and {n_heads}")
        head_dim = hidden_size // n_heads
    if head_dim % 2:
        raise CheckpointError(f"config.json: RoPE rotates pairs: expected an even head_dim, got {head_dim}")
    return head_dim


def _rope(c: _Fields, head_dim: int, max_positions: int) -> RopeConfig:
    """RoPE from `rope_scaling` + `rope_theta` or transformers 5's `rope_parameters`, the former first as there.

    rope_theta inside the object wins over the one beside it; original_max_position_embeddings is the other way round.
    """
    for key in ("rope_scaling", "rope_parameters"):
        stated = c.values.get(key)
        r = _Fields(f"config.json: {key}", {} if stated is None else stated)
        if r.values:
            break
    per_layer = [name for name, value in r.values.items() if isinstance(value, dict)]
    if per_layer:
        raise c.error(key, "the same RoPE in every layer", per_layer)
    kind = r.values.get("rope_type") or r.values.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise r.error("rope_type", f"one of {', '.join(ROPE_KINDS)}", kind)
    for fields in (c, r):
        fields.optional_number("partial_rotary_factor", 1.0, 1.0)  # stated or not, every dimension is rotated
    theta = (r if r.values.get("rope_theta") is not None else c).optional_number("rope_theta", 1.0 + 1e-6, 1e15)
    theta = 10000.0 if theta is None else theta
    if kind == "default":
        return RopeConfig(kind, theta)

    fields = c if c.values.get("original_max_position_embeddings") is not None else r
    original = fields.optional_integer("original_max_position_embeddings", 1, 1 << 30) or max_positions
    if kind == "yarn" and r.values.get("factor") is None:
        r.values = r.values | {"factor": max_positions / original}
    factor = r.number("factor", 1.0, 1e6)
    if kind == "dynamic" and head_dim == 2:
        raise CheckpointError("config.json: dynamic RoPE divides by head_dim - 2: expected head_dim above 2, got 2")
    if kind == "llama3":
        low = r.number("low_freq_factor", 1e-6, 1e6)
        high = r.number("high_freq_factor", 1e-6, 1e6)
        if low >= high:
            raise r.error("high_freq_factor", f"more than low_freq_factor ({low:g})", high)
        return RopeConfig(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return RopeConfig(
            kind, theta, factor, original,
            beta_fast=r.optional_number("beta_fast", 0.0, 1e6) or 32.0,
            beta_slow=r.optional_number("beta_slow", 0.0, 1e6) or 1.0,
            attention_factor=r.optional_number("attention_factor", 1e-3, 1e3),
            mscale=r.optional_number("mscale", 0.0, 1e3),
            mscale_all_dim=r.optional_number("mscale_all_dim", 0.0, 1e3),
            truncate=r.flag("truncate", default=True),
        )
    return RopeConfig(kind, theta, factor)


def _token_ids(fields: _Fields, key: str, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
    """The ids of a key that holds an id, a list of ids or null."""
    value = fields.values.get(key, default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise fields.error(key, f"ids from 0 to {vocab_size - 1}", value)
    return tuple(ids)


def _generation_defaults(g: _Fields) -> Mapping[str, float | int | bool]:
    found = {
        "temperature": g.optional_number("temperature", 0.0, 1e6),
        "top_k": g.optional_integer("top_k", 0, 1 << 31),
        "top_p": g.optional_number("top_p", 0.0, 1.0),
        "repetition_penalty": g.optional_number("repetition_penalty", 1e-3, 1e3),
        "do_sample": None if g.values.get("do_sample") is None else g.flag("do_sample", default=False),
    }
    return MappingProxyType({key: value for key, value in found.items() if value is not None})


def _show(value: Any) -> str:
    """A value as an error prints it: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than str() allows; nested too deep
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."
