"""Small checkpoints as files, written without any library, and what of them has to arrive in memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checkpoint import Checkpoint
from runtime.weights import Weights, load_weights

ITEM = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, bytes


class HostBackend:
    """The two methods that load_weights calls; matrices are kept as given, as the CPU does."""

    def matrix(self, data: np.ndarray, dtype: str) -> np.ndarray:
        assert data.dtype == {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype]
        return data

    def vector(self, data: np.ndarray, dtype: str) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else data.astype(np.float32)


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": [2, 3],
    } | changes


def tiny_tensors(config: dict[str, Any], dtype: str = "F32", seed: int = 0) -> Stored:
    """Random finite tensors for the config, as transformers names and shapes them."""
    E, mlp, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], E),
                                          "model.norm.weight": (E,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], E)
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        shapes |= {base + "input_layernorm.weight": (E,), base + "post_attention_layernorm.weight": (E,)}
        for name, rows, columns in (("self_attn.q", H * D, E), ("self_attn.k", G * D, E), ("self_attn.v", G * D, E),
                                    ("self_attn.o", E, H * D), ("mlp.gate", mlp, E), ("mlp.up", mlp, E),
                                    ("mlp.down", E, mlp)):
            shapes[f"{base}{name}_proj.weight"] = (rows, columns)
            if config["mlp_bias" if "mlp" in name else "attention_bias"]:
                shapes[f"{base}{name}_proj.bias"] = (rows,)
    rng = np.random.default_rng(seed)
    return {name: (dtype, shape, values(rng, dtype, shape)) for name, shape in shapes.items()}


def values(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> bytes:
    x = rng.standard_normal(shape).astype(np.float32)
    return {"F32": x, "F16": x.astype(np.float16), "BF16": (x.view(np.uint32) >> 16).astype(np.uint16)}[dtype].tobytes()


def pack(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header_and_data(tensors: Stored, metadata: dict[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header, b"".join(data for _, _, data in tensors.values())


def write(path: Path, tensors: Stored, metadata: dict[str, str] | None = None, align: int = 8) -> Path:
    header, data = header_and_data(tensors, metadata)
    text = json.dumps(header).encode()
    path.write_bytes(pack(text + b" " * (-len(text) % align), data))
    return path


def write_folder(folder: Path, config: dict[str, Any], tensors: Stored, shards: int = 1) -> Path:
    """A Hugging Face folder. Returns the path of the file to open."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        return write(folder / "model.safetensors", tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def load(path: Path) -> Weights:
    with Checkpoint.open(path) as checkpoint:
        return load_weights(checkpoint, HostBackend())  # type: ignore[arg-type]


def loaded(weights: Weights) -> dict[str, np.ndarray | None]:
    """Weights by the names transformers gives them, written out independently of runtime.weights."""
    found: dict[str, np.ndarray | None] = {"model.embed_tokens.weight": weights.embed, "lm_head.weight": weights.head,
                                           "model.norm.weight": weights.norm}
    for index, layer in enumerate(weights.layers):
        base = f"model.layers.{index}."
        found |= {base + "input_layernorm.weight": layer.attn_norm, base + "self_attn.q_proj.weight": layer.wq,
                  base + "self_attn.k_proj.weight": layer.wk, base + "self_attn.v_proj.weight": layer.wv,
                  base + "self_attn.o_proj.weight": layer.wo, base + "self_attn.q_proj.bias": layer.bq,
                  base + "self_attn.k_proj.bias": layer.bk, base + "self_attn.v_proj.bias": layer.bv,
                  base + "self_attn.o_proj.bias": layer.bo, base + "post_attention_layernorm.weight": layer.mlp_norm,
                  base + "mlp.gate_proj.weight": layer.gate, base + "mlp.up_proj.weight": layer.up,
                  base + "mlp.down_proj.weight": layer.down, base + "mlp.gate_proj.bias": layer.gate_bias,
                  base + "mlp.up_proj.bias": layer.up_bias, base + "mlp.down_proj.bias": layer.down_bias}
    return found


def assert_holds(weights: Weights, tensors: Stored) -> None:
    """Every loaded array equals the stored bytes, and nothing is loaded that was not stored (a tied head apart)."""
    found = loaded(weights)
    for name, array in found.items():
        if array is None:
            assert name not in tensors
            continue
        dtype, shape, data = tensors.get(name) or tensors["model.embed_tokens.weight"]
        assert array.shape == shape, name
        if array.ndim == 1:  # a float32 vector
            view = np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
            data = HostBackend().vector(view, dtype).tobytes()
        assert array.tobytes() == data, name
