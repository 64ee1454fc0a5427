"""Builds tokenizer.json and tokenizer_config.json from a vocabulary: byte-level BPE, and sentencepiece's BPE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from runtime.errors import ConvertError

SPACE = "▁"  # how sentencepiece writes a space
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    tokens: Sequence[str], merges: list[list[str]], splits: Sequence[str], whole_words: bool
) -> dict[str, Any]:
    """GPT-2's scheme: `tokens` and `merges` in the byte alphabet, text cut by each regex of `splits` in turn.

    `whole_words`: a piece of text that is in the vocabulary is taken whole, without going through the merges.
    """
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in splits
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": _bpe(tokens, merges, ignore_merges=whole_words),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def sentencepiece(
    tokens: Sequence[str], merges: list[list[str]], unknown: str, byte_fallback: bool, prefix: bool
) -> dict[str, Any]:
    """Sentencepiece's scheme: no words, spaces as U+2581, and one put before the text if `prefix`."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [replace]},
        "pre_tokenizer": None,
        "model": _bpe(tokens, merges, unknown=unknown, byte_fallback=byte_fallback),
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def merges_from_scores(scores: Mapping[str, float]) -> list[list[str]]:
    """The merge list of a vocabulary that merges the best-scored piece first (sentencepiece scores, negated ranks).

    A piece that can be put together in several ways gets several merges: both algorithms ask only for the result.
    """
    merges = [
        (-score, cut, token)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return [[token[:cut], token[cut:]] for _, cut, token in sorted(merges)]


def byte_spelling() -> list[str]:
    """GPT-2's letter for each byte: printable Latin-1 as itself, the others in order from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_files(
    where: object, tokenizer: dict[str, Any], added: Mapping[str, tuple[int, bool]], *,
    bos: str | None, eos: str | None, adds_bos: bool, template: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """tokenizer.json and tokenizer_config.json as text. `added`: token -> (id, special). Raises ConvertError."""
    tokenizer = tokenizer | {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": special,
             "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            for token, (i, special) in sorted(added.items(), key=lambda item: item[1])
        ],
        "post_processor": _prepend(bos, added[bos][0]) if adds_bos and bos is not None else None,
    }  # fmt: skip
    text = json.dumps(tokenizer, ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConvertError(f"{where}: the rebuilt tokenizer is not valid: {error}") from error
    config: dict[str, Any] = {"add_bos_token": adds_bos, "clean_up_tokenization_spaces": False}
    names = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    config |= {key: value for key, value in names.items() if value is not None}
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1)}


def _bpe(
    tokens: Sequence[str], merges: list[list[str]], *, unknown: str | None = None, byte_fallback: bool = False,
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
