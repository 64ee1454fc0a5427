"""Writes one safetensors file block by block, to a temporary file that is renamed when it is complete."""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from converters.model import Model, Source
from runtime.errors import ConvertError

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes per value
BLOCK_VALUES = 1 << 20  # values converted at a time: bounds the memory whatever the tensor's size


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise ConvertError unless `target` may be written."""
    if target.suffix != ".safetensors":
        raise ConvertError(f"{target}: the output must be named .safetensors")
    if not target.parent.is_dir():
        raise ConvertError(f"{target.parent}: no such folder; create it first")
    if not target.exists():
        return
    inputs = source.iterdir() if source.is_dir() else [source]
    if any(path.exists() and path.samefile(target) for path in inputs):
        raise ConvertError(f"{target}: the output is one of the input files; choose another name")
    if not target.is_file():
        raise ConvertError(f"{target}: exists and is not a file")
    if not force:
        raise ConvertError(f"{target}: exists already; --force overwrites it")


def write(model: Model, target: Path, dtype: str | None = None) -> int:
    """Write `model` to `target` atomically and return the file's size in bytes.

    Peak memory is a few blocks of BLOCK_VALUES (or one row, if longer). Raises ConvertError or OSError; on any failure,
    Ctrl-C included, the unfinished file is removed and an existing target is untouched.
    """
    # Wide types first: every tensor then starts at a multiple of its own width.
    plan = [(source, _target_dtype(source, dtype)) for source in model.sources]
    plan.sort(key=lambda item: -WIDTHS[item[1]])
    header, data_bytes = _header(model, plan)
    size = len(header) + data_bytes
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise ConvertError(f"{target}: needs {size:,} bytes, {free:,} are free on that disk")
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with partial.open("xb") as file, _progress() as progress:
            task = progress.add_task(target.name, total=size)
            progress.advance(task, file.write(header))
            for source, to in plan:
                for block in _blocks(source, to):
                    progress.advance(task, file.write(block))
                _release(source.mappings)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return size


def _target_dtype(source: Source, dtype: str | None) -> str:
    if len(source.shape) < 2:
        return source.dtype
    return dtype or ("F16" if source.quantized else source.dtype)


def _header(model: Model, plan: list[tuple[Source, str]]) -> tuple[bytes, int]:
    metadata = {"format": "pt", "config.json": json.dumps(model.config, indent=1), **model.files}
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for source, dtype in plan:
        end = offset + math.prod(source.shape) * WIDTHS[dtype]
        entries[source.name] = {"dtype": dtype, "shape": list(source.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data starts at a cache line
    return len(text).to_bytes(8, "little") + text, offset


def _blocks(source: Source, dtype: str) -> Iterator[bytes]:
    step = max(1, BLOCK_VALUES // max(1, math.prod(source.shape[1:])))
    for start in range(0, source.shape[0], step):
        rows = source.rows(slice(start, min(start + step, source.shape[0])))
        yield _cast(rows, source, dtype).tobytes()


def _cast(rows: np.ndarray, source: Source, dtype: str) -> np.ndarray:
    if source.dtype == dtype:
        return rows
    wide = (rows.astype(np.uint32) << 16).view(np.float32) if source.dtype == "BF16" else rows.astype(np.float32)
    if dtype == "F32":
        return wide
    if dtype == "BF16":
        return _bf16(wide)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if not np.array_equal(np.isfinite(narrow), np.isfinite(wide)):
        peak = float(np.abs(wide).max())
        raise ConvertError(f"tensor {source.name} holds {peak:g}, beyond F16's 65504; use --dtype bf16 or f32")
    return narrow


def _bf16(wide: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    bits = wide.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)


def _release(mappings: tuple[mmap.mmap, ...]) -> None:
    """Give the file's pages back: a mapping of the whole input would otherwise count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _progress() -> Progress:
    columns = ("[bold]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
