"""Checkpoints: memory-mapped safetensors whose every read states the name, shape and dtype it expects.

A checkpoint is one of
- a self-describing file: a .safetensors that carries config.json, and whichever tokenizer files there are, in its own
  metadata (key = file name, value = its text; tokenizer.model as base64). It is complete: files that happen to lie
  beside it are not looked at, so that it cannot be paired with another model's tokenizer by where it is kept;
- a plain .safetensors with config.json and the tokenizer beside it;
- a sharded *.safetensors.index.json with its shards and the other files beside it;
- a folder that holds one of these.

Files are input, not trusted: whatever is wrong with one, the outcome is a CheckpointError that says what was expected
and what was found. The exception is a file that shrinks while it is mapped, which no reader can guard against:
replace a checkpoint by renaming a new file over it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import mmap
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.config import ModelConfig
from runtime.errors import CheckpointError

# What Checkpoint.file gives and a self-describing file may carry.
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
         "special_tokens_map.json", "chat_template.jinja")
BASE64_FILES = ("tokenizer.model",)  # binary, so base64 in metadata


@dataclass(frozen=True)
class Tensor:
    """One tensor as stored. `data` keeps the mapping alive: it outlives the checkpoint it came from."""

    name: str
    dtype: str  # "F32" | "F16" | "BF16"
    data: npt.NDArray[Any]  # read-only; float32, float16, or uint16 for BF16


class Checkpoint:
    """A model's configuration, files and tensors. A context manager; closing it leaves tensors already read valid."""

    config: ModelConfig
    digest: str  # 16 hex digits: headers, sizes, config.json and each tensor's first bytes

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """The checkpoint at `path`: a .safetensors, a *.safetensors.index.json, or a folder. Raises CheckpointError."""
        source = _find(Path(path))
        if source.name.endswith(".index.json"):
            owner = _open_shards(source)
            metadata: dict[str, str] = {}
        else:
            single = SafetensorsFile(source)
            owner = dict.fromkeys(single.entries, single)
            metadata = single.metadata if "config.json" in single.metadata else {}
        return cls(source, owner, metadata)

    def __init__(self, path: Path, owner: dict[str, SafetensorsFile], metadata: dict[str, str]) -> None:
        """`owner`: tensor name -> the file that holds it. Use Checkpoint.open."""
        self.path = path
        self._owner = owner
        self._metadata = metadata  # {} unless self-describing
        self._unread = set(owner)
        self._closed = False
        config = self.file("config.json")
        if config is None:
            raise CheckpointError(f"{path}: config.json is missing: expected it in {path.parent} or in the file's own "
                                  "metadata")
        generation = self.file("generation_config.json")
        self.config = ModelConfig.from_json(
            parse_json_object(config, "config.json"),
            None if generation is None else parse_json_object(generation, "generation_config.json"))
        files = sorted(set(owner.values()), key=lambda file: file.path.name)
        self.digest = hashlib.blake2b(config + b"".join(file.digest for file in files), digest_size=8).hexdigest()

    @property
    def nbytes(self) -> int:
        """Of all tensors, as they are stored."""
        entries = (file.entries[name] for name, file in self._owner.items())
        return sum(entry.end - entry.begin for entry in entries)

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._owner)

    def read(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = ("F32", "F16", "BF16")) -> Tensor:
        """The named tensor, a view of the mapping. Raises CheckpointError if it is missing or not as stated."""
        if self._closed:
            raise CheckpointError(f"{self.path}: closed, cannot read {name!r}")
        if name not in self._owner:
            example = f", such as {min(self._owner)!r:.80}" if self._owner else ""
            raise CheckpointError(f"{self.path}: tensor {name!r} of shape {list(shape)} is missing; there are "
                                  f"{len(self._owner)} others{example}")
        file = self._owner[name]
        entry = file.entries[name]
        if entry.shape != shape:
            raise CheckpointError(f"{file.path}: tensor {name!r}: expected shape {list(shape)}, "
                                  f"got {list(entry.shape)}")
        if entry.dtype not in dtypes:
            raise CheckpointError(f"{file.path}: tensor {name!r}: expected {' or '.join(dtypes)}, got {entry.dtype}; "
                                  "save it in one of those")
        self._unread.discard(name)
        return file.tensor(name)

    def finish(self) -> None:
        """Call after the last read: CheckpointError if a tensor was left over that the model should have used."""
        left = sorted(name for name in self._unread if not self._harmless(name))
        if left:
            shown = ", ".join(f"{name!r:.80}" for name in left[:4]) + (", ..." if len(left) > 4 else "")
            raise CheckpointError(f"{self.path}: {len(left)} of {len(self._owner)} tensors are not part of a "
                                  f"{self.config.architecture} with this config.json: {shown}")

    def file(self, name: str) -> bytes | None:
        """One of FILES, from the metadata of a self-describing file, else from beside the weights; None if absent."""
        if name not in FILES:
            raise ValueError(f"expected one of {FILES}, got {name!r}")
        if not self._metadata:
            path = self.path.parent / name
            with _os_errors(path):
                return read_file(path) if path.exists() else None
        text = self._metadata.get(name)
        if text is None:
            return None
        try:
            return base64.b64decode(text, validate=True) if name in BASE64_FILES else text.encode()
        except (UnicodeEncodeError, binascii.Error, ValueError) as error:
            raise CheckpointError(f"{self.path}: metadata {name!r} is damaged: {error}") from None

    def close(self) -> None:
        """Give up the files. Their mappings go when the last tensor read from them does."""
        self._closed = True
        self._owner = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _harmless(self, name: str) -> bool:
        """Tensors that checkpoints hold and nobody reads: RoPE tables, and the head's copy in a tied model."""
        return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and self.config.tie_embeddings)


@dataclass(frozen=True)
class Entry:
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes [begin, end) of the data that follows the header
    end: int


class SafetensorsFile:
    """One memory-mapped .safetensors file with its header checked: every entry lies inside the file, none overlap."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]
    digest: bytes  # of the header, the size and each tensor's first bytes

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        header = _header(path, self._bytes)
        self._data_start = 8 + len(header)
        self.metadata, self.entries = _parse_header(path, header, len(self._bytes) - self._data_start)
        # Two fine-tunes of one model have equal headers and sizes: 64 bytes of each tensor tell them apart cheaply.
        digest = hashlib.blake2b(header + len(self._bytes).to_bytes(8, "little"))
        for name in self.entries:
            digest.update(self.raw(name)[:64].tobytes())
        self.digest = digest.digest()

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes: a read-only view of the mapping, whatever its dtype."""
        entry = self.entries[name]
        return self._bytes[self._data_start + entry.begin : self._data_start + entry.end]

    def tensor(self, name: str) -> Tensor:
        """A float tensor as a view of the mapping. Raises CheckpointError for other dtypes.

        The format asks writers to align tensors but not readers to rely on it: one that does not begin at a multiple of
        its item size is copied, as NumPy's operations on misaligned views are slow and C code may not expect them.
        """
        entry = self.entries[name]
        if entry.dtype not in _VIEWS:
            raise CheckpointError(f"{self.path}: tensor {name!r}: expected {' or '.join(_VIEWS)}, got {entry.dtype}")
        data = self.raw(name).view(_VIEWS[entry.dtype]).reshape(entry.shape)
        if not data.flags.aligned:
            data = data.copy()
            data.flags.writeable = False
        return Tensor(name, entry.dtype, data)


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes: UTF-8, no key twice. Raises CheckpointError naming `source`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{source}: JSON is nested too deep") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of too many digits
        raise CheckpointError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, got a {type(value).__name__}")
    return value


def read_file(path: Path) -> bytes:
    """A small file's bytes. Raises CheckpointError."""
    with _os_errors(path):
        if _regular_size(path) > _MAX_TEXT:
            raise CheckpointError(f"{path}: expected at most {_MAX_TEXT} bytes, got {path.stat().st_size}")
        return path.read_bytes()


_MAX_TEXT = 100_000_000  # bytes of a header or of a text file; the safetensors library's own limit for headers
_VIEWS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
         "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
         "C64": 64}


def _find(path: Path) -> Path:
    """The .safetensors or index that `path` means. A folder's choice is transformers' own, or its only candidate."""
    with _os_errors(path):
        if not stat.S_ISDIR(path.stat().st_mode):
            if not path.name.endswith((".safetensors", ".safetensors.index.json")):
                raise CheckpointError(f"{path}: expected a .safetensors, a .safetensors.index.json or a folder; other "
                                      "formats are converted with python -m converters")
            return path
        for name in ("model.safetensors", "model.safetensors.index.json"):
            if (path / name).exists():
                return path / name
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(candidate.name for candidate in found[:4]) or "none"
        raise CheckpointError(f"{path}: expected one checkpoint in this folder, found {names}"
                              + ("; name the file" if found else "; other formats are converted with "
                                                                 "python -m converters"))
    return found[0]


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    """Every tensor's file, from an index whose weight_map and shards agree exactly."""
    weight_map = parse_json_object(read_file(index), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected weight_map, an object from tensor to file name")
    shards: dict[str, SafetensorsFile] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(f"{index}: tensor {name!r:.80}: expected a file name, got {file_name!r:.80}")
        if file_name not in shards:
            shards[file_name] = SafetensorsFile(_inside(index, file_name))
        if name not in shards[file_name].entries:
            raise CheckpointError(f"{index}: tensor {name!r:.80} is not in {file_name}, where the index says it is")
    for file_name, shard in shards.items():
        for name in shard.entries:
            if weight_map.get(name) != file_name:
                raise CheckpointError(f"{shard.path}: holds tensor {name!r:.80}, which the index "
                                      f"{'puts elsewhere' if name in weight_map else 'does not name'}")
    return {name: shards[file_name] for name, file_name in weight_map.items()}


def _inside(index: Path, file_name: str) -> Path:
    """The shard of that name in the index's own folder, and nowhere else, links included.

    A link out of the folder is allowed only into the blobs of the Hugging Face cache that the folder is a snapshot of
    (.../models--x/snapshots/REVISION/FILE -> .../models--x/blobs/HASH).
    """
    folder = index.parent
    plain = Path(file_name).name == file_name and "\\" not in file_name and file_name.isprintable()
    if not plain or not file_name.endswith(".safetensors"):
        raise CheckpointError(f"{index}: expected the name of a .safetensors file in {folder}, got {file_name!r:.80}")
    path = folder / file_name
    with _os_errors(path):
        target, home = path.resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if target.parent != home and not in_cache:
        raise CheckpointError(f"{index}: {file_name!r} leads outside {folder}, to {target}")
    return path


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes, mapped read-only. The array owns the mapping: it lasts as long as any view."""
    with _os_errors(path):
        if _regular_size(path) < 8:
            raise CheckpointError(f"{path}: not a safetensors file: expected at least 8 bytes, got "
                                  f"{path.stat().st_size}")
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _header(path: Path, data: npt.NDArray[np.uint8]) -> bytes:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 2 <= length <= min(_MAX_TEXT, len(data) - 8):
        raise CheckpointError(f"{path}: truncated, or not a safetensors file: the first 8 bytes announce a header of "
                              f"{length} bytes in a file of {len(data)} (limit {_MAX_TEXT})")
    header = data[8 : 8 + length].tobytes()
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file: expected a header that begins with '{{', got "
                              f"{header[:1]!r}")
    return header


def _parse_header(path: Path, header: bytes, data_size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """(metadata, entries). The entries must tile the data exactly, as the format demands: no gap, no overlap."""
    fields = parse_json_object(header, f"{path}: header")
    metadata = fields.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: expected __metadata__ to map names to text")
    entries = {name: _entry(f"{path}: tensor {name!r:.80}", value) for name, value in fields.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise CheckpointError(f"{path}: tensor {name!r:.80}: expected its data to begin at {position}, where the "
                                  f"one before ends, got {entry.begin}")
        position = entry.end
    if position != data_size:
        raise CheckpointError(f"{path}: {'truncated' if data_size < position else 'damaged'}: the header describes "
                              f"{position} bytes of tensors, the file holds {data_size}")
    return metadata, entries


def _entry(source: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{source}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{source}: expected a dtype of the safetensors format, got {dtype!r:.80}")
    if not _sizes(shape) or len(shape) > 8 or math.prod(size or 1 for size in shape) >= 1 << 59:  # as NumPy demands
        raise CheckpointError(f"{source}: expected a shape of at most 8 sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{source}: expected data_offsets to be [begin, end]")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        raise CheckpointError(f"{source}: {dtype} of shape {shape} takes {bits // 8} bytes, but data_offsets "
                              f"{offsets} hold {offsets[1] - offsets[0]}")
    return Entry(dtype, tuple(shape), *offsets)


def _sizes(value: Any) -> bool:
    """Whether value is a list of sizes that a file can have (bool is no integer here)."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r:.80} appears twice")
        found[key] = value
    return found


def _regular_size(path: Path) -> int:
    """Bytes of a file that can be opened without blocking: a pipe or a device is refused."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe or device"
        raise CheckpointError(f"{path}: expected a file, got a {kind}")
    return status.st_size


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """What the operating system, or Python on its behalf (a NUL in a name), refuses becomes a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file or folder") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
