"""The master of a document: the exact K and V of a prompt's first tokens, kept so that they are computed once.

    Master         the values, (L, 2, G, n, D) float16: in host memory or in a memory-mapped file
    Exchange       one prefill's copies from and to masters, beside its computing
    SharedMaster   a master that the first prompt fills and every later one reads, from any thread

K and V are those after RoPE, just as prefill computed them; no cache's widths touch them, so nothing is left of the
question that was asked first.

On an asynchronous backend the copies of a layer go on while the one before is computed: prefill has two layers' K and V
in turn.
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
        shape = shape_of(config, tokens)
        return cls(backend, backend.host(shape, np.float16) if place == "memory" else _mapped(shape))

    def layer(self, layer: int) -> Values:
        """(2, G, n, D), checked."""
        if self._check is not None and layer not in self._checked:
            self._check(layer)
            self._checked.add(layer)
        values: Values = self._values[layer]
        return values

    def keep(self, layer: int, k: Array, v: Array) -> None:
        """Take the first rows of k, v (G, at least n, D) f16. As `fetch`, for Backend.beside."""
        for side, rows in enumerate((k, v)):
            for head, kept in enumerate(self._values[layer, side]):
                self._backend.copy(rows[head][: self.tokens], kept)

    def fetch(self, layer: int, k: Array, v: Array, first: int = 0) -> None:
        """Put the rows from `first` on into those of k, v (G, at least n, D) f16."""
        if first < self.tokens:
            for rows, heads in zip((k, v), self.layer(layer), strict=True):
                for head, kept in enumerate(heads):
                    self._backend.copy(kept[first:], rows[head][first : self.tokens])


class Exchange:
    """The device's K and V of the layer that is computed, and the copies from and to masters beside that work.

    On an asynchronous backend two pairs of buffers take turns: one is filled, or emptied, while the other is computed
    with. Elsewhere there is one.
    """

    def __init__(self, backend: Backend, shape: tuple[int, int, int], layers: int, known: Master | None,
                 kept: Master | None) -> None:
        """shape: (G, S, D), of all rows of the prompt."""
        self._backend, self._layers, self._known, self._kept = backend, layers, known, kept
        self._buffers = [(backend.empty(shape, np.float16), backend.empty(shape, np.float16))
                         for _ in range(layers_at_once(backend, known is not None or kept is not None))]
        self._coming: dict[int, Callable[[], None]] = {}
        self._going: dict[int, Callable[[], None]] = {}

    def enter(self, layer: int) -> tuple[Array, Array]:
        """k, v of the layer, with what is known of it; what is handed over from now on may write the other rows."""
        if layer == 0:
            self._bring(0)
        self._wait(self._coming, layer)
        self._wait(self._going, layer - len(self._buffers))
        if len(self._buffers) > 1:
            self._bring(layer + 1)
        elif layer:
            self._bring(layer)
            self._wait(self._coming, layer)
        return self._buffers[layer % len(self._buffers)]

    def leave(self, layer: int) -> None:
        """All rows of the layer are there: they may be copied out."""
        if self._kept is not None:
            kept, (k, v) = self._kept, self._buffers[layer % len(self._buffers)]
            self._going[layer] = self._backend.beside(lambda: kept.keep(layer, k, v))

    def end(self) -> None:
        """Waits for what was copied out: the host may read it from now on."""
        for layer in tuple(self._going):
            self._wait(self._going, layer)
        if self._kept is not None:
            self._backend.launched()()

    def _bring(self, layer: int) -> None:
        if self._known is not None and layer < self._layers:
            known, (k, v) = self._known, self._buffers[layer % len(self._buffers)]
            self._coming[layer] = self._backend.beside(lambda: known.fetch(layer, k, v))

    @staticmethod
    def _wait(copies: dict[int, Callable[[], None]], layer: int) -> None:
        if layer in copies:
            copies.pop(layer)()


def layers_at_once(backend: Backend, shared: bool) -> int:
    """Of how many layers a prefill has K and V on the device; shared: whether some come from a master or go to one."""
    return 2 if shared and backend.asynchronous else 1


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
