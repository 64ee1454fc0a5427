"""Tokenizers stored as ranked byte strings: Llama 3's tokenizer.model (tiktoken's format), Mistral's tekken.json."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from converters.originals import files_beside, read_bytes, read_object
from converters.tokenizer_json import LLAMA3_SPLIT, byte_level, byte_spelling, merges_from_scores
from converters.tokenizer_json import tokenizer_files as build_files
from runtime.errors import ConvertError

_LLAMA3_NAMED = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
LLAMA3_SPECIAL = _LLAMA3_NAMED + tuple(f"<|reserved_special_token_{i}|>" for i in range(3, 248))
TEKKEN_SPECIAL = (  # of files that do not list their own
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The tokenizer files beside an original release, ranked ones rebuilt as tokenizer.json. Raises ConvertError."""
    if (folder / "tokenizer.json").is_file():
        return files_beside(folder)
    model, tekken = folder / "tokenizer.model", folder / "tekken.json"
    try:
        if tekken.is_file():
            return _tekken(tekken) | files_beside(folder, tokenizer=False)
        if model.is_file() and re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", data := read_bytes(model)):
            return _tiktoken(model, data) | files_beside(folder, tokenizer=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConvertError(f"{folder}: the tokenizer's file is malformed: {error!r:.200}") from error
    return files_beside(folder)


def _tiktoken(path: Path, data: bytes) -> dict[str, str]:
    """Llama 3: one token per line in base64 with its rank, the id; the special tokens follow in a fixed order."""
    ranked = [line.split() for line in data.splitlines() if line]
    tokens = [base64.b64decode(token, validate=True) for token, _ in ranked]
    if [int(rank) for _, rank in ranked] != list(range(len(ranked))):
        raise ConvertError(f"{path}: ranks are not 0, 1, 2, ... in order")
    special = {token: len(tokens) + i for i, token in enumerate(LLAMA3_SPECIAL)}
    return _build(path, tokens, 0, special, LLAMA3_SPLIT, LLAMA3_SPECIAL[0], LLAMA3_SPECIAL[1])


def _tekken(path: Path) -> dict[str, str]:
    """Mistral: special tokens take the first ids, the ranked tokens follow, cut to the configured vocabulary."""
    value: dict[str, Any] = read_object(path)
    config = value["config"]
    n_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
    tokens = [base64.b64decode(item["token_bytes"], validate=True) for item in value["vocab"][: size - n_special]]
    listed = value.get("special_tokens") or [{"rank": i, "token_str": text} for i, text in enumerate(TEKKEN_SPECIAL)]
    special = {item["token_str"]: item["rank"] for item in listed}
    special |= {f"<SPECIAL_{i}>": i for i in range(n_special) if i not in set(special.values())}
    return _build(path, tokens, n_special, special, config["pattern"], "<s>", "</s>")


def _build(
    path: Path, tokens: list[bytes], first: int, special: dict[str, int], split: str, bos: str, eos: str
) -> dict[str, str]:
    spelling = byte_spelling()
    spelled = ["".join(spelling[byte] for byte in token) for token in tokens]
    ids = {token: first + i for i, token in enumerate(spelled)} | special
    vocabulary = sorted(ids, key=ids.__getitem__)
    if sorted(ids.values()) != list(range(len(tokens) + len(special))):
        raise ConvertError(f"{path}: tokens are repeated or their ids have gaps")
    merges = merges_from_scores({token: -float(rank) for rank, token in enumerate(spelled)})
    tokenizer = byte_level(vocabulary, merges, (split,), whole_words=True)
    added = {token: (i, True) for token, i in special.items()}
    return build_files(path, tokenizer, added, bos=bos, eos=eos, adds_bos=True)
