"""An encoder's folder as sentence-transformers or Hugging Face writes it: tokenizer, window, pooling and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from runtime.checkpoint import parse_json_object, read_file
from runtime.encoder import Pooling
from runtime.errors import CheckpointError, ScorerError, TokenizerError, UnsupportedEncoder

SLICE = 128  # texts tokenized at a time: a GPU works on the ones before meanwhile
_LEGACY_POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean",
                   "pooling_mode_max_tokens": "max", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
                   "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}
_NORMALIZER = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
               "tokenize_chinese_chars": "handle_chinese_chars"}  # tokenizer_config.json -> BertNormalizer


@dataclass(frozen=True)
class EncoderFolder:
    """What lies around an encoder's weights. A plain BERT folder, such as Contriever's, has none of it: mean pooling.

    weights: the folder with config.json and model.safetensors. max_length: ids of one text, special ones counted.
    normalize: whether embeddings have unit length. Prefixes go before every query and every passage.
    """

    weights: Path
    tokenizer: Tokenizer
    max_length: int
    pooling: Pooling
    normalize: bool
    query_prefix: str
    passage_prefix: str
    lower: bool

    @classmethod
    def open(cls, folder: Path) -> EncoderFolder:
        """Raises CheckpointError, TokenizerError, UnsupportedEncoder (what only sentence-transformers can run)."""
        weights, pooling, normalize = _modules(folder)
        sentence, settings = (_read(weights / f"{name}.json") for name in ("sentence_bert_config", "tokenizer_config"))
        library = _read(folder / "config_sentence_transformers.json")
        prompts = library.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise CheckpointError(f"{folder}: prompts in config_sentence_transformers.json are no texts by name")

        def prefix(*names: str) -> str:
            return next((prompts[name] for name in names if prompts.get(name)), "")

        positions = _read(weights / "config.json").get("max_position_embeddings")
        limits = [sentence.get("max_seq_length") or settings.get("model_max_length"), positions]
        max_length = min((int(limit) for limit in limits if isinstance(limit, int | float)), default=0)
        tokenizer = _tokenizer(weights / "tokenizer.json", settings)
        special = tokenizer.num_special_tokens_to_add(False)
        if max_length <= special:
            raise CheckpointError(f"{folder}: texts may have {max_length} ids, {special} of them special: no text fits")
        return cls(weights, tokenizer, max_length, pooling, normalize, prefix("query"),
                   prefix("document", "passage", "corpus"), bool(sentence.get("do_lower_case")))

    def passages(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Ids of each text with its prefix; one that is too long loses its end."""
        self.tokenizer.enable_truncation(self.max_length)
        for start in range(0, len(texts), SLICE):
            part = [self.passage_prefix + text for text in texts[start : start + SLICE]]
            yield from self._encode(part)

    def queries(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Ids of each text with its prefix. One that is too long keeps the prefix and its own end: the question itself
        usually comes last."""
        self.tokenizer.no_truncation()
        for text in texts:
            (ids,) = self._encode([self.query_prefix + text])
            if len(ids) > self.max_length:
                (prefix,) = self._encode([self.query_prefix])
                head = len(prefix) - (self.tokenizer.num_special_tokens_to_add(False) - 1)  # the closing ones not
                head = min(head, self.max_length // 2)
                ids = ids[:head] + ids[len(ids) - self.max_length + head :]
            yield ids

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [text.lower() if self.lower else text for text in texts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]


def encoder_path(model: str) -> Path | None:
    """The folder of that name, or that of a name in the local Hugging Face cache; None where it can be neither.

    Nothing is ever downloaded. Raises ScorerError for a name that is not in the cache.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if model.count("/") != 1 or model[0] in "/.~" or folder.exists():
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise ScorerError(f"encoder {model} is not in the local Hugging Face cache, and nothing is downloaded; "
                          "give its folder") from None


def _modules(folder: Path) -> tuple[Path, Pooling, bool]:
    """Where the weights are, how rows are pooled, and whether the result is normalized."""
    if not (folder / "modules.json").exists():
        return folder, "mean", False
    try:
        modules = [(str(module["type"]).rpartition(".")[2], str(module["path"]))
                   for module in json.loads(read_file(folder / "modules.json"))]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}/modules.json: expected a list of modules with type and path: {error!r}"
                              ) from None
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedEncoder(f"modules.json has {', '.join(kinds)}; the encoder kernels do Transformer, Pooling "
                                 "and Normalize")
    weights, pooling = (folder / path for _, path in modules[:2])
    for path in (weights, pooling):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder}/modules.json: {path} lies outside the folder")
    return weights, _pooling(_read(pooling / "config.json")), len(kinds) == 3


def _pooling(config: dict[str, Any]) -> Pooling:
    mode = config.get("pooling_mode", [name for key, name in _LEGACY_POOLING.items() if config.get(key)] or "mean")
    modes = [mode] if isinstance(mode, str) else mode
    if modes not in (["mean"], ["cls"]):
        raise UnsupportedEncoder(f"pooling is {modes}; the encoder kernels do mean and cls")
    if config.get("include_prompt") is False:
        raise UnsupportedEncoder("pooling leaves out the prompt; the encoder kernels pool over every token")
    return cast(Pooling, modes[0])


def _tokenizer(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer, with what tokenizer_config.json says of its normalizer, as Hugging Face's own loader has it."""
    if not path.exists():
        raise TokenizerError(f"{path}: no such file; save the tokenizer with a version of transformers that writes it")
    try:
        tokenizer = Tokenizer.from_buffer(read_file(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and BaseException where its Rust code panics
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    tokenizer.no_padding()
    if isinstance(tokenizer.normalizer, BertNormalizer):
        for key, attribute in _NORMALIZER.items():
            if key in settings:
                setattr(tokenizer.normalizer, attribute, settings[key])
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    return parse_json_object(read_file(path), str(path)) if path.exists() else {}
