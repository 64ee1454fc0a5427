"""The master of a document: the exact K and V of a prompt's first tokens, kept so that they are computed once.

    Master         the values, (L, 2, G, n, D) float16: in host memory or in a memory-mapped file
    SharedMaster   a master that the first prompt fills and every later one reads, from any thread

K and V are those after RoPE, just as prefill computed them; no cache's widths touch them, so nothing is left of the
question that was asked first.

What is not done yet: on CUDA the copies to and from the host do not overlap with computing. Every layer waits for its
own, in memory that is not pinned.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock, RLock
from typing import Literal

import numpy as np
import numpy.typing as npt

from runtime.backend import Array, Backend
from runtime.config import ModelConfig
from runtime.errors import DocumentError, PromptError

Place = Literal["file", "memory"]  # where a master is kept
Values = npt.NDArray[np.float16]  # (L, 2, G, n, D): K and V of every layer; or (2, G, n, D) of one


class Master:
    """values: (L, 2, G, n, D) float16 in host memory; check(layer) is called before a layer is first used, and raises
    where it is not what was written."""

    def __init__(self, backend: Backend, values: Values, check: Callable[[int], None] | None = None) -> None:
        self.tokens, self.nbytes = values.shape[3], values.nbytes
        self._values, self._backend, self._check = values, backend, check
        self._checked: set[int] = set()

    @classmethod
    def empty(cls, backend: Backend, config: ModelConfig, tokens: int, place: Place) -> Master:
        """Room for the first `tokens` tokens. Raises DocumentError where the disk has none, MemoryError."""
        return cls(backend, (_in_memory if place == "memory" else _mapped)(shape_of(config, tokens)))

    def layer(self, layer: int) -> Values:
        """(2, G, n, D), checked."""
        if self._check is not None and layer not in self._checked:
            self._check(layer)
            self._checked.add(layer)
        values: Values = self._values[layer]
        return values

    def keep(self, layer: int, k: Array, v: Array) -> None:
        """Take the first rows of k, v (G, at least n, D) f16."""
        for side, rows in enumerate((k, v)):
            for head, kept in enumerate(self._values[layer, side]):
                kept[:] = self._backend.download(rows[head][: self.tokens])

    def fetch(self, layer: int, k: Array, v: Array, first: int = 0) -> None:
        """Put the rows from `first` on into those of k, v (G, at least n, D) f16."""
        if first < self.tokens:
            for rows, heads in zip((k, v), self.layer(layer), strict=True):
                for head, kept in enumerate(heads):
                    rows[head][first : self.tokens] = self._backend.upload(kept[first:])


class SharedMaster:
    """The first tokens of many prompts, `ids`; a pass that comes before they are kept keeps them.

    Nothing is allocated before that pass, and `clear` gives it back. A pass that fails or is given up leaves it empty.
    """

    def __init__(self, backend: Backend, config: ModelConfig, ids: Sequence[int], place: Place,
                 full: Master | None = None) -> None:
        self.ids, self._place = tuple(ids), place
        self._backend, self._config, self._full = backend, config, full
        self._claim = Lock()  # held by the pass that keeps
        self._turn = RLock()

    @property
    def full(self) -> Master | None:
        """The values; None as long as no pass has kept them."""
        return self._full

    @property
    def nbytes(self) -> int:
        """What is kept now, in bytes."""
        return 0 if (full := self._full) is None else full.nbytes

    def clear(self) -> None:
        """Forget the values; passes under way end with them."""
        self._full = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For passes that are not paused: as long as nothing is kept, one thread at a time, so that the others wait
        for the first instead of computing the same."""
        with ExitStack() as waiting:
            if self._full is None:
                waiting.enter_context(self._turn)
            if self._full is not None:
                waiting.close()
            yield

    @contextmanager
    def lend(self, prompt: Sequence[int]) -> Iterator[tuple[Master | None, Master | None]]:
        """(known, kept) for one pass over the prompt, as runtime.model.prefill takes them.

        Never waits: where another pass is keeping at the moment, this one gets neither and computes everything itself.
        (A pass may be paused for as long as its consumer likes; the one beside it must not stand still for that.)
        """
        if tuple(prompt[: len(self.ids)]) != self.ids:
            raise PromptError(f"the prompt does not begin with the {len(self.ids)} tokens that are kept")
        claimed = self._full is None and self._claim.acquire(blocking=False)
        try:
            if not claimed or self._full is not None:  # it may have come between the look and the claim
                yield self._full, None
            else:
                kept = Master.empty(self._backend, self._config, len(self.ids), self._place)
                yield None, kept
                self._full = kept
        finally:
            if claimed:
                self._claim.release()


def is_keepable(config: ModelConfig) -> bool:
    """Whether K and V of the first tokens are the same whatever comes behind them. With dynamic NTK they are not: its
    frequencies follow the length of the whole prompt."""
    return config.rope.kind != "dynamic"


def shape_of(config: ModelConfig, tokens: int) -> tuple[int, int, int, int, int]:
    return config.n_layers, 2, config.n_kv_heads, tokens, config.head_dim


def _in_memory(shape: tuple[int, ...]) -> Values:
    """MemoryError here, rather than at the touch that is one too many, if the machine or the container has less."""
    from kernels_c.machine import available_bytes  # which needs no kernels

    nbytes, free = 2 * int(np.prod(shape, dtype=np.int64)), available_bytes()
    if free is not None and nbytes > free:
        raise MemoryError(f"{nbytes:,} bytes are to be kept of the document, but {free:,} are free; read it with "
                          'keep="file" or keep=False')
    return np.empty(shape, np.float16)


def scratch_folder() -> Path:
    """Where what is kept of documents lies on the disk: TMPDIR, else /var/tmp; /tmp, which is often memory itself, is
    only the last choice."""
    return Path(os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()))


_BLOCK = 1 << 20


def _mapped(shape: tuple[int, ...]) -> Values:
    """Zeros in a file that has no name, so that nothing is left of it, however this process ends."""
    nbytes, folder = 2 * int(np.prod(shape, dtype=np.int64)), scratch_folder()
    try:
        with tempfile.TemporaryFile(dir=str(folder), buffering=0) as file:
            # Reserved now: a page that finds no room once it is written to would end the process with SIGBUS.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:  # macOS
                for start in range(0, nbytes, _BLOCK):
                    file.write(bytes(min(_BLOCK, nbytes - start)))
            return np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.float16).reshape(shape)
    except OSError as error:
        raise DocumentError(f"{folder}: no file of {nbytes:,} bytes for what is kept of the document: "
                            f"{error.strerror or error}; name another folder in TMPDIR, or read it with "
                            'keep="memory" or keep=False') from error
