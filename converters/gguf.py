"""GGUF files of the llama architecture (which is also what Mistral files say they are).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads and dequantizes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from converters.gguf_tokenizer import end_ids, tokenizer_files
from converters.model import Model, Source, assemble, mappings_of
from runtime.errors import ConvertError

NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
HARMLESS_KEYS = {"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count", "attention.causal"}
MAX_ITEMS = 1 << 21  # of an array, four times the longest list of merges: each item is an object while it is read
# The constants of every Llama 3.1, 3.2 and 3.3; GGUF keeps only the factors that result (rope_freqs.weight).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(path: Path) -> Model:
    """Open a GGUF file as a Model; its tensors stay in the memory map. Raises ConvertError."""
    reader = _open(path)
    try:
        values = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise ConvertError(f"{path}: damaged GGUF metadata: {error!r}") from error
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        freqs = tensors.pop("rope_freqs.weight", None)
        config = _config(Fields(path, values), tensors, None if freqs is None else np.asarray(freqs.data, np.float64))
        sources = [_source(path, tensor) for tensor in tensors.values()]
        sources = assemble(path, config, sources, interleaved=True)
        return Model(config, sources, tokenizer_files(path, values, config["vocab_size"]))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise ConvertError(f"{path}: metadata of the wrong type or value: {error!r}") from error


class Fields:
    """Typed access to the `llama.*` keys, which remembers what was read so that nothing is ignored by accident."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.values.get(f"llama.{key}", default)
        if value is None:
            raise ConvertError(f"{self.path}: the key llama.{key} is missing")
        if isinstance(value, list):  # one value per layer
            if len(set(value)) != 1:
                raise ConvertError(f"{self.path}: llama.{key} differs between layers, which is not supported")
            value = value[0]
        return value

    def number(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or not low <= value < 1 << 32:
            raise ConvertError(f"{self.path}: llama.{key} is {value!r}, expected a whole number of at least {low}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConvertError(f"{self.path}: llama.{key} is {value!r}, expected a positive number")
        # Stored as float32: the shortest decimal that gives the same float32 is what the author wrote (1e-5).
        return float(str(np.float32(value)))

    def finish(self) -> None:
        keys = {key.removeprefix("llama.") for key in self.values if key.startswith("llama.")}
        if unknown := sorted(keys - self.seen - HARMLESS_KEYS):
            value = self.values[f"llama.{unknown[0]}"]
            raise ConvertError(f"{self.path}: llama.{unknown[0]} = {value!r} is not supported")


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError as error:
        raise ConvertError("reading GGUF needs the gguf package: pip install 'cocktail-kv[convert]'") from error

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY and (count := self._get(orig_offs + 4, np.uint64)[0]) > MAX_ITEMS:
                raise ValueError(f"an array of {count} items")
            return super()._get_field_parts(orig_offs, raw_type)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # The base class returns a short array past the end of the file, and then loops over garbage lengths.
            if int(offset) + int(count) * np.dtype(dtype).itemsize > self.data.size:
                raise ValueError("the file ends early")
            return super()._get(int(offset), dtype, count, override_order)

    try:
        reader = Reader(path)
    except OSError:
        raise
    except Exception as error:  # the package raises whatever NumPy raised on the damaged bytes
        raise ConvertError(f"{path}: not a readable GGUF file: {error}") from error
    if reader.byte_order == "S":
        raise ConvertError(f"{path}: a big-endian file; big-endian tensors are not supported")
    return reader


def _config(fields: Fields, tensors: dict[str, Any], freqs: np.ndarray | None) -> dict[str, Any]:
    path, values = fields.path, fields.values
    if (architecture := values.get("general.architecture")) != "llama":
        raise ConvertError(f"{path}: architecture {architecture!r} is not supported, only 'llama' (Llama and Mistral)")
    if values.get("split.count", 1) > 1:
        raise ConvertError(f"{path}: one part of a split GGUF; merge the parts with llama-gguf-split --merge first")
    if fields.number("expert_count", 0, low=0):
        raise ConvertError(f"{path}: a mixture of experts is not supported")
    if values.get("llama.attention.causal") is False:
        raise ConvertError(f"{path}: llama.attention.causal is false; only causal models are supported")
    if "token_embd.weight" not in tensors:
        raise ConvertError(f"{path}: tensor token_embd.weight is missing")
    hidden, heads = fields.number("embedding_length"), fields.number("attention.head_count")
    head_dim = fields.number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := fields.number(key, head_dim)) != head_dim:
            raise ConvertError(f"{path}: llama.{key} is {size}, expected the head's {head_dim}")
    fields.number("vocab_size", 1)  # the embedding's rows decide
    max_positions, theta = fields.number("context_length"), fields.real("rope.freq_base", 10000.0)
    window = fields.number("attention.sliding_window", 0, low=0)
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "model_type": "mistral" if window else "llama",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": fields.number("feed_forward_length"),
        "num_hidden_layers": fields.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": max_positions,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(fields, max_positions, theta, head_dim, freqs),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids(values),
        "torch_dtype": "float16",
    }
    if window:
        config["sliding_window"] = window
    fields.finish()
    return config


def _rope_scaling(
    fields: Fields, max_positions: int, theta: float, head_dim: int, freqs: np.ndarray | None
) -> dict[str, Any] | None:
    path = fields.path
    kind, factor = fields.get("rope.scaling.type", "none"), fields.real("rope.scaling.factor", 1.0)
    if (old := fields.real("rope.scale_linear", 1.0)) != 1.0:  # files of 2023
        kind, factor = "linear", old
    original = fields.number("rope.scaling.original_context_length", max_positions)
    for key in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor"):
        if (value := fields.real(f"rope.scaling.{key}", 1.0)) != 1.0:
            raise ConvertError(f"{path}: llama.rope.scaling.{key} = {value} is not supported")
    yarn = {f"beta_{end}": fields.real(f"rope.scaling.yarn_beta_{end}", default)
            for end, default in (("fast", 32.0), ("slow", 1.0))}  # fmt: skip
    if freqs is not None:
        if kind != "none" and factor != 1.0:
            raise ConvertError(f"{path}: rope_freqs.weight together with {kind} RoPE scaling is not supported")
        return _llama3(path, freqs, theta, head_dim)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **yarn}
    raise ConvertError(f"{path}: RoPE scaling {kind!r} is not supported (none, linear, yarn, Llama 3's rope_freqs are)")


def _llama3(path: Path, freqs: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Recover Llama 3's scaling from the divisor of each frequency, or refuse factors that it cannot explain."""
    if freqs.shape != (head_dim // 2,):
        raise ConvertError(f"{path}: rope_freqs.weight has shape {freqs.shape}, expected ({head_dim // 2},)")
    if np.array_equal(freqs, np.ones_like(freqs)):
        return None
    factor = float(freqs.max())
    low, high, original = LLAMA3.values()
    # turns of each frequency within the original context
    turns = original * theta ** (-2 * np.arange(head_dim // 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), freqs, rtol=1e-4):
        raise ConvertError(f"{path}: rope_freqs.weight does not follow Llama 3's scaling; no other is supported")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _source(path: Path, tensor: Any) -> Source:
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize

    name, shape = _name(path, tensor.name), tuple(int(size) for size in reversed(tensor.shape))
    kind, data = tensor.tensor_type, tensor.data
    raw: dict[Any, tuple[str, Callable[[Any], np.ndarray]]] = {
        Kind.F32: ("F32", lambda index: data[index]),
        Kind.F16: ("F16", lambda index: data[index]),
        Kind.BF16: ("BF16", lambda index: data[index].view(np.uint16)),
    }
    if kind in raw:
        return Source(name, shape, *raw[kind], mappings=mappings_of(data))
    try:
        dequantize(data.reshape(-1, data.shape[-1])[:1], kind)
    except NotImplementedError as error:
        message = f"{path}: tensor {tensor.name} has type {kind.name}, which the gguf package cannot dequantize"
        raise ConvertError(message) from error

    def rows(index: Any) -> np.ndarray:
        return dequantize(np.asarray(data[index]), kind)

    return Source(name, shape, "F32", rows, quantized=True, mappings=mappings_of(data))


def _name(path: Path, name: str) -> str:
    base, _, kind = name.rpartition(".")
    if base in OUTER and kind == "weight":
        return f"{OUTER[base]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", base)
    if match and match[2] in NAMES and kind in ("weight", "bias"):
        return f"model.layers.{match[1]}.{NAMES[match[2]]}.{kind}"
    raise ConvertError(f"{path}: tensor {name} does not belong to a Llama or Mistral model")
