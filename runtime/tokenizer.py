"""Text to token ids and back, from tokenizer.json (`tokenizers`) or tokenizer.model (`sentencepiece`, an extra).

Decoding is defined on bytes: every id stands for a fixed byte string, ids are joined, and the whole is read as UTF-8
with U+FFFD for invalid sequences. A stream therefore yields exactly what decode() yields, however it is cut.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any, Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from runtime.errors import TokenizerError

SPACE = "▁"  # how sentencepiece writes a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Files(Protocol):
    """What a tokenizer needs of a checkpoint: its small files by name (Checkpoint.file)."""

    def file(self, name: str) -> bytes | None: ...


class Tokenizer:
    """A tokenizer without hidden behaviour: encode() never adds BOS or EOS, decode() never tidies spaces."""

    def __init__(
        self, model: _Model, settings: Mapping[str, Any], bos_id: int | None, eos_ids: tuple[int, ...], digest: str
    ) -> None:
        """digest: 16 hex digits of the file that it was read from."""
        flag = settings.get("add_bos_token")
        self._model = model
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.adds_bos: bool = bos_id is not None and (flag if isinstance(flag, bool) else model.starts_with(bos_id))
        self.vocab_size = model.vocab_size
        self.digest = digest

    @classmethod
    def from_checkpoint(cls, checkpoint: Files) -> Tokenizer:
        """Read it through checkpoint.file(...). Raises TokenizerError if it is missing, damaged or unsupported."""
        settings = read_json(checkpoint, "tokenizer_config.json")
        config, generation = (read_json(checkpoint, f"{name}.json") for name in ("config", "generation_config"))
        names = {key: token_text(settings, f"{key}_token") for key in ("bos", "eos")}
        model: _Model
        if (data := checkpoint.file("tokenizer.json")) is not None:
            model = _Fast(data, {name for name in names.values() if name})
        elif (data := checkpoint.file("tokenizer.model")) is not None:
            model = _SentencePiece(data, settings)
        else:
            raise TokenizerError("there is neither tokenizer.json nor tokenizer.model; put one beside the weights")
        bos_id = model.token_id(names["bos"]) if names["bos"] else config.get("bos_token_id")
        eos = [i for source in (generation, config) for i in _as_list(source.get("eos_token_id"))]
        eos += _as_list(model.token_id(names["eos"]) if names["eos"] else None)
        if not all(isinstance(i, int) for i in [*eos, *_as_list(bos_id)]):
            raise TokenizerError(f"bos_token_id {bos_id!r} and eos_token_id {eos!r} must be token ids")
        return cls(model, settings, bos_id, tuple(dict.fromkeys(eos)), hashlib.sha256(data).hexdigest()[:16])

    def encode(self, text: str, *, special: bool = False, continues: bool = False) -> list[int]:
        """Ids of `text`; no BOS or EOS is added.

        `special`: strings of special tokens in the text become their ids; otherwise they are ordinary text.
        `continues`: the text follows other text directly, so no sentencepiece space is put before it.
        """
        try:
            text.encode()  # the libraries would fail without a reason, or replace a lone surrogate silently
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode (a lone surrogate at {error.start})") from error
        return self._model.encode(text, special, continues)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Ids that no token has (padding rows of an embedding) are empty."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A detokenizer for ids that come one by one."""
        return TextStream(self, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; b"" if there is no such token."""
        return self._model.token_bytes(token_id)

    def token_id(self, token: str) -> int | None:
        """Id of a token given as the vocabulary spells it, or None."""
        return self._model.token_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether decode() skips this id by default."""
        return token_id in self._model.special_ids

    @property
    def strips_space(self) -> bool:
        """Whether a space at the very start of a decoded text belongs to the tokenizer, not to the text."""
        return self._model.strips_space


class TextStream:
    """Turns ids into text as they come. All pushes and finish() joined equal decode() of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_space

    def push(self, token_id: int) -> str:
        """Text that is certain after this id; "" while a character is incomplete."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._strip:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD for an incomplete character, else ""."""
        return self._utf8.decode(b"", final=True)


def read_json(checkpoint: Files, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint; {} if the file is not there. Raises TokenizerError if it is damaged."""
    if (data := checkpoint.file(name)) is None:
        return {}
    return _parse(data, name)


def token_text(settings: Mapping[str, Any], key: str) -> str | None:
    """A token of tokenizer_config.json, which writes it as a string or as {"content": string}."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"tokenizer_config.json: {key} is {value!r}, expected a string")
    return value


class _Model(Protocol):
    vocab_size: int
    special_ids: frozenset[int]
    strips_space: bool

    def encode(self, text: str, special: bool, continues: bool) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def token_id(self, token: str) -> int | None: ...
    def starts_with(self, token_id: int) -> bool: ...


class _Fast:
    """tokenizer.json."""

    def __init__(self, data: bytes, ends: set[str]) -> None:
        parts = _parse(data, "tokenizer.json")
        self._tokenizer = _build(parts, data, ends)
        self._lock = Lock()  # encode() sets the tokenizer up before it runs
        self._full = (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer)
        self._bare = _without_prefix(parts)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content.encode() for i, token in added.items()}
        self._to_bytes, self.strips_space = _decoder(_steps(parts.get("decoder"), "decoders"))

    def encode(self, text: str, special: bool, continues: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not special
            if self._bare:
                self._tokenizer.normalizer, self._tokenizer.pre_tokenizer = self._bare if continues else self._full
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        if (data := self._added.get(token_id)) is not None:
            return data
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return b"" if token is None else self._to_bytes(token)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def starts_with(self, token_id: int) -> bool:
        return self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [token_id]


class _SentencePiece:
    """tokenizer.model."""

    def __init__(self, data: bytes, settings: Mapping[str, Any]) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            message = "tokenizer.model needs the sentencepiece package: pip install 'cocktail-kv[sentencepiece]'"
            raise TokenizerError(message) from error
        try:
            self._processor = SentencePieceProcessor(model_proto=data)
            # Protobuf messages merge when joined: this sets normalizer_spec (field 3) .add_dummy_prefix (field 3) to 0.
            self._bare = SentencePieceProcessor(model_proto=data + bytes([3 << 3 | 2, 2, 3 << 3, 0]))
            pieces = {i: self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())}
        except (RuntimeError, ValueError) as error:
            raise TokenizerError(f"tokenizer.model is not a sentencepiece model: {error}") from error
        special = {i for i in pieces if self._processor.is_control(i) or self._processor.is_unknown(i)}
        self._added: dict[int, str] = {}  # what tokenizer_config.json adds to the model's own pieces
        try:
            for key, token in settings.get("added_tokens_decoder", {}).items():
                self._added[int(key)] = str(token["content"])
                special |= {int(key)} if token.get("special") else set()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder is malformed: {error!r}") from error
        self._pieces = pieces | self._added
        self._ids = {piece: i for i, piece in self._pieces.items()}
        self.vocab_size = max(self._pieces) + 1
        self.special_ids = frozenset(special)
        self.strips_space = self._processor.encode("a") != self._bare.encode("a")
        self._plain_tokens = _alternation(self._added[i] for i in self._added.keys() - special - pieces.keys())
        self._all_tokens = _alternation(self._pieces[i] for i in special | self._added.keys())

    def encode(self, text: str, special: bool, continues: bool) -> list[int]:
        tokens = self._all_tokens if special else self._plain_tokens
        ids: list[int] = []
        for i, part in enumerate(tokens.split(text) if tokens else [text]):
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                ids += (self._bare if continues and not i else self._processor).encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None or token_id in self._added or token_id in self.special_ids:
            return (piece or "").encode()
        return _piece_bytes(piece)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def starts_with(self, token_id: int) -> bool:
        return token_id == self._processor.bos_id()  # the convention of Llama and Mistral models


def _build(parts: dict[str, Any], data: bytes, ends: set[str]) -> FastTokenizer:
    """The tokenizer, with `ends` (BOS, EOS) as special tokens even where the file forgot to say so."""
    added, model = parts.get("added_tokens") or [], parts.get("model")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model, dict) and model.get(key):  # the library panics on words shorter than these
            raise TokenizerError(f"tokenizer.json: {key} {model[key]!r:.80} is not supported")
    try:
        wrong = [token for token in added if token["content"] in ends and not token["special"]]
        for token in wrong:
            token["special"] = True
        tokenizer = FastTokenizer.from_str(json.dumps(parts)) if wrong else FastTokenizer.from_buffer(data)
        missing = ends - {token["content"] for token in added}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and BaseException where its Rust code panics
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
    missing = {token for token in missing if tokenizer.token_to_id(token) is not None}
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(missing)])
    tokenizer.no_truncation()  # a document is never cut or filled up
    tokenizer.no_padding()
    return tokenizer


def _without_prefix(parts: dict[str, Any]) -> tuple[Any, Any] | None:
    """Normalizer and pre-tokenizer that put no space before the text; None if the tokenizer's own put none."""
    normalizers = _steps(parts.get("normalizer"), "normalizers")
    pre_tokenizers = _steps(parts.get("pre_tokenizer"), "pretokenizers")
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    bare = [_no_prefix(step) for step in pre_tokenizers]
    if kept == normalizers and bare == pre_tokenizers:
        return None
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = FastTokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
        "decoder": None, "model": empty, "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": bare} if bare else None,
    }))  # fmt: skip
    return tokenizer.normalizer, tokenizer.pre_tokenizer


def _no_prefix(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if step["type"] == "ByteLevel" else step


def _decoder(steps: list[dict[str, Any]]) -> tuple[Callable[[str], bytes], bool]:
    """How a token's spelling becomes bytes, and whether the first space of a text is dropped."""
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level_bytes, False
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _piece_bytes, any(step["type"] == "Strip" and step["start"] > 0 for step in steps)
    known = "ByteLevel and sentencepiece's are"
    raise TokenizerError(f"tokenizer.json: decoder {sorted(kinds)} is not supported ({known})")


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_LEVEL[char] for char in token)
    except KeyError:  # not spelt in the byte alphabet: the token is its own text
        return token.encode()


def _piece_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the other bytes in order from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_alphabet()


def _steps(component: Any, key: str) -> list[dict[str, Any]]:
    """A component of tokenizer.json as a flat list, Sequences opened."""
    if component is None:
        return []
    if not isinstance(component, dict) or not isinstance(component.get("type"), str):
        raise TokenizerError(f"tokenizer.json: expected an object with a type among the {key}, got {component!r:.80}")
    return [step for part in component[key] for step in _steps(part, key)] if key in component else [component]


def _alternation(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern whose split() puts every token at an odd index; longest first, so that no token hides another."""
    escaped = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token]
    return re.compile(f"({'|'.join(escaped)})") if escaped else None


def _parse(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} holds {type(value).__name__}, expected an object")
    return value


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
