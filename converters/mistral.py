"""Mistral's own release: consolidated.safetensors (or its shards) beside params.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from converters.model import Model, Source, assemble, mappings_of
from converters.originals import Params, hf_name
from converters.rank_tokenizer import tokenizer_files
from runtime.checkpoint import SafetensorsFile
from runtime.errors import CheckpointError, ConvertError

POSITIONS = 32768  # Mistral 7B v0.1 to v0.3, whose params.json does not say


def read(folder: Path) -> Model:
    """Open the release as a Model; its tensors stay in the memory map. Raises ConvertError."""
    paths = sorted(folder.glob("consolidated*.safetensors")) if folder.is_dir() else []
    if not paths:
        raise ConvertError(f"{folder}: expected a folder with consolidated.safetensors and params.json")
    params = Params(folder)
    try:
        sources = [_source(file, name) for file in map(SafetensorsFile, paths) for name in file.entries]
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    tied = not any(source.name == "lm_head.weight" for source in sources)
    config = _config(params, tied)
    files = tokenizer_files(folder)
    return Model(config, assemble(folder, config, sources, interleaved=True), files)


def _config(params: Params, tied: bool) -> dict[str, Any]:
    hidden, heads = params.whole("dim"), params.whole("n_heads")
    window = params.get("sliding_window")
    if params.get("tied_embeddings", tied) is not tied:
        raise ConvertError(f"{params.path}: tied_embeddings contradicts the tensors: output.weight is "
                           f"{'missing' if tied else 'there'}")  # fmt: skip
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": params.whole("vocab_size"),
        "hidden_size": hidden, "intermediate_size": params.whole("hidden_dim"),
        "num_hidden_layers": params.whole("n_layers"), "num_attention_heads": heads,
        "num_key_value_heads": params.whole("n_kv_heads", heads), "head_dim": params.whole("head_dim", hidden // heads),
        "hidden_act": "silu", "rms_norm_eps": params.get("norm_eps", 1e-5),
        "max_position_embeddings": params.whole("max_seq_len", params.whole("max_position_embeddings", POSITIONS)),
        "rope_theta": params.get("rope_theta", 10000.0), "sliding_window": window, "tie_word_embeddings": tied,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if params.get("causal", True) is not True:
        raise ConvertError(f"{params.path}: causal is false; only causal models are supported")
    params.finish()
    return config


def _source(file: SafetensorsFile, name: str) -> Source:
    tensor = file.tensor(name)
    data: np.ndarray = tensor.data
    return Source(hf_name(file.path, name), data.shape, tensor.dtype, data.__getitem__, mappings=mappings_of(data))
