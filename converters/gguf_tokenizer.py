"""Rebuilds tokenizer.json and tokenizer_config.json from the `tokenizer.ggml.*` keys of a GGUF file."""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runtime.errors import ConvertError

SPACE = "▁"  # how sentencepiece writes a space
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp calls "default": three passes, each splitting the pieces of the one before.
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> (regexes, applied in turn; whole words in the vocabulary skip the merges; BOS by default)
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    **dict.fromkeys(("gpt-2", "gpt2"), ((GPT2_SPLIT,), False, False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), ((r"\p{N}", GPT2_SPLIT), False, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), ((LLAMA3_SPLIT,), True, True)),
    "tekken": ((TEKKEN_SPLIT,), True, True),
    "default": (DEFAULT_SPLITS, False, False),
}
# Control tokens that end a turn, whatever the file's eos_token_id says (llama.cpp stops at them too).
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")


class Kind(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def end_ids(values: dict[str, Any]) -> list[int]:
    """Every id that ends a turn: eos, eot and eom of the file, and the well-known control tokens of TURN_ENDS."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    typed = zip(values.get("tokenizer.ggml.tokens", []), values.get("tokenizer.ggml.token_type", []), strict=False)
    known = [i for i, (token, kind) in enumerate(typed) if kind == Kind.CONTROL and token in TURN_ENDS]
    return list(dict.fromkeys([values[key] for key in keys if key in values] + known))


def tokenizer_files(path: Path, values: dict[str, Any], vocab_size: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json as text. Raises ConvertError, also for tokenizers it cannot rebuild."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    model, tokens = ggml.get("model"), ggml.get("tokens", [])
    kinds = ggml.get("token_type") or [Kind.NORMAL] * len(tokens)
    if not 0 < len(tokens) <= vocab_size or len(kinds) != len(tokens):
        raise ConvertError(f"{path}: {len(tokens)} tokens and {len(kinds)} token types for {vocab_size} embedding rows")
    if len(set(tokens)) != len(tokens):
        repeated = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise ConvertError(f"{path}: the vocabulary holds {repeated!r} more than once")
    if model == "gpt2":
        tokenizer, adds_bos = _byte_level(path, ggml, tokens)
    elif model == "llama":
        tokenizer, adds_bos = _sentencepiece(path, ggml, tokens, kinds)
    else:
        raise ConvertError(f"{path}: tokenizer model {model!r} is not supported (gpt2 and llama are)")
    adds_bos = bool(ggml.get("add_bos_token", adds_bos)) and "bos_token_id" in ggml
    names = {f"{name}_token": tokens[ggml[f"{name}_token_id"]] for name in ("bos", "eos") if f"{name}_token_id" in ggml}
    ends = set(names.values())
    added = [
        {"id": i, "content": token, "special": kind != Kind.USER_DEFINED or token in ends,
         "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED) or token in ends
    ]  # fmt: skip
    tokenizer |= {"version": "1.0", "added_tokens": added, "post_processor": None}
    if adds_bos:
        tokenizer["post_processor"] = _prepend(names["bos_token"], ggml["bos_token_id"])
    text = json.dumps(tokenizer, ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConvertError(f"{path}: the rebuilt tokenizer is not valid: {error}") from error
    config: dict[str, Any] = {"add_bos_token": adds_bos, "clean_up_tokenization_spaces": False, **names}
    if template := values.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1)}


def _byte_level(path: Path, ggml: dict[str, Any], tokens: list[str]) -> tuple[dict[str, Any], bool]:
    if (pre := ggml.get("pre")) not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ConvertError(f"{path}: pre-tokenizer {pre!r} is not known (these are: {known})")
    splits, ignore_merges, adds_bos = PRE_TOKENIZERS[pre]
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in splits
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    merges = [merge.split(" ") for merge in ggml.get("merges", [])]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": _bpe(tokens, merges, ignore_merges=ignore_merges),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }, adds_bos


def _sentencepiece(
    path: Path, ggml: dict[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[dict[str, Any], bool]:
    scores, unknown = ggml.get("scores", []), ggml.get("unknown_token_id", 0)
    if len(scores) != len(tokens):
        raise ConvertError(f"{path}: {len(scores)} token scores for {len(tokens)} tokens")
    prefix = bool(ggml.get("add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    merges = merges_from_scores(tokens, scores, kinds)
    model = _bpe(tokens, merges, unknown=tokens[unknown], byte_fallback=Kind.BYTE in kinds)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [replace]},
        "pre_tokenizer": None,
        "model": model,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }, True


def merges_from_scores(tokens: list[str], scores: list[float], kinds: list[int]) -> list[list[str]]:
    """The merge list of a sentencepiece BPE model: each way to put a piece together, best-scored pieces first.

    Only normal pieces are ever merged: text that spells "</s>" must not become the control token.
    """
    normal = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == Kind.NORMAL}
    merges = [
        (-score, cut, token)
        for token, score in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    return [[token[:cut], token[cut:]] for _, cut, token in sorted(merges)]


def _bpe(
    tokens: list[str], merges: list[list[str]], *, unknown: str | None = None, byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": unknown is not None, "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges, "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
    }  # fmt: skip


def _prepend(token: str, token_id: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing", "single": [special, first], "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }  # fmt: skip
