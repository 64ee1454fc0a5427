"""Reads torch.save files without torch: a zip of raw storages and one pickle, of which only tensor records are allowed.

Nothing that the pickle names is imported or called; anything but dictionaries of tensors is refused by name.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.model import Source
from runtime.errors import ConvertError

MAX_PICKLE = 64 << 20  # bytes; a 405B model's is below 1 MiB
STORAGES = {  # storage class -> (how it is stored, what Source calls it; "" is not a weight)
    "FloatStorage": ("<f4", "F32"), "HalfStorage": ("<f2", "F16"), "BFloat16Storage": ("<u2", "BF16"),
    "DoubleStorage": ("<f8", ""), "LongStorage": ("<i8", ""), "IntStorage": ("<i4", ""), "ShortStorage": ("<i2", ""),
    "CharStorage": ("<i1", ""), "ByteStorage": ("<u1", ""), "BoolStorage": ("?", ""),
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor as a view of the memory map."""

    array: np.ndarray  # BF16 as uint16
    dtype: str
    mapping: mmap.mmap

    def source(self, name: str) -> Source:
        """Raises ConvertError if it does not hold floats that a checkpoint can have."""
        if not self.dtype:
            raise ConvertError(f"tensor {name} holds {self.array.dtype}, expected F32, F16 or BF16")
        return Source(name, self.array.shape, self.dtype, self.array.__getitem__, mappings=(self.mapping,))


def load(path: Path) -> dict[str, LazyTensor]:
    """The state dict of a torch.save file. Raises ConvertError for anything but a flat dictionary of tensors."""
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:  # ValueError: an empty file
        message = f"{path}: not a torch.save zip file ({error}); files from before torch 1.6 must be saved again"
        raise ConvertError(message) from error
    try:
        with archive:
            state = _Unpickler(path, archive, mapping).load()
    except ConvertError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ConvertError(f"{path}: damaged or not a state dict: {error!r:.200}") from error
    if not isinstance(state, dict):
        raise ConvertError(f"{path}: holds {type(state).__name__}, expected a dictionary of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise ConvertError(f"{path}: {name!r:.80} is {type(value).__name__}, expected a tensor")
    return dict(state)


class _Unpickler(pickle.Unpickler):
    """Knows ordered dictionaries, tensors and their storages, and nothing else."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, mapping: mmap.mmap) -> None:
        pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise ConvertError(f"{path}: expected one data.pkl of at most {MAX_PICKLE} bytes in the zip file")
        self._path, self._mapping = path, mapping
        self._folder = pickles[0].filename.removesuffix("data.pkl")
        self._entries = {info.filename: info for info in archive.infolist()}
        if (order := f"{self._folder}byteorder") in self._entries and archive.read(order) != b"little":
            raise ConvertError(f"{path}: big-endian storages are not supported")
        data = archive.read(pickles[0])
        for opcode, argument, _ in pickletools.genops(data):
            # The memo is an array indexed by this number: a forged one would allocate gigabytes.
            if "PUT" in opcode.name and int(argument or 0) > len(data):
                raise ConvertError(f"{path}: damaged: memo index {argument}")
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return name
        builders: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: self._tensor(*args),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in builders:
            return builders[module, name]
        raise ConvertError(f"{self._path}: refused: it asks for {module}.{name}, which is no part of plain weights")

    def persistent_load(self, pid: Any) -> tuple[np.ndarray, str]:
        kind, storage, key, _location, count = pid
        if kind != "storage":
            raise ValueError(f"persistent id {kind!r}")
        stored, dtype = STORAGES[storage]
        info = self._entries[f"{self._folder}data/{key}"]
        size = count * np.dtype(stored).itemsize
        if info.compress_type != zipfile.ZIP_STORED or not 0 <= size <= info.file_size:
            raise ValueError(f"storage {key} of {info.file_size} bytes is compressed or shorter than {size}")
        # The local header repeats the name and has an extra field of its own length (torch pads with it).
        header = self._mapping[info.header_offset : info.header_offset + 30]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return np.frombuffer(self._mapping, stored, count, info.header_offset + 30 + lengths), dtype

    def _tensor(self, storage: tuple[np.ndarray, str], offset: int, shape: Any, strides: Any, *_: Any) -> LazyTensor:
        data, dtype = storage
        shape, strides = tuple(shape), tuple(strides)
        sizes = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(size) is int and 0 <= size < 1 << 40 for size in sizes):
            raise ValueError(f"tensor of shape {shape} and strides {strides}")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= data.size:
            raise ValueError(f"tensor of shape {shape} reaches beyond its storage of {data.size} values")
        steps = [stride * data.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(data[offset:], shape, steps, writeable=False)
        return LazyTensor(view, dtype, self._mapping)
