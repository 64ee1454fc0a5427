"""A random Llama of a few thousand weights with a tokenizer and a chat template of its own, for end-to-end tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from converters.model import tensor_shapes
from runtime.config import ModelConfig

HANDBOOK = (Path(__file__).parents[1] / "examples/handbook.txt").read_text(encoding="utf-8")
SPECIAL = ["<|end|>", "<|start|>"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 400, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 0,
}
TEMPLATE = ("{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")


def save_tiny_model(folder: Path, name: str = "tiny.safetensors", template: str | None = TEMPLATE,
                    dtype: Any = np.float32, **changes: Any) -> Path:
    """Writes one self-describing safetensors file and returns its path. template None: a model without one. dtype: of
    its matrices. changes: to its config.json."""
    config = CONFIG | changes
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([HANDBOOK], trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    settings = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[0], "add_bos_token": False}
    if template is not None:
        settings["chat_template"] = template
    rng = np.random.default_rng(0)
    tensors = {tensor: (rng.standard_normal(shape) * 0.2).astype(dtype) if len(shape) == 2
               else np.ones(shape, np.float32)
               for tensor, shape in tensor_shapes(ModelConfig.from_json(config)).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={
        "config.json": json.dumps(config), "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings)})
    return folder / name
