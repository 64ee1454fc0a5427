"""Rebuilt tokenizers cut text as the ones they were rebuilt from, and as llama.cpp does."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import (
    CONFIG,
    CORPUS,
    SPECIAL,
    bpe,
    save_meta,
    save_mistral,
    split,
    spm,
    vocabulary,
    weights,
    write_gguf,
)
from tokenizers import Tokenizer as HF
from tokenizers import pre_tokenizers

from converters import convert
from converters.gguf_tokenizer import GPT2_SPLIT, PRE_TOKENIZERS, TEKKEN_SPLIT
from converters.tokenizer_json import LLAMA3_SPLIT, byte_spelling
from runtime.checkpoint import Checkpoint
from runtime.tokenizer import Tokenizer

TEXTS = ["", " ", "\n", "a", "Hello, world!  It's 2024.\n\n\tdef f(x):  return x**2\r\n", "  lead", "trail   ",
         "日本語テキスト 🙂👍🏽 e\u0301\u0323", "١٢٣ ½ ⅷ 12345", "DON'T don't I'LL\u00a0we\u3000they",
         "<s>x</s> <|im_start|>", "aaaaaaaaaaaaaa", "x" * 300, "\x00\x7f\u200d\ufeff"]  # fmt: skip
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("ab 1'\n\té日🙂", max_size=60)


def rebuilt(tmp_path: Path, **options: Any) -> tuple[Tokenizer, HF]:
    source = write_gguf(tmp_path / "m.gguf", weights(), **options)
    convert("gguf", source, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    return Tokenizer.from_checkpoint(checkpoint), HF.from_buffer(checkpoint.file("tokenizer.json"))


PRE = {
    "smollm": None, "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False), "llama-bpe": split(LLAMA3_SPLIT),
    "tekken": split(TEKKEN_SPLIT),
}  # fmt: skip


@pytest.mark.parametrize("pre", PRE)
def test_bpe_is_the_tokenizer_that_went_in(tmp_path: Path, pre: str) -> None:
    """Rebuilt from GGUF, it cuts text as the tokenizer it came from (for SmolLM, Digits and ByteLevel)."""
    original = bpe(PRE[pre])
    _, again = rebuilt(tmp_path, tokenizer=original, pre=pre)

    @settings(max_examples=200, deadline=None)
    @given(text)
    def same(sample: str) -> None:
        assert again.encode(sample, add_special_tokens=False).ids == original.encode(sample).ids

    same()
    for sample in TEXTS:
        assert again.encode(sample, add_special_tokens=False).ids == original.encode(sample).ids
        assert again.decode(original.encode(sample).ids) == original.decode(original.encode(sample).ids)


def test_bos_default_depends_on_the_pre_tokenizer(tmp_path: Path) -> None:
    for pre, explicit, expected in (("smollm", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False)):
        folder = tmp_path / f"{pre}{explicit}"
        folder.mkdir()
        keys = {} if explicit is None else {"add_bos_token": explicit}
        tokenizer, again = rebuilt(folder, pre=pre, **keys)
        assert tokenizer.adds_bos is expected
        assert again.encode("a").ids[:1] == ([1] if expected else again.encode("a", add_special_tokens=False).ids[:1])


def add_spm(model: bytes) -> Any:
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    n = range(sp.get_piece_size())

    def kind(i: int) -> int:
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([sp.id_to_piece(i) for i in n])
        writer.add_token_scores([sp.get_score(i) for i in n])
        writer.add_token_types([kind(i) for i in n])

    return add


def test_spm_equals_sentencepiece(tmp_path: Path) -> None:
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm())
    tokenizer, _ = rebuilt(tmp_path, tokenizer=add_spm(spm()))

    @settings(max_examples=300, deadline=None)
    @given(text)
    def same(sample: str) -> None:
        ids = tokenizer.encode(sample)
        assert ids == sp.encode(sample)
        assert tokenizer.decode(ids) == sample

    same()
    for sample in [*TEXTS, "\n".join(CORPUS)]:
        assert tokenizer.encode(sample) == sp.encode(sample)
    assert tokenizer.adds_bos


def llama_cpp_tokens(path: Path) -> Any:
    """llama.cpp's own tokenizer of a GGUF file, where its wheel can be loaded."""
    bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings")
    try:
        ffi, lib = bindings.get_ffi(), bindings.get_lib()
    except RuntimeError as error:
        pytest.skip(f"llama.cpp cannot be loaded: {error}")
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    assert model != ffi.NULL
    vocab = lib.llama_model_get_vocab(model)

    def encode(sample: str, special: bool) -> list[int]:
        data = sample.encode()
        out = ffi.new(f"llama_token[{len(data) + 16}]")
        count = lib.llama_tokenize(vocab, data, len(data), out, len(data) + 16, False, special)
        return list(out[0:count])

    return encode


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, "llama (sentencepiece)"])
def test_tokenizers_equal_llama_cpp(tmp_path: Path, pre: str) -> None:
    options: dict[str, Any] = {"pre": pre, "tokenizer": bpe(split(GPT2_SPLIT))}
    if pre not in PRE_TOKENIZERS:
        options = {"tokenizer": add_spm(spm())}
    tokenizer, _ = rebuilt(tmp_path, **options)
    encode = llama_cpp_tokens(tmp_path / "m.gguf")

    @settings(max_examples=300, deadline=None)
    @given(text, st.booleans())
    def same(sample: str, special: bool) -> None:
        sample = sample.replace("\x00", "")  # ends a string in C
        assert tokenizer.encode(sample, special=special) == encode(sample, special)

    same()
    for sample in TEXTS[:-1]:
        for special in (False, True):
            assert tokenizer.encode(sample, special=special) == encode(sample, special), sample


def ranked_tokens(original: HF) -> list[bytes]:
    spelling = {char: byte for byte, char in enumerate(byte_spelling())}
    tokens, kinds, _ = vocabulary(original)
    return [bytes(spelling[char] for char in token) for token, kind in zip(tokens, kinds, strict=True) if kind == 1]


def test_tiktoken_model_of_llama3(tmp_path: Path) -> None:
    original = bpe(split(LLAMA3_SPLIT))
    tokens = ranked_tokens(original)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    config = CONFIG | {"vocab_size": len(tokens) + 256}
    save_meta(tmp_path, weights(config), 1, config)
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    convert("meta", tmp_path, tmp_path / "m.safetensors")
    tokenizer = Tokenizer.from_checkpoint(Checkpoint.open(tmp_path / "m.safetensors"))
    for sample in TEXTS:
        assert tokenizer.encode(sample) == [i - len(SPECIAL) for i in plain(original).encode(sample).ids]
    assert tokenizer.encode("<|eot_id|>", special=True) == [len(tokens) + 9]
    assert (tokenizer.adds_bos, tokenizer.bos_id) == (True, len(tokens))


def test_tekken_of_mistral(tmp_path: Path) -> None:
    original = bpe(split(TEKKEN_SPLIT))
    tokens = ranked_tokens(original)
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)]
    config = CONFIG | {"vocab_size": len(tokens) + 30}
    sizes = {"default_vocab_size": len(tokens) + 30, "default_num_special_tokens": 30}
    beyond = {"rank": len(vocab), "token_bytes": "/////w=="}  # past default_vocab_size: not part of the model
    tekken = {"config": {"pattern": TEKKEN_SPLIT} | sizes, "vocab": [*vocab, beyond]}
    save_mistral(tmp_path, weights(config), config)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    convert("mistral", tmp_path, tmp_path / "m.safetensors")
    tokenizer = Tokenizer.from_checkpoint(Checkpoint.open(tmp_path / "m.safetensors"))
    for sample in TEXTS:
        assert tokenizer.encode(sample) == [i - len(SPECIAL) + 30 for i in plain(original).encode(sample).ids]
    assert tokenizer.encode("[INST]", special=True) == [3]


def plain(tokenizer: HF) -> HF:
    tokenizer.encode_special_tokens = True
    return tokenizer


