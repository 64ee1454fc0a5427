"""What every converter hands to the writer: a Hugging Face config, tensors read on demand, and small text files."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.config import ModelConfig
from runtime.errors import CheckpointError, ConvertError

Rows = Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Source:
    """One tensor, read by rows while it is written, so that it never has to be in memory as a whole."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of what rows() returns: "F32" | "F16" | "BF16" (as uint16)
    rows: Rows  # slice or index array over the first axis -> those rows
    quantized: bool = False
    mappings: tuple[mmap.mmap, ...] = ()  # whose pages to release once the tensor is written

    def permuted(self, order: np.ndarray) -> Source:
        """The same tensor with row i taken from row order[i]."""
        return replace(self, rows=lambda index: self.rows(order[index]))


@dataclass(frozen=True)
class Model:
    """A checkpoint in Hugging Face's names and row order."""

    config: dict[str, Any]
    sources: list[Source]
    files: dict[str, str] = field(default_factory=dict)  # name -> text, for the metadata; config.json excluded


def mappings_of(array: np.ndarray) -> tuple[mmap.mmap, ...]:
    """The memory map that an array is a view of, if it is."""
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    return (owner,) if isinstance(owner, mmap.mmap) else ()


def half_split_rows(n_heads: int, head_dim: int) -> np.ndarray:
    """Row order that turns interleaved-RoPE Q or K rows into Hugging Face's half-split order.

    Interleaved RoPE rotates rows (2j, 2j+1) of a head together, half-split rotates rows (j, j + head_dim/2).
    """
    rows = np.arange(n_heads * head_dim).reshape(n_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def assemble(where: Path, config: dict[str, Any], found: Iterable[Source], *, interleaved: bool) -> list[Source]:
    """Check `found` (Hugging Face names) against `config` and undo the interleaved row order of Q and K.

    Raises ConvertError on an invalid config and on a missing, unknown, repeated or wrongly shaped tensor.
    """
    try:
        checked = ModelConfig.from_json(config)
    except CheckpointError as error:
        raise ConvertError(f"{where}: the configuration is not usable: {error}") from error
    expected = tensor_shapes(checked)
    sources: dict[str, Source] = {}
    for source in found:
        if source.name not in expected or source.name in sources:
            what = "appears twice" if source.name in sources else "does not belong to the model its configuration names"
            raise ConvertError(f"{where}: tensor {source.name} {what}")
        if source.shape != (shape := expected[source.name]):
            raise ConvertError(f"{where}: tensor {source.name} has shape {source.shape}, expected {shape}")
        sources[source.name] = source
    if missing := [name for name in expected if name not in sources]:
        raise ConvertError(f"{where}: {len(missing)} tensors are missing, first {missing[0]}")
    if interleaved:
        for part, heads in (("q_proj", checked.n_heads), ("k_proj", checked.n_kv_heads)):
            order = half_split_rows(heads, checked.head_dim)
            for name in [name for name in sources if f".{part}." in name]:
                sources[name] = sources[name].permuted(order)
    return list(sources.values())


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a LlamaForCausalLM or MistralForCausalLM with this config."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        for name, shape in linear.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes
