"""The KV cache of one sequence: an arena, a plan that says what goes where, and the state of its decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.arena import ArenaLayout
from runtime.backend import (
    STATE_FLUSHED,
    STATE_POSITION,
    STATE_SIZE,
    STATE_SLOT,
    STATE_TOKEN,
    Array,
    Backend,
    FormatData,
)
from runtime.config import ModelConfig
from runtime.errors import BackendError, OutOfMemory, PlanError
from runtime.formats import Kind, block_bytes
from runtime.layerwise import LayerChoices
from runtime.plan import Layout, Plan


class Cache:
    """Allocated from a Layout alone; `assign` then says which chunk goes where, `pack` fills one layer at a time.

    data: per layer, what the layout's formats need besides the values (runtime.backend.FormatData); it is kept alive.

    k, v: per layer, the tail's FP16 (G, capacity, D); bound: per layer, what decode attention needs; position, slot,
    token: int32 (1,) views of the state that a decode step reads. All keep their addresses.
    """

    staged = False  # a decode step writes K and V straight into the tail

    def __init__(self, backend: Backend, config: ModelConfig, layout: Layout,
                 data: Sequence[FormatData | None] | None = None):
        self.layout = layout
        self.data = tuple(data) if data is not None else (None,) * layout.n_layers
        self.sizes = ArenaLayout(layout)
        self._backend = backend
        try:
            self.arena = backend.arena(self.sizes.nbytes)
        except MemoryError as error:
            raise OutOfMemory(f"the KV cache needs {self.sizes.nbytes / 2**20:.0f} MiB: {error}; "
                              "a lower --kv-bits, a shorter context or a smaller --max-tokens needs less") from error
        self.tails = tuple(self.sizes.tail(layer) for layer in range(layout.n_layers))
        self.spans = tuple(self.sizes.spans(layer) for layer in range(layout.n_layers))
        self.flushed = tuple(self.sizes.flushed(layer) for layer in range(layout.n_layers))
        shape = (layout.n_kv_heads, layout.tail_capacity, layout.head_dim)
        self.k = tuple(self._half(tail.k, shape) for tail in self.tails)
        self.v = tuple(self._half(tail.v, shape) for tail in self.tails)
        positions = np.arange(layout.tail_capacity, dtype=np.int32)
        positions[layout.prefix :] += layout.n_chunks * layout.chunk
        start = self.sizes.tail_positions
        self.arena[start : start + positions.nbytes].view(np.int32)[:] = backend.upload(positions)
        sizes = config.n_heads, config.n_kv_heads, config.head_dim, layout.chunk, config.sliding_window
        stored = [[span for span in spans if span.n] for spans in self.spans]
        try:
            backend.prepare([[*spans, flushed] if flushed else spans
                             for spans, flushed in zip(stored, self.flushed, strict=True)], *sizes, any(self.flushed))
            self.bound = tuple(
                backend.bind(self.arena, spans, tail, *sizes, flushed, data)
                for spans, tail, flushed, data in zip(stored, self.tails, self.flushed, self.data, strict=True))
        except RuntimeError as error:  # a backend's KernelError
            raise BackendError(str(error)) from error
        self.state = backend.upload(np.zeros(STATE_SIZE, np.int32))
        self.position = self.state[STATE_POSITION : STATE_POSITION + 1]
        self.slot = self.state[STATE_SLOT : STATE_SLOT + 1]
        self.token = self.state[STATE_TOKEN : STATE_TOKEN + 1]
        self._counts = backend.upload(np.arange(layout.flushed(layout.max_new) + 1, dtype=np.int32))
        self._n_flushed = 0  # what the state will say once all work handed over is done
        self._plan: Plan | Callable[[], Plan] | LayerChoices | None = None
        self._packing: list[tuple[Any, Any]] = []  # marks of the backend before and after each layer
        self._waiting: list[tuple[Any, Any]] = []
        self._making = 0.0

    def assign(self, plan: Plan | Callable[[], Plan] | LayerChoices) -> None:
        """Say which chunk sits where, or how to find out when it is first needed, or in every layer anew; every layer's
        `pack` follows the plan of that moment."""
        if isinstance(plan, Plan | LayerChoices) and plan.layout != self.layout:
            raise PlanError("the plan's layout is not the one that this cache was allocated for; make a new plan")
        self._plan = plan

    @property
    def plan(self) -> Plan | None:
        """The plan that is followed; None as long as there is none."""
        return self._plan if isinstance(self._plan, Plan) else None

    def pack(self, layer: int, k: Array, v: Array) -> None:
        """Store one layer of the prompt; k, v FP16 (G, at least prompt tokens, D), row = position."""
        stored = self._stored(layer)
        begin, layout = self._backend.mark(), self.layout
        for chunks, span in zip(stored, self.spans[layer], strict=True):
            if span.n:
                starts = np.array([layout.start(chunk) for chunk in chunks], np.int32)
                self._backend.pack(k, v, self.arena, span, starts, layout.chunk, data=self.data[layer])
        context_end = layout.start(layout.n_chunks)
        if n := layout.flushed(0):
            self._pack_flushed(layer, k, v, range(n), context_end)
        rows = np.concatenate([np.arange(layout.prefix, dtype=np.int32),
                               np.arange(context_end, layout.prompt_tokens, dtype=np.int32)])
        if len(rows):
            self._backend.copy_tail(k, v, rows, self.arena, self.tails[layer], 0)
        self._packing.append((begin, self._backend.mark()))

    def timing(self) -> tuple[float, float, float]:
        """Seconds of packing, of making the plan, and how long the device stood still for the latter."""
        pack, wait = (sum(self._backend.seconds(begin, end) for begin, end in marks)
                      for marks in (self._packing, self._waiting))
        return pack, self._making, min(wait, self._making)

    def outliers(self) -> tuple[int, int]:
        """How many values the sparse stores of all packed chunks keep, and how many found no room; kvquant only."""
        if self.layout.formats != "kvquant":
            return 0, 0
        totals = np.zeros(2, np.int64)
        for spans, flushed in zip(self.spans, self.flushed, strict=True):
            packed = [*spans, self.sizes.part(flushed, 0, self._n_flushed)] if flushed is not None else spans
            for span in packed:
                sides: tuple[tuple[Kind, int, int, int], ...] = (
                    ("K", span.k_bits, span.k_meta, span.k_meta_stride),
                    ("V", span.v_bits, span.v_meta, span.v_meta_stride))
                for kind, bits, offset, stride in sides:
                    totals += self._kept(span.n, block_bytes(kind, bits, self.layout.chunk, self.layout.head_dim,
                                                             "kvquant").meta, offset, stride)
        return int(totals[0]), int(totals[1])

    def _kept(self, n: int, block: int, offset: int, stride: int) -> npt.NDArray[np.int64]:
        """Sums (2,) of the two counts with which every sparse store begins."""
        totals = np.zeros(2, np.int64)
        for head in range(self.layout.n_kv_heads if block else 0):
            begin = offset + head * stride
            stores = self.arena[begin : begin + n * block].view(np.uint16).reshape(n, block // 2)
            totals += self._backend.download(stores[:, :2]).sum(axis=0, dtype=np.int64)
        return totals

    def start(self) -> None:
        """Set the state to the prompt's end: drawing the first id, or advancing with it, makes it the one to decode."""
        layout = self.layout
        state = np.zeros(STATE_SIZE, np.int32)
        state[STATE_POSITION] = layout.prompt_tokens - 1
        state[STATE_SLOT] = layout.prompt_tokens - layout.n_chunks * layout.chunk - 1
        state[STATE_FLUSHED] = self._n_flushed = layout.flushed(0)
        self.state[:] = self._backend.upload(state)

    def flush(self, generated: int) -> None:
        """Pack what Layout.flush lets the tail give up once it holds so many generated tokens, before the next step.

        The tail's slots keep what they hold, so that an answer can be started again.
        """
        n = self.layout.flushed(generated)
        if n <= self._n_flushed:
            return
        for layer, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            self._pack_flushed(layer, k, v, range(self._n_flushed, n), self.layout.prefix)
        self.state[STATE_FLUSHED : STATE_FLUSHED + 1] = self._counts[n : n + 1]
        self._n_flushed = n

    def _pack_flushed(self, layer: int, k: Array, v: Array, chunks: range, first: int) -> None:
        """Chunks of the flushed span, counted from the first token behind the context, which is row `first` of k, v."""
        span, layout = self.flushed[layer], self.layout
        assert span is not None, "a layout that flushes has room for it"
        starts = np.array(chunks, np.int32) * np.int32(layout.chunk)
        self._backend.pack(k, v, self.arena, self.sizes.part(span, chunks.start, len(chunks)), starts + np.int32(first),
                           layout.chunk, starts + np.int32(layout.start(layout.n_chunks)), self.data[layer])

    def _stored(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The chunks of each of the layer's spans; what is not known yet is found out."""
        if self._plan is None:
            raise PlanError("no plan is assigned: call Cache.assign before the first layer is packed")
        if isinstance(self._plan, Plan):
            return self._plan.stored(layer)
        # On a GPU the first mark passes when the work handed over so far is done: the time between is idle.
        mark, pending = self._backend.mark(), self._plan
        if isinstance(pending, LayerChoices):
            pending.wait()
        begin = time.perf_counter()
        if isinstance(pending, LayerChoices):
            stored, plan = pending.next(), pending.plan
        else:
            plan = pending()
            stored = plan.stored(layer)
        self._making += time.perf_counter() - begin
        self._waiting.append((mark, self._backend.mark()))
        if plan is not None:
            self.assign(plan)
        return stored

    def _half(self, offset: int, shape: tuple[int, int, int]) -> Array:
        nbytes = 2 * shape[0] * shape[1] * shape[2]
        return self.arena[offset : offset + nbytes].view(np.float16).reshape(shape)
