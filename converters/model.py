"""What every converter hands to the writer: a Hugging Face config, tensors read on demand, and small text files."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from runtime.errors import ConvertError

Rows = Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Source:
    """One tensor, read by rows while it is written, so that it never has to be in memory as a whole."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of what rows() returns: "F32" | "F16" | "BF16" (as uint16)
    rows: Rows  # slice or index array over the first axis -> those rows
    quantized: bool = False
    mapping: mmap.mmap | None = None  # file pages to release once the tensor is written

    def permuted(self, order: np.ndarray) -> Source:
        """The same tensor with row i taken from row order[i]."""
        return replace(self, rows=lambda index: self.rows(order[index]))


@dataclass(frozen=True)
class Model:
    """A checkpoint in Hugging Face's names and row order."""

    config: dict[str, Any]
    sources: list[Source]
    files: dict[str, str] = field(default_factory=dict)  # name -> text, for the metadata; config.json excluded


def half_split_rows(n_heads: int, head_dim: int) -> np.ndarray:
    """Row order that turns interleaved-RoPE Q or K rows into Hugging Face's half-split order.

    Interleaved RoPE rotates rows (2j, 2j+1) of a head together, half-split rotates rows (j, j + head_dim/2).
    """
    rows = np.arange(n_heads * head_dim).reshape(n_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def assemble(where: object, config: dict[str, Any], found: Iterable[Source], *, interleaved: bool) -> list[Source]:
    """Check `found` (Hugging Face names) against `config` and undo the interleaved row order of Q and K.

    Raises ConvertError on a missing, unknown, repeated or wrongly shaped tensor.
    """
    expected = tensor_shapes(config)
    sources: dict[str, Source] = {}
    for source in found:
        if source.name not in expected or source.name in sources:
            what = "appears twice" if source.name in sources else "does not belong to a Llama or Mistral model"
            raise ConvertError(f"{where}: tensor {source.name} {what}")
        if source.shape != (shape := expected[source.name]):
            raise ConvertError(f"{where}: tensor {source.name} has shape {source.shape}, expected {shape}")
        sources[source.name] = source
    if missing := [name for name in expected if name not in sources]:
        raise ConvertError(f"{where}: {len(missing)} tensors are missing, first {missing[0]}")
    if interleaved:
        head_dim = config["head_dim"]
        for part, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
            order = half_split_rows(heads, head_dim)
            for name in [name for name in sources if f".{part}." in name]:
                sources[name] = sources[name].permuted(order)
    return list(sources.values())


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a LlamaForCausalLM or MistralForCausalLM with this config."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    linear = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        for name, shape in linear.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes
