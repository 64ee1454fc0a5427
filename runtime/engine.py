"""One prompt from ids to answer ids. Speaks ids only; text is the caller's affair."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from runtime.backend import Array, Draws
from runtime.cache import Cache
from runtime.errors import OutOfMemory, PromptError
from runtime.format_data import format_data
from runtime.layerwise import LayerChoices, LayerwisePlan, QueryAttention
from runtime.master import SharedMaster
from runtime.model import Model, StepBuffers, decode_step, prefill
from runtime.plan import Layout, Plan
from runtime.sampler import Sampler, SamplingParams

Progress = Callable[[int, int], None]  # (steps done, steps in all) of the prefill


@dataclass(frozen=True)
class PendingPlan:
    """A plan whose layout is fixed and whose assignment is not: caches are allocated and the first layer is read before
    make() is called for it. make raises what it likes; `read` passes it on."""

    layout: Layout
    make: Callable[[], Plan]


Planned = Plan | PendingPlan | LayerwisePlan  # what `read` takes


@dataclass
class Timing:
    """Seconds. prefill covers the forward pass and packing; pack is its share; decode is what was waited for ids after
    the first.

    plan: making pending plans, the attention of layerwise ones included; wait: of that, what came on top of prefill:
    that attention, and the time for which the device had run out of work.
    """

    prefill: float = 0.0
    pack: float = 0.0
    plan: float = 0.0
    wait: float = 0.0
    decode: float = 0.0
    steps: int = 0  # ids after the first

    @property
    def per_token(self) -> float:
        """TPOT: seconds per id after the first; 0 where there was none."""
        return self.decode / self.steps if self.steps else 0.0


@dataclass
class Reading:
    """A prompt that has been read once into one cache per plan; each cache can answer again and again.

    reused: how many of its tokens came from a master.
    """

    model: Model
    prompt: tuple[int, ...]
    caches: tuple[Cache, ...]
    rope: tuple[Array, Array]
    first_logits: npt.NDArray[np.float32]  # (1, V), from the exact prefill
    timing: Timing = field(default_factory=Timing)
    reused: int = 0

    def __post_init__(self) -> None:
        backend = self.model.backend
        self._buffers = StepBuffers.allocate(self.model.config, backend, 1)
        self._logits = backend.empty(self.first_logits.shape, np.float32)
        self.samplers = [Sampler(backend, self.prompt, cache.layout.max_new) for cache in self.caches]
        self._steps = [backend.captured(partial(decode_step, self.model, cache, self.rope, self._buffers, self._logits))
                       for cache in self.caches]
        self._draws = [
            backend.captured(partial(_draw, self.model, cache, self.rope, self._buffers, self._logits, sampler.draws))
            for cache, sampler in zip(self.caches, self.samplers, strict=True)]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What each cache follows."""
        return tuple(plan for cache in self.caches if (plan := cache.plan) is not None)

    def generate(self, params: SamplingParams, max_new: int, stop_ids: Collection[int],
                 cache: int = 0) -> Generator[int, None, None]:
        """Yields up to max_new ids; the first comes from the exact prefill. Ends after yielding an id of stop_ids.

        On an asynchronous backend the next id is being drawn while the caller has the one before, so that the device
        never waits for the host; an answer that ends early has then taken one step too many, which nothing shows.
        Elsewhere an id is drawn only when it is asked for. Once the iterator has ended or is closed, nothing is under
        way any more.
        """
        target, sampler, backend = self.caches[cache], self.samplers[cache], self.model.backend
        if max_new > target.layout.max_new:
            raise PromptError(f"{max_new} new tokens were asked for; the cache was sized for {target.layout.max_new}")
        if not max_new:
            return
        target.start()
        sampler.start(params)
        self._logits[:] = backend.upload(self.first_logits)
        backend.sample(self._logits, sampler.draws, target.state)
        waits = deque([backend.launched()])  # for the draws under way, in their order
        launched = 1
        try:
            for count in range(max_new):
                begin = time.perf_counter()
                ahead = count > 0 and backend.asynchronous  # the first id does not wait for a capture
                while launched < min(count + 1 + ahead, max_new):
                    target.flush(launched - 1)  # the draw decodes id launched - 1: those before it are in the tail
                    self._draws[cache]()
                    waits.append(backend.launched())
                    launched += 1
                waits.popleft()()
                token = int(sampler.ids[count])
                if count:
                    self.timing.decode += time.perf_counter() - begin
                    self.timing.steps += 1
                yield token
                if token in stop_ids:
                    return
        finally:
            for wait in waits:
                wait()

    def force(self, answer: Sequence[int], cache: int = 0) -> npt.NDArray[np.float32]:
        """Teacher forcing: (len(answer), V) float32; row i predicts answer[i] given the answer before it.

        Row 0 is the exact prefill's; every later row has read the mixed cache.
        """
        target, backend = self.caches[cache], self.model.backend
        if not 0 < len(answer) <= target.layout.max_new + 1:
            raise PromptError(f"the answer to force has {len(answer)} ids; expected 1 to {target.layout.max_new + 1}")
        rows = np.empty((len(answer), self.first_logits.shape[1]), np.float32)
        rows[0] = self.first_logits[0]
        target.start()
        for i, token in enumerate(answer[:-1], 1):
            backend.advance(target.state, token)
            target.flush(i - 1)
            self._steps[cache]()
            rows[i] = backend.download(self._logits)[0]
        return rows


def read(model: Model, prompt: Sequence[int], plans: Sequence[Planned], progress: Progress | None = None,
         tile: int | None = None, master: SharedMaster | None = None) -> Reading:
    """One prefill that fills one cache per plan, from beginning to end; arguments and errors are read_in_steps'.

    While another thread is the first to read what the master keeps, this one waits for it.
    """
    # Closed here and now: while a traceback is kept somewhere, an interrupted pass would go on claiming the master.
    with (nullcontext() if master is None else master.turn(),
          closing(read_in_steps(model, prompt, plans, tile, master)) as steps):
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                reading: Reading = end.value
                return reading
            if progress is not None:
                progress(done, total)


def keep(model: Model, master: SharedMaster, progress: Progress | None = None) -> None:
    """Fill the master without a question; nothing to do where it is full, or where a paused pass is about to fill it.
    Raises DocumentError, OutOfMemory."""
    with master.turn(), _memory_for(master.ids), master.lend(master.ids) as (_, kept):
        if kept is None:
            return
        rope = model.rope(len(master.ids), len(master.ids))
        for done, total in prefill(model, master.ids, rope, (), None, model.backend.prefill_tile, kept=kept):
            if progress is not None:
                progress(done, total)


def read_in_steps(model: Model, prompt: Sequence[int], plans: Sequence[Planned], tile: int | None = None,
                  master: SharedMaster | None = None) -> Generator[tuple[int, int], None, Reading]:
    """One prefill that fills one cache per plan, a (layer, token tile) at every next(); yields (steps done, steps in
    all) and returns the Reading. Closed midway, it gives everything back.

    master: the prompt's first tokens, which are brought in from it, or kept in it where it is empty.
    Raises PromptError, PlanError or OutOfMemory before any work: the caches are there when this returns, so a plan
    that does not fit costs no prefill. A pending plan is made, on the thread that drives the steps, when the first
    layer is to be packed: CUDA has been handed that whole layer by then and works on it meanwhile. (A second thread
    would fight this one for the interpreter at every launch, and a CPU has no idle cores to win.) A layerwise plan
    comes in every layer, in the same way.
    tile: tokens of one step, None for the backend's own choice.
    """
    if not prompt:
        raise PromptError("the prompt is empty; give a context, a query or both")
    config = model.config
    for plan in plans:
        plan.layout.check(n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim,
                          window=config.sliding_window, prompt_tokens=len(prompt))
    with _memory_for(prompt):
        begin = time.perf_counter()
        rope = model.rope(len(prompt), len(prompt) + max(plan.layout.max_new for plan in plans))
        seconds = time.perf_counter() - begin
        # Allocation is no prefill, and the first one loads kernels: it is not timed.
        caches = tuple(Cache(model.backend, config, plan.layout, format_data(model.backend, config, plan.layout, rope))
                       for plan in plans)
        watched = _watched(model, plans)
    for cache, plan in zip(caches, plans, strict=True):
        cache.assign(plan if isinstance(plan, Plan) else plan.make if isinstance(plan, PendingPlan)
                     else LayerChoices(plan, watched[_grid(plan)]))
    return _filled(model, tuple(prompt), rope, caches, tuple(watched.values()), tile or model.backend.prefill_tile,
                   master, seconds)


def _filled(model: Model, prompt: tuple[int, ...], rope: tuple[Array, Array], caches: tuple[Cache, ...],
            watched: tuple[QueryAttention, ...], tile: int, master: SharedMaster | None,
            seconds: float) -> Generator[tuple[int, int], None, Reading]:
    """The steps of read_in_steps. seconds: what went by before; the caller's time between steps is not counted."""
    with _memory_for(prompt), nullcontext((None, None)) if master is None else master.lend(prompt) as (known, kept):
        begin = time.perf_counter()
        logits = model.backend.empty((1, model.config.vocab_size), np.float32)
        for step in prefill(model, prompt, rope, caches, logits, tile, watched, known, kept):
            seconds += time.perf_counter() - begin
            yield step
            begin = time.perf_counter()
        first = model.backend.download(logits).copy()
        seconds += time.perf_counter() - begin
        pack, plan, wait = (sum(parts) for parts in zip(*(cache.timing() for cache in caches), strict=True))
        looked = sum(attention.seconds() for attention in watched)
        timing = Timing(prefill=seconds - wait - looked, pack=pack, plan=plan + looked, wait=wait + looked)
        return Reading(model, prompt, caches, rope, first, timing, 0 if known is None else known.tokens)


@contextmanager
def _memory_for(prompt: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"no memory to read {len(prompt)} tokens: {error}; a shorter context needs less") from error


def _grid(plan: LayerwisePlan) -> tuple[range, int, int]:
    """What decides the masses of a prompt: plans that agree in it share them."""
    return plan.rows, plan.layout.prefix, plan.layout.chunk


def _watched(model: Model, plans: Sequence[Planned]) -> dict[tuple[range, int, int], QueryAttention]:
    layerwise = {_grid(plan): plan for plan in plans if isinstance(plan, LayerwisePlan)}
    return {grid: QueryAttention(model.backend, plan.layout, plan.rows) for grid, plan in layerwise.items()}


def _draw(model: Model, cache: Cache, rope: tuple[Array, Array], buffers: StepBuffers, logits: Array,
          draws: Draws) -> None:
    """Decode the token that cache.state names, and draw the next."""
    decode_step(model, cache, rope, buffers, logits)
    model.backend.sample(logits, draws, cache.state)
