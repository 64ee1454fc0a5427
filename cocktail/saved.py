"""A document in a file: its text, ids, and exact K and V, to ask it in another process without reading it again.

The file is a safetensors file, so that any tool can look into it:

    kv        F16 (L, 2, G, n, D)   K and V of prefix and context in every layer, after RoPE
    ids       I32 (n,)              prefix and context
    text      U8                    the context, UTF-8
    sha256    U8 (L + 1, 32)        of what stands in the metadata with ids and text, then of every layer of kv

and its metadata says in JSON what it belongs to (_About). It is mapped into memory, not read.

What is checked when: on opening the header, all sizes, the version, model, tokenizer and chat template, and the
checksum of metadata, ids and text. A layer's checksum is computed when the first question brings that layer in, because
its bytes are read then anyway; gigabytes are never read for the checksum alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from runtime.checkpoint import SafetensorsFile
from runtime.errors import CheckpointError, DocumentError
from runtime.master import Master, shape_of

if TYPE_CHECKING:
    from cocktail.document import Document
    from cocktail.model import Model

VERSION = 1
_KEY = "cocktail-document"  # of the metadata
_TENSORS = {"kv": "F16", "ids": "I32", "text": "U8", "sha256": "U8"}


@dataclass(frozen=True)
class _About:
    """What the values were made with. prefix: tokens before the context."""

    version: int
    model: str
    tokenizer: str
    template: str
    chunk: int
    system: str | None
    prefix: int

    @classmethod
    def of(cls, model: Model, chunk: int, system: str | None, prefix: int) -> _About:
        config, weights = model.config, model.engine.weights.digest
        if not weights:
            raise DocumentError("the model's weights come from no checkpoint, so nothing says which model a saved "
                                "document would belong to")
        run = f"{weights} {config.rope} {config.rms_norm_eps} {config.sliding_window}"  # weights know nothing of these
        return cls(VERSION, hashlib.sha256(run.encode()).hexdigest()[:16], model.tokenizer.digest,
                   "none" if model.template is None else model.template.digest, chunk, system, prefix)


def save_document(document: Document, master: Master, path: str | Path) -> int:
    """Write the file and return its size in bytes; an existing one is replaced once the new one is complete.

    Raises DocumentError, also where the document was opened and is damaged; on any failure nothing is left behind.
    """
    model, path = document.model, Path(path)
    about = _About.of(model, document.chunk, document.system, len(document.prefix_ids))
    said = json.dumps(asdict(about))
    ids = np.array([*document.prefix_ids, *document.context_ids], "<i4")
    text = np.frombuffer(document.context.encode(), np.uint8)
    shape = shape_of(model.config, len(ids))
    sums = np.empty((shape[0] + 1, 32), np.uint8)
    sums[0] = _checksum(said.encode(), ids, text)
    with _written(path) as file:
        file.write(_header(said, shape, ids=ids, text=text, sha256=sums))
        for layer in range(shape[0]):
            data = master.layer(layer).reshape(-1).view(np.uint8)
            file.write(data.data)
            sums[layer + 1] = _checksum(data)
        for rest in (ids, text, sums):
            file.write(rest.tobytes())
        return file.tell()


def open_document(path: str | Path, model: Model) -> Document:
    """The document in the file, for the model that read it; on any backend.

    The file stays open, mapped into memory, as long as the document lives: replace it by renaming, never in place.
    Raises DocumentError where it is no such file, damaged, cut off, of another version, or made with another model,
    tokenizer or chat template. A layer that is damaged is found by the first question, before it answers.
    """
    from cocktail.document import Document

    try:
        file = SafetensorsFile(Path(path))
    except CheckpointError as error:
        raise DocumentError(str(error)) from error
    about, ids, text, sums = _contents(file)
    _check_same(path, about, _About.of(model, about.chunk, about.system, about.prefix))
    shape = shape_of(model.config, len(ids))
    if file.entries["kv"].shape != shape or sums.shape != (shape[0] + 1, 32):
        raise DocumentError(f"{path}: K and V have shape {file.entries['kv'].shape} with {len(sums)} checksums; this "
                            f"model's have {shape} with {shape[0] + 1}")
    document = Document(model, text, about.chunk, about.system, keep=False)
    if document.context_ids != ids[about.prefix :] or not all(0 <= i < model.config.vocab_size for i in ids):
        raise DocumentError(f"{path}: its ids are not those of its text; read the document again and save it anew")
    values = file.tensor("kv").data

    def check(layer: int) -> None:
        if not np.array_equal(_checksum(values[layer].reshape(-1)), sums[layer + 1]):
            raise DocumentError(f"{path}: layer {layer} is damaged: its checksum is not the one that was written; read "
                                "the document again and save it anew")

    document._adopt(ids, about.prefix, Master(model.backend, values, check))
    return document


def _contents(file: SafetensorsFile) -> tuple[_About, tuple[int, ...], str, npt.NDArray[np.uint8]]:
    """What the metadata says, the ids, the text and the checksums, all of them checked but for those of the layers."""
    said = file.metadata.get(_KEY)
    if said is None:
        raise DocumentError(f"{file.path}: a safetensors file, but no saved document: its metadata has no {_KEY}")
    about = _parsed(file.path, said)
    dtypes = {name: entry.dtype for name, entry in file.entries.items()}
    if dtypes != _TENSORS or any(len(file.entries[name].shape) != 1 for name in ("ids", "text")):
        raise DocumentError(f"{file.path}: damaged: it holds {dtypes}, expected {_TENSORS}")
    ids, text, sums = file.raw("ids").tobytes(), file.raw("text").tobytes(), np.array(file.raw("sha256"))
    if sums.size % 32 or not np.array_equal(sums[:32], _checksum(said.encode(), ids, text)):
        raise DocumentError(f"{file.path}: damaged: the checksum of its text, ids and description is not the one that "
                            "was written; read the document again and save it anew")
    return about, tuple(np.frombuffer(ids, "<i4").tolist()), text.decode(errors="replace"), sums.reshape(-1, 32)


def _parsed(path: Path, said: str) -> _About:
    try:
        found: Any = json.loads(said)
        about = _About(**{field.name: found[field.name] for field in fields(_About)})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DocumentError(f"{path}: the description in its metadata is damaged: {error!r}") from None
    if about.version != VERSION:
        raise DocumentError(f"{path}: a saved document of version {about.version!r}; expected {VERSION}; read the "
                            "document again and save it anew")
    if (type(about.chunk) is not int or type(about.prefix) is not int or about.prefix < 0
            or not isinstance(about.system, str | None)):
        raise DocumentError(f"{path}: the description in its metadata is damaged: {about}")
    return about


def _check_same(path: str | Path, found: _About, expected: _About) -> None:
    for part, what in (("model", "model"), ("tokenizer", "tokenizer"), ("template", "chat template")):
        theirs, ours = getattr(found, part), getattr(expected, part)
        if theirs != ours:
            raise DocumentError(f"{path}: saved with another {what}: its digest is {theirs}, this one's {ours}; load "
                                "the model that read it, or read the document again")


def _checksum(*parts: Any) -> npt.NDArray[np.uint8]:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return np.frombuffer(digest.digest(), np.uint8)


def _header(said: str, kv: tuple[int, ...], **tensors: npt.NDArray[Any]) -> bytes:
    """Of a safetensors file. kv: its shape. (The library's own writer wants all of it in memory at once.)"""
    entries: dict[str, Any] = {"__metadata__": {_KEY: said}}
    sizes = {"kv": (kv, 2 * math.prod(kv))} | {name: (tensor.shape, tensor.nbytes) for name, tensor in tensors.items()}
    end = 0
    for name, (shape, nbytes) in sizes.items():
        begin, end = end, end + nbytes
        entries[name] = {"dtype": _TENSORS[name], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % 64)  # the values begin at a cache line
    return len(header).to_bytes(8, "little") + header


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DocumentError(f"{path}: cannot be written: {error.strerror or error}") from error
