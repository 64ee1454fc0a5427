"""Meta's own releases: params.json beside consolidated.00.pth, .01.pth, ..., one per model-parallel part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.model import Model, Source, assemble
from converters.originals import Params, hf_name
from converters.rank_tokenizer import tokenizer_files
from converters.torch_zip import LazyTensor, load
from runtime.errors import ConvertError

BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # row-parallel layers: each part has some input columns


def read(folder: Path) -> Model:
    """Open the release as a Model; its tensors stay in the memory map. Raises ConvertError."""
    paths = sorted(folder.glob("consolidated.*.pth")) if folder.is_dir() else []
    if not paths:
        raise ConvertError(f"{folder}: expected a folder with consolidated.00.pth and params.json")
    expected = [f"consolidated.{i:02}.pth" for i in range(len(paths))]
    if [path.name for path in paths] != expected:
        raise ConvertError(f"{folder}: {len(paths)} parts, but not {expected[0]} to {expected[-1]}")
    parts = [load(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.keys() != parts[0].keys():
            name = sorted(part.keys() ^ parts[0].keys())[0]
            raise ConvertError(f"{path}: tensor {name!r:.80} is in some parts and not in others")
    params = Params(folder)
    hidden = params.whole("dim")
    names = [name for name in parts[0] if name != "rope.freqs"]
    sources = [_join(folder, name, [part[name] for part in parts], hidden) for name in names]
    config = _config(params, {source.name: source for source in sources})
    return Model(config, assemble(folder, config, sources, interleaved=True), tokenizer_files(folder))


def _config(params: Params, sources: Mapping[str, Source]) -> dict[str, Any]:
    hidden, heads = params.whole("dim"), params.whole("n_heads")
    theta, scaled = params.get("rope_theta", 10000.0), bool(params.get("use_scaled_rope", False))
    try:  # params.json leaves them to the code (-1) or gives the formula of the MLP's size, not the size
        vocab_size = sources["model.embed_tokens.weight"].shape[0]
        inner = sources["model.layers.0.mlp.gate_proj.weight"].shape[0]
    except KeyError as error:
        raise ConvertError(f"{params.path.parent}: tensor {error} is missing") from error
    llama3 = vocab_size >= 128256
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": params.whole("n_layers"), "num_attention_heads": heads,
        "num_key_value_heads": params.whole("n_kv_heads", heads), "head_dim": params.whole("head_dim", hidden // heads),
        "hidden_act": "silu", "rms_norm_eps": params.get("norm_eps", 1e-5),
        "max_position_embeddings": _positions(params, llama3, scaled, theta), "rope_theta": theta,
        "tie_word_embeddings": "lm_head.weight" not in sources,
        "bos_token_id": 128000 if llama3 else 1, "eos_token_id": [128001, 128008, 128009] if llama3 else 2,
    }  # fmt: skip
    if scaled:
        # Llama 3.1 and 3.3 stretch by 8, the two text models of Llama 3.2 (hidden sizes 2048 and 3072) by 32.
        factor = params.get("rope_scaling_factor", 32 if hidden in (2048, 3072) else 8)
        config["rope_scaling"] = {
            "rope_type": "llama3", "factor": float(factor), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    params.finish(harmless=("multiple_of", "ffn_dim_multiplier", "vocab_size", "max_batch_size"))
    return config


def _positions(params: Params, llama3: bool, scaled: bool, theta: float) -> int:
    """How long a context the release was made for; only its code says so (Llama 1 is told from 2 by its norm_eps)."""
    if scaled:
        return 131072
    if llama3:
        return 8192
    if theta > 10000:
        return 16384  # Code Llama
    return 2048 if params.get("norm_eps") == 1e-6 else 4096


def _join(folder: Path, name: str, parts: list[LazyTensor], hidden: int) -> Source:
    """One tensor from its parts: row ranges, column ranges, or (norms) equal copies."""
    first = parts[0]
    if any(part.dtype != first.dtype or part.array.shape != first.array.shape for part in parts):
        raise ConvertError(f"{folder}: the parts of tensor {name} differ in shape or type")
    single, arrays = first.source(hf_name(folder, name)), [part.array for part in parts]
    shape = single.shape
    if len(parts) == 1 or len(shape) == 1:
        return single
    mappings = tuple(part.mapping for part in parts)
    # Llama 1 and 2 split the embedding's columns, Llama 3 its rows.
    by_columns = name.endswith(BY_COLUMNS) or (name == "tok_embeddings.weight" and shape[1] != hidden)
    if by_columns:
        def glue(index: Any) -> np.ndarray:
            return np.concatenate([array[index] for array in arrays], axis=1)

        return replace(single, shape=(shape[0], shape[1] * len(parts)), mappings=mappings, rows=glue)
    rows = shape[0]

    def take(index: Any) -> np.ndarray:
        wanted = np.arange(rows * len(arrays))[index]
        taken = np.empty((len(wanted), shape[1]), first.array.dtype)
        for i, array in enumerate(arrays):
            here = wanted // rows == i
            taken[here] = array[wanted[here] % rows]
        return taken

    return replace(single, shape=(rows * len(parts), shape[1]), mappings=mappings, rows=take)
