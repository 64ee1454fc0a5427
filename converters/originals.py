"""What Meta's and Mistral's original releases share: tensor names, params.json, tokenizer files beside them."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from runtime.checkpoint import BASE64_FILES, FILES, parse_json_object, read_file
from runtime.errors import CheckpointError, ConvertError

NAMES = {
    "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip
OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


class Params:
    """params.json, read by key; a key that nobody asked for is refused, because it may change the arithmetic."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "params.json"
        self._values = read_object(self.path)
        self._seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise ConvertError(f"{self.path}: {key} is {value!r}, expected a positive whole number")
        return value

    def finish(self, harmless: tuple[str, ...] = ()) -> None:
        for key, value in self._values.items():
            if key not in self._seen and key not in harmless and value not in (None, False):
                raise ConvertError(f"{self.path}: {key} = {value!r:.80} is not supported")


def hf_name(path: Path, name: str) -> str:
    """Hugging Face's name of an original tensor."""
    base, _, kind = name.rpartition(".")
    if kind == "weight" and base in OUTER:
        return f"{OUTER[base]}.weight"
    match = re.fullmatch(r"layers\.(\d+)\.(\w+(?:\.\w+)?)", base)
    if kind == "weight" and match and match[2] in NAMES:
        return f"model.layers.{match[1]}.{NAMES[match[2]]}.weight"
    raise ConvertError(f"{path}: tensor {name!r:.80} does not belong to a Llama or Mistral model")


def files_beside(folder: Path, *, tokenizer: bool = True) -> dict[str, str]:
    """The tokenizer's and generation defaults' files, as the output's metadata carries them.

    Without `tokenizer`, what describes a vocabulary is left out: only the chat template and the defaults remain.
    """
    names = FILES if tokenizer else ("generation_config.json", "chat_template.jinja")
    found = {name: read_bytes(folder / name) for name in names if name != "config.json" and (folder / name).is_file()}
    if tokenizer and "tokenizer.json" not in found and "tokenizer.model" not in found:
        raise ConvertError(f"{folder}: there is neither tokenizer.json nor tokenizer.model; put one beside the weights")
    try:
        return {
            name: base64.b64encode(data).decode() if name in BASE64_FILES else data.decode()
            for name, data in found.items()
        }
    except UnicodeDecodeError as error:
        raise ConvertError(f"{folder}: a tokenizer file is not UTF-8 text: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConvertError."""
    try:
        return parse_json_object(read_bytes(path), str(path))
    except CheckpointError as error:
        raise ConvertError(str(error)) from error


def read_bytes(path: Path) -> bytes:
    """A small file. Raises ConvertError."""
    try:
        return read_file(path)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
