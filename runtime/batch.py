"""Sequences that decode together: one pass over the weights for the next token of each.

    Decoder       what a scheduler asks of a model: bytes, prefills, steps
    Member        one answer under way, in the cache of a Reading
    Batch         the members of one step
    TakesTurns    an answer on a backend that decodes one sequence at a time

What a member of up to Backend.exact_batch gets does not depend on who shares its steps, to the last bit, so a greedy
answer is the same alone and in company. Alone means in a batch of its own: on CUDA that multiplies with another kernel
than Reading.generate, whose last bits are others. In a larger batch sums may be added in another order.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from runtime.arena import ArenaLayout
from runtime.backend import STATE_SIZE, STATE_TOKEN, Array, BatchRows
from runtime.engine import Planned, Reading, read_in_steps
from runtime.formats import PRE_ROPE
from runtime.master import SharedMaster, layers_at_once
from runtime.model import Model, StepBuffers, decode_step, prefill_bytes
from runtime.plan import Layout
from runtime.sampler import SamplingParams


class Decoder:
    """A model for many requests. batch: how many sequences share a pass over the weights; exact: no more than get the
    same bits in any company."""

    def __init__(self, model: Model, exact: bool = False) -> None:
        self.batch = model.backend.batch_of([
            weight for layer in model.weights.layers
            for weight in (layer.wq, layer.wk, layer.wv, layer.wo, layer.gate, layer.up, layer.down)]
            + [model.weights.head])
        if exact:
            self.batch = min(self.batch, model.backend.exact_batch)
        self._model = model
        self._batches: list[Batch] = []

    def needs(self, layout: Layout, shared: bool = False) -> tuple[int, int]:
        """Bytes of one request: what it holds until it ends (arena, RoPE tables, logits), and what only its prefill
        holds. Both are known before the prefill. shared: whether it has a master."""
        config, backend, tokens = self._model.config, self._model.backend, layout.prompt_tokens + layout.max_new
        rope = 4 * config.head_dim * tokens * (2 if layout.formats in PRE_ROPE else 1)  # in an order of their own too
        seen = 4 * tokens + 12 * layout.max_new  # with draws and uniforms
        row = 4 * (config.vocab_size + config.hidden_size + 2 * config.n_heads * config.head_dim
                   + config.intermediate_size)
        # Rows of the prefill's end, of a step by itself and of one in a batch; states and positions are below 1 KiB.
        return (ArenaLayout(layout).nbytes + rope + seen + 3 * row + 1024,
                prefill_bytes(config, layout.prompt_tokens, backend.prefill_tile, layers_at_once(backend, shared)))

    def free_bytes(self) -> int | None:
        """What all requests together may take: free memory less what the operations need for themselves. The memory of
        weights in a mapped file counts as free, but every step reads all of it."""
        backend = self._model.backend
        if (free := backend.free_bytes()) is None:
            return None
        return free - backend.reserve - (self._model.weights.nbytes if backend.maps_weights else 0)

    def read(self, prompt: Sequence[int], plan: Planned,
             master: SharedMaster | None) -> Generator[tuple[int, int], None, Reading]:
        """runtime.engine.read_in_steps for one plan."""
        return read_in_steps(self._model, prompt, [plan], master=master)

    def start(self, reading: Reading, params: SamplingParams, max_new: int,
              stop_ids: Collection[int]) -> Member | TakesTurns:
        """The answer, with its first id drawn."""
        if self.batch == 1:
            return TakesTurns(reading, params, max_new, stop_ids)
        return Member(reading, params)

    def step(self, answers: Sequence[Member | TakesTurns]) -> list[int | Exception]:
        """The next id of each, or why it has none."""
        members = [answer for answer in answers if isinstance(answer, Member)]
        groups = [tuple(members[i : i + self.batch]) for i in range(0, len(members), self.batch)]
        self._batches = [batch for batch in self._batches if batch.members in groups]
        together = iter([drawn for group in groups for drawn in self._step(group)])
        return [next(together) if isinstance(answer, Member) else answer.step() for answer in answers]

    def forget(self) -> None:
        """Let go of the members of the last step."""
        self._batches.clear()

    def _step(self, group: tuple[Member, ...]) -> list[int | Exception]:
        """What goes wrong for all at once is tried again one by one, so that it ends only those that it concerns."""
        try:
            batch = next((batch for batch in self._batches if batch.members == group), None)
            if batch is None:
                batch = Batch(self._model, group)
                self._batches.append(batch)
            return batch.step()
        except Exception as error:
            self._batches.clear()
            return [error] if len(group) == 1 else [drawn for member in group for drawn in self._step((member,))]


class Member:
    """An answer that a Batch continues. last: the id that was drawn last; the first comes from the exact prefill."""

    def __init__(self, reading: Reading, params: SamplingParams) -> None:
        backend = reading.model.backend
        self.reading, self.cache, self.sampler = reading, reading.caches[0], reading.samplers[0]
        self._drawn, self._at = 0, 0.0
        self.cache.start()
        self.sampler.start(params)
        self.draw(backend.upload(reading.first_logits))

    @property
    def last(self) -> int:
        return int(self.sampler.ids[self._drawn - 1])

    @property
    def position(self) -> int:
        """Of the id that was drawn last, which the next step decodes."""
        return self.cache.layout.prompt_tokens + self._drawn - 1

    def flush(self) -> None:
        """Before a step: the ids before the last are in the tail."""
        self.cache.flush(self._drawn - 1)

    def draw(self, logits: object) -> int:
        """The next id, from logits (1, V)."""
        backend = self.reading.model.backend
        backend.sample(logits, self.sampler.draws, self.cache.state)
        backend.launched()()
        return self.drew()

    def drew(self) -> int:
        """The id that has just been drawn. Its time is what passed since the one before, others' prefills included."""
        self._drawn += 1
        before, self._at = self._at, time.perf_counter()
        if self._drawn > 1:
            self.reading.timing.decode += self._at - before
            self.reading.timing.steps += 1
        return self.last

    def close(self) -> None:
        """Nothing is under way between steps."""


@dataclass
class StepArrays:
    """runtime.model.StepRows of a batch: rows of state, token and rope are gathered, k and v are appended from here."""

    state: Array
    token: Array
    position: Array
    slot: Array
    k: tuple[Array, ...]
    v: tuple[Array, ...]
    bound: tuple[Any, ...]
    rope: tuple[Array, Array]
    staged: bool = True

    @classmethod
    def allocate(cls, model: Model, members: Sequence[Member], rows: int) -> StepArrays:
        config, backend = model.config, model.backend
        cos, sin = (backend.upload(np.zeros((rows, config.head_dim // 2), np.float32)) for _ in range(2))
        numbers = backend.upload(np.arange(rows, dtype=np.int32))  # rows of rope, and of k and v
        k, v = (backend.empty((config.n_kv_heads, rows, config.head_dim), np.float16) for _ in range(2))
        bound = tuple(backend.bind_batch([member.cache.bound[layer] for member in members])
                      for layer in range(config.n_layers))
        return cls(backend.upload(np.zeros((rows, STATE_SIZE), np.int32)), backend.upload(np.zeros(rows, np.int32)),
                   numbers, numbers, (k,) * config.n_layers, (v,) * config.n_layers, bound, (cos, sin))


class Batch:
    """One token of each member. Made anew when members join or leave: it holds buffers and addresses, no state that
    lasts beyond a step.

    On an asynchronous backend all of a step is one captured function, ids drawn at its end, and the host waits once. It
    is captured when the same members take their second step, which costs the host about as long as one step without a
    graph: so a batch whose members change all the time never pays for it.
    """

    def __init__(self, model: Model, members: Sequence[Member]) -> None:
        config, backend = model.config, model.backend
        rows = max(len(members), backend.least_batch)
        self.members = tuple(members)
        self._model = model
        self._buffers = StepBuffers.allocate(config, backend, rows)
        self._logits = backend.empty((rows, config.vocab_size), np.float32)
        self._arrays = StepArrays.allocate(model, members, rows)
        self._rows = backend.bind_rows([member.cache.state for member in members],
                                       [member.reading.rope for member in members],
                                       [member.sampler.draws for member in members])
        # Not of self: in a cycle a batch would hold its members' arenas until the collector comes by.
        self._launch = None if self._rows is None else backend.captured(
            partial(_step_together, model, self._rows, self._arrays, self._buffers, self._logits))

    def step(self) -> list[int | Exception]:
        """Every member's next id, or why it has none. Raises what goes wrong for all of them; nobody has then moved,
        and the step can be tried again."""
        for member in self.members:
            member.flush()
        if self._rows is not None and self._launch is not None:
            self._launch()
            return self._drawn_together(self._rows)
        arrays = self._arrays
        for b, member in enumerate(self.members):
            arrays.state[b : b + 1] = member.cache.state
            for rows, table in zip(arrays.rope, member.reading.rope, strict=True):
                rows[b : b + 1] = table[member.position : member.position + 1]
        arrays.token[:] = arrays.state[:, STATE_TOKEN]
        decode_step(self._model, arrays, arrays.rope, self._buffers, self._logits)
        return [self._drawn(b, member) for b, member in enumerate(self.members)]

    def _drawn_together(self, rows: BatchRows) -> list[int | Exception]:
        try:
            self._model.backend.launched()()
        except Exception as error:  # some may have moved by now: nothing can be tried again
            return [error] * len(self.members)
        return [member.drew() if error is None else error
                for member, error in zip(self.members, rows.errors(), strict=True)]

    def _drawn(self, b: int, member: Member) -> int | Exception:
        try:
            return member.draw(self._logits[b : b + 1])
        except Exception as error:  # whatever it is, it is this member's alone
            return error


def _step_together(model: Model, rows: BatchRows, arrays: StepArrays, buffers: StepBuffers, logits: Array) -> None:
    rows.gather(arrays.state, arrays.token, *arrays.rope)
    decode_step(model, arrays, arrays.rope, buffers, logits)
    rows.sample(logits)


class TakesTurns:
    """An answer that decodes by itself, as Reading.generate does."""

    def __init__(self, reading: Reading, params: SamplingParams, max_new: int, stop_ids: Collection[int]) -> None:
        self._ids = reading.generate(params, max_new, stop_ids)
        self.last = next(self._ids)

    def step(self) -> int | Exception:
        try:
            self.last = next(self._ids)
        except Exception as error:
            return error
        return self.last

    def close(self) -> None:
        """Wait for what is under way on the device."""
        self._ids.close()
