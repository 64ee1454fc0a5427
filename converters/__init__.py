"""Converters from other checkpoint layouts to one self-describing safetensors file.

The file carries config.json, the tokenizer and the chat template in its own metadata (key: file name, value: its text;
tokenizer.model as base64), so that it can be moved and loaded alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from converters.model import Model
from converters.writer import check_target, write
from runtime.errors import ConvertError

KINDS = {
    "gguf": "a .gguf file of the llama architecture",
    "mistral": "a folder with Mistral's consolidated.safetensors and params.json",
    "meta": "a folder with Meta's consolidated.*.pth and params.json",
    "torch": "a Hugging Face folder with pytorch_model.bin, or its index and shards; also of a BERT encoder",
}
_MODULES = {"gguf": "gguf", "mistral": "mistral", "meta": "meta", "torch": "torch_bin"}


def convert(kind: str, source: str | Path, target: str | Path, *, dtype: str | None = None, force: bool = False) -> int:
    """Write `source` (see KINDS) as one safetensors file and return its size in bytes.

    `dtype` ("F16", "BF16" or "F32") is the type of the matrices; by default each keeps its own, quantized ones become
    F16. Vectors (norms, biases) always keep theirs. Raises ConvertError; nothing is left behind on failure.
    """
    source, target = Path(source), Path(target)
    check_target(source, target, force)
    if not source.exists():
        raise ConvertError(f"{source}: no such file or folder")
    read: Callable[[Path], Model] = import_module(f"converters.{_MODULES[kind]}").read
    try:
        return write(read(source), target, dtype)
    except OSError as error:
        raise ConvertError(f"{source} -> {target}: {error}") from error
