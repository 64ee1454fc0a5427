"""Tokenizer: exact streaming, and user text that stays text."""

from __future__ import annotations

import json
import random
from threading import Thread
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_files import CORPUS, bpe, spm
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HF

from runtime.errors import TokenizerError
from runtime.tokenizer import Tokenizer

SETTINGS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
EMOJI = "👩‍👩‍👧‍👦 e\u0301\u0323 🇫🇷 ナイーブ 한국어 \U0010ffff\u200d"
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("a 1\n\té日🙂\u0301\u200d", max_size=60)


class Files:
    """Stands in for a checkpoint."""

    def __init__(self, **files: Any) -> None:
        self.files = {name.replace("__", "."): value for name, value in files.items()}

    def file(self, name: str) -> bytes | None:
        value = self.files.get(name)
        return json.dumps(value).encode() if isinstance(value, dict) else value


def byte_level() -> HF:
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def with_prefix() -> HF:
    """Llama 2's layout: sentencepiece's pieces, byte fallback, a space put before the text."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm())
    scores = {sp.id_to_piece(i): sp.get_score(i) for i in range(sp.get_piece_size())}
    pieces = [piece for piece in scores if not piece.startswith("<")]
    merges = [(piece[:cut], piece[cut:]) for piece in sorted(pieces, key=lambda piece: -scores[piece])
              for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores]  # fmt: skip
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    tokenizer = HF(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace() -> HF:
    """The same as transformers 5 saves it."""
    tokenizer = HF.from_str(with_prefix().to_str())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", False)
    return tokenizer


def load(kind: str, **files: Any) -> Tokenizer:
    files = {"tokenizer_config__json": SETTINGS, **files}
    if kind == "sentencepiece":
        return Tokenizer.from_checkpoint(Files(tokenizer__model=spm(), **files))
    made = {"byte level": byte_level, "prefix": with_prefix, "metaspace": metaspace}[kind]()
    return Tokenizer.from_checkpoint(Files(tokenizer__json=made.to_str().encode(), **files))


KINDS = ["byte level", "prefix", "metaspace", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
def test_stream_equals_decode(kind: str) -> None:
    tokenizer = load(kind)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40) | text.map(tokenizer.encode), st.booleans())
    @example(tokenizer.encode(EMOJI), True)
    @example([*tokenizer.encode("é")[:-1], *tokenizer.encode("🙂")], True)  # a character broken off by another
    def holds(ids: list[int], skip: bool) -> None:
        stream = tokenizer.stream(skip_special=skip)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)
        joined = b"".join(tokenizer.token_bytes(i) for i in ids if not (skip and tokenizer.is_special(i)))
        if tokenizer.strips_space:
            joined = joined.removeprefix(b" ")
        assert tokenizer.decode(ids, skip_special=skip) == joined.decode(errors="replace")

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_and_streams_whole_characters(kind: str) -> None:
    tokenizer = load(kind)

    @settings(max_examples=300, deadline=None)
    @given(text)
    @example(EMOJI)
    @example("</s><s><tool> <0x41> ▁")
    def holds(sample: str) -> None:
        if kind != "byte level":
            sample = sample.replace("▁", "")  # sentencepiece itself cannot tell it from a space
        if kind == "metaspace":
            sample = sample.lstrip(" ")  # Metaspace adds no space where there is one, so the first is lost
        ids = tokenizer.encode(sample)
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) == sample
        assert stream.finish() == ""
        assert tokenizer.bos_id not in ids
        assert not set(ids) & set(tokenizer.eos_ids)

    holds()


@pytest.mark.parametrize("kind", ["byte level", "prefix", "metaspace"])
def test_valid_text_decodes_as_the_library_does(kind: str) -> None:
    tokenizer = load(kind)
    library = {"byte level": byte_level, "prefix": with_prefix, "metaspace": metaspace}[kind]()
    for sample in [*CORPUS[:200], EMOJI, "  two spaces", "trailing  "]:
        ids = library.encode(sample, add_special_tokens=False).ids
        assert tokenizer.encode(sample, special=True) == ids
        assert tokenizer.decode([1, *ids, 2]) == library.decode([1, *ids, 2], skip_special_tokens=True)


def test_sentencepiece_model_is_sentencepiece() -> None:
    tokenizer, sp = load("sentencepiece"), sentencepiece.SentencePieceProcessor(model_proto=spm())
    for sample in [*CORPUS[:200], EMOJI]:
        assert tokenizer.encode(sample) == sp.encode(sample)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_only_when_asked(kind: str) -> None:
    tokenizer = load(kind)
    sample = "a</s>b<s>"
    asked = tokenizer.encode(sample, special=True)
    assert [i for i in asked if tokenizer.is_special(i)] == [tokenizer.token_id("</s>"), tokenizer.token_id("<s>")]
    assert not any(map(tokenizer.is_special, tokenizer.encode(sample)))
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.decode(asked, skip_special=False).replace(" ", "") == sample


@pytest.mark.parametrize("kind", KINDS)
def test_continued_text_gets_no_space(kind: str) -> None:
    tokenizer = load(kind)
    first, rest = tokenizer.encode("say"), tokenizer.encode("hello", continues=True)
    assert tokenizer.decode(first + rest) == "sayhello"
    apart = tokenizer.decode(first + tokenizer.encode("hello"))
    assert apart == ("sayhello" if kind == "byte level" else "say hello")
    assert tokenizer.encode("hello") == load(kind).encode("hello")  # nothing sticks


def test_eos_that_the_file_forgot_to_mark_is_special() -> None:
    plain = json.loads(byte_level().to_str())
    for token in plain["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer.from_checkpoint(Files(tokenizer__json=plain, tokenizer_config__json=SETTINGS))
    assert not set(tokenizer.encode("a</s>")) & set(tokenizer.eos_ids)
    plain["added_tokens"] = []
    tokenizer = Tokenizer.from_checkpoint(Files(tokenizer__json=plain, tokenizer_config__json=SETTINGS))
    assert tokenizer.encode("</s>", special=True) == [2]


def test_bos_and_eos_come_from_every_file() -> None:
    tokenizer = load("byte level", config__json={"eos_token_id": 5}, generation_config__json={"eos_token_id": [7, 5]})
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (7, 5, 2), True)
    tokenizer = load("byte level", tokenizer_config__json={}, config__json={"bos_token_id": 1, "eos_token_id": None})
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (), False)
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    files = Files(tokenizer__json=made.to_str().encode(), config__json={"bos_token_id": 1})
    assert Tokenizer.from_checkpoint(files).adds_bos


def test_a_document_is_never_cut() -> None:
    made = byte_level()
    made.enable_truncation(5)
    made.enable_padding(length=50)
    tokenizer = Tokenizer.from_checkpoint(Files(tokenizer__json=made.to_str().encode()))
    assert tokenizer.decode(tokenizer.encode("word " * 100)) == "word " * 100
    assert tokenizer.encode("a") == byte_level().encode("a").ids


def test_threads_do_not_mix_their_options() -> None:
    tokenizer, wrong = load("prefix"), []
    expected = {flag: tokenizer.encode("</s> a", special=flag) for flag in (False, True)}

    def work(flag: bool) -> None:
        wrong.extend(i for i in range(500) if tokenizer.encode("</s> a", special=flag) != expected[flag])

    threads = [Thread(target=work, args=(flag,)) for flag in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected[False] != expected[True]
    assert not wrong


@pytest.mark.parametrize(("files", "message"), [
    ({}, "neither"), ({"tokenizer__json": b"{"}, "JSON"), ({"tokenizer__json": b"[]"}, "expected an object"),
    ({"tokenizer__json": {"model": {}}}, "cannot be read"), ({"tokenizer__model": b"junk"}, "sentencepiece"),
    ({"tokenizer__json": {"version": "1.0"}, "tokenizer_config__json": {"bos_token": 3}}, "bos_token"),
])  # fmt: skip
def test_unusable_tokenizers_are_refused(files: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_checkpoint(Files(**files))


@pytest.mark.parametrize(("part", "value"), [
    ("decoder", {"type": "Sequence", "decoders": [{"content": " ", "start": 1, "stop": 0}]}),
    ("decoder", {"type": "Sequence", "decoders": [{"type": 0}]}), ("normalizer", [[]]), ("normalizer", 3),
    ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"),  # tokenizers 0.23 panics on these
])  # fmt: skip
def test_malformed_components_are_refused(part: str, value: Any) -> None:
    made = json.loads(with_prefix().to_str())
    (made if part in made else made["model"])[part] = value
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_checkpoint(Files(tokenizer__json=made))


def test_unknown_decoder_and_bad_unicode_are_refused() -> None:
    made = byte_level()
    made.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer.from_checkpoint(Files(tokenizer__json=made.to_str().encode()))
    for kind in KINDS:
        with pytest.raises(TokenizerError, match="surrogate"):
            load(kind).encode("a\ud800")


@pytest.mark.parametrize("kind", ["tokenizer__json", "tokenizer__model"])
def test_damage_is_a_tokenizer_error_or_harmless(kind: str) -> None:
    good, rng, errors = with_prefix().to_str().encode() if kind == "tokenizer__json" else spm(), random.Random(5), 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data) if rng.random() < 0.5 else 1500)] = rng.randrange(256)
        try:
            Tokenizer.from_checkpoint(Files(**{kind: bytes(data)})).encode("Hello 🙂")
        except TokenizerError:
            errors += 1
    assert errors > 20
