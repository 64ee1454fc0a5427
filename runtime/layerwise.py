"""Plans that come layer by layer in prefill, from the attention which that layer's query rows pay to the chunks.

    LayerwisePlan    whose attention, and what to make of it: handed in instead of a Plan
    QueryAttention   how much of that attention every chunk gets, on its way from the device
    LayerChoices     one cache's plan while it comes

The device is given the rest of the layer before the host waits for the masses, so that it works on while the host
chooses, and packing is behind that work in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backend import Array, Backend
from runtime.errors import PlanError
from runtime.plan import Layout, Plan
from runtime.plan_checks import per_tier

Masses = npt.NDArray[np.float32]  # (G, N): how much attention every chunk gets, by KV head
Chunks = tuple[int, ...]  # index into layout.tiers of every chunk


@dataclass(frozen=True)
class LayerwisePlan:
    """A plan whose layout is fixed and whose layers are assigned one by one.

    rows: those of the prompt whose attention counts. choose(layer, masses) gives every chunk's index into layout.tiers,
    as many of each tier as the layout has; make(chunks, masses) the Plan, from what was chosen and seen in all layers.
    Both may be called again: every prefill chooses anew. They raise what they like; `read` passes it on.
    """

    layout: Layout
    rows: range
    choose: Callable[[int, Masses], Sequence[int]]
    make: Callable[[tuple[Chunks, ...], Sequence[Masses]], Plan]

    def __post_init__(self) -> None:
        if self.layout.in_place is not None:
            raise PlanError("chunks cannot stay in place where each layer is assigned in prefill: their widths size "
                            "the cache; leave out the reordering's ablation, or score by text")
        if not 0 <= self.rows.start < self.rows.stop <= self.layout.prompt_tokens or self.rows.step != 1:
            raise PlanError(f"the attention of rows {self.rows.start}..{self.rows.stop} is asked for; the prompt has "
                            f"{self.layout.prompt_tokens}")


class QueryAttention:
    """The attention of some rows of a prompt to its chunks, one layer at a time, for all caches that ask for it."""

    def __init__(self, backend: Backend, layout: Layout, rows: range) -> None:
        self._backend, self._layout, self.rows = backend, layout, rows
        self._shape = layout.n_kv_heads, layout.n_chunks
        self._sums = backend.empty(self._shape, np.float32)
        self._copies: list[tuple[Array, npt.NDArray[np.int32]]] = []  # one per tile that holds some of the rows
        self._waits: list[Callable[[], None]] = []
        self._marks: list[tuple[Any, Any]] = []
        self._masses = np.zeros(self._shape, np.float32)

    def see(self, q: Array, k: Array, start: int) -> None:
        """One tile of the layer: q (T, H, D) of rows start.., k (G, S, D) up to its last row. Does not wait."""
        first, last = max(self.rows.start, start), min(self.rows.stop, start + len(q))
        if first >= last or not self._layout.n_chunks:
            return
        if len(self._waits) == len(self._copies):
            self._copies.append(self._backend.visible(self._shape[0] * self._shape[1]))
        begin, layout = self._backend.mark(), self._layout
        self._backend.attention_mass(q[first - start : last - start], k, first, layout.window, layout.prefix,
                                     layout.chunk, self._sums)
        self._copies[len(self._waits)][0][:] = self._sums.reshape(-1).view(np.int32)
        self._waits.append(self._backend.launched())
        self._marks.append((begin, self._backend.mark()))

    def masses(self) -> Masses:
        """Of the layer seen last, (G, N): the sum over the rows and the query heads of each KV head. Waits for it."""
        if self._waits:
            for wait in self._waits:
                wait()
            parts = [host.view(np.float32) for _, host in self._copies[: len(self._waits)]]
            self._masses = np.sum(parts, axis=0).reshape(self._shape)
            self._waits.clear()
        return self._masses

    def seconds(self) -> float:
        """What the device took for it in all layers."""
        return sum(self._backend.seconds(begin, end) for begin, end in self._marks)


class LayerChoices:
    """What Cache.assign takes for a LayerwisePlan. plan: None until the last layer is chosen."""

    def __init__(self, wanted: LayerwisePlan, attention: QueryAttention) -> None:
        self._wanted, self._attention = wanted, attention
        self._chosen: list[Chunks] = []
        self._seen: list[Masses] = []
        self.layout = wanted.layout
        self.plan: Plan | None = None

    def wait(self) -> None:
        """Until the next layer's masses are there."""
        self._seen.append(self._attention.masses())

    def next(self) -> tuple[Chunks, ...]:
        """The chunks of each tier in the next layer, in document order, as Plan.stored has them. Call wait() first."""
        layer, layout = len(self._chosen), self.layout
        chunks = tuple(int(tier) for tier in self._wanted.choose(layer, self._seen[layer]))
        counts = per_tier(chunks, len(layout.tiers))
        if counts != layout.counts[layer] or len(chunks) != layout.n_chunks:
            raise PlanError(f"layer {layer} was given {counts} chunks per tier; the layout expects "
                            f"{layout.counts[layer]}")
        self._chosen.append(chunks)
        if len(self._chosen) == layout.n_layers:
            made = self._wanted.make(tuple(self._chosen), self._seen)
            if (made.layout, made.assignment, made.permutation) != (layout, tuple(self._chosen), None):
                raise PlanError("the plan that was made of the layers is not what was packed")
            self.plan = made
        return tuple(tuple(chunk for chunk, its in enumerate(chunks) if its == tier)
                     for tier in range(len(layout.tiers)))
