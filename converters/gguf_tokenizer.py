"""Rebuilds the tokenizer from the `tokenizer.ggml.*` keys of a GGUF file."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

from converters.tokenizer_json import LLAMA3_SPLIT, byte_level, merges_from_scores, sentencepiece
from converters.tokenizer_json import tokenizer_files as build_files
from runtime.errors import ConvertError

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp calls "default": passes, each splitting the pieces of the one before.
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> (regexes, applied in turn; words in the vocabulary are taken whole; BOS by default)
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((GPT2_SPLIT,), False, False),
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
    """tokenizer.json and tokenizer_config.json as text. Raises ConvertError, also for what it cannot rebuild."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    model, tokens = ggml.get("model"), ggml.get("tokens", [])
    kinds = ggml.get("token_type") or [Kind.NORMAL] * len(tokens)
    if not 0 < len(tokens) <= vocab_size or len(kinds) != len(tokens):
        raise ConvertError(f"{path}: {len(tokens)} tokens, {len(kinds)} token types and {vocab_size} embedding rows")
    if len(set(tokens)) != len(tokens):
        repeated = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise ConvertError(f"{path}: the vocabulary holds {repeated!r} more than once")
    if model == "gpt2":
        if (pre := ggml.get("pre")) not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise ConvertError(f"{path}: pre-tokenizer {pre!r} is not known (these are: {known})")
        splits, whole_words, adds_bos = PRE_TOKENIZERS[pre]
        merges = [merge.split(" ") for merge in ggml.get("merges", [])]
        tokenizer = byte_level(tokens, merges, splits, whole_words)
    elif model == "llama":
        tokenizer, adds_bos = _sentencepiece(path, ggml, tokens, kinds), True
    else:
        raise ConvertError(f"{path}: tokenizer model {model!r} is not supported (gpt2 and llama are)")
    bos, eos = (_token(path, ggml, tokens, name) for name in ("bos", "eos"))
    added = {
        token: (i, kind != Kind.USER_DEFINED or token in (bos, eos))
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED) or token in (bos, eos)
    }
    adds_bos = bool(ggml.get("add_bos_token", adds_bos)) and bos is not None
    template = values.get("tokenizer.chat_template")
    return build_files(path, tokenizer, added, bos=bos, eos=eos, adds_bos=adds_bos, template=template)


def _sentencepiece(path: Path, ggml: dict[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    scores = ggml.get("scores", [])
    if len(scores) != len(tokens):
        raise ConvertError(f"{path}: {len(scores)} token scores for {len(tokens)} tokens")
    # Only normal pieces are ever merged: text that spells "</s>" must not become the control token.
    typed = zip(tokens, scores, kinds, strict=True)
    merges = merges_from_scores({token: score for token, score, kind in typed if kind == Kind.NORMAL})
    unknown = _token(path, ggml | {"unknown_token_id": ggml.get("unknown_token_id", 0)}, tokens, "unknown")
    prefix = bool(ggml.get("add_space_prefix", True))
    return sentencepiece(tokens, merges, str(unknown), Kind.BYTE in kinds, prefix)


def _token(path: Path, ggml: dict[str, Any], tokens: list[str], name: str) -> str | None:
    if (i := ggml.get(f"{name}_token_id")) is None:
        return None
    if not isinstance(i, int) or not 0 <= i < len(tokens):
        raise ConvertError(f"{path}: tokenizer.ggml.{name}_token_id is {i!r}, expected less than {len(tokens)}")
    return tokens[i]
