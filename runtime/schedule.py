"""The order of a scheduler's work, without a thread of its own: `turn` does a little of everything, bounded in time.

    planning  ->  waiting  ->  reading  ->  running  ->  ended
    the plan      its turn     prefill      decode

Waiting requests are taken strictly in order: by arrival, a step of priority being worth `ageing` seconds of it. The
first that does not fit holds up those behind it; were they let past, a large request might wait for ever. One prompt is
read at a time, unless a request that comes before it in order fits beside it: then that one goes first.

Less memory may be left than the limit says: it lies in pieces, or other programs took it. A request that finds too
little beside others waits again, until one of them has ended.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from threading import Condition
from typing import Any, Protocol

from runtime.engine import PendingPlan, Planned, Reading
from runtime.errors import DeadlineExceeded, OutOfMemory, RequestCancelled, SchedulerError
from runtime.master import SharedMaster
from runtime.plan import Layout
from runtime.request import Entry, Request, State
from runtime.sampler import SamplingParams

WINDOW = 10.0  # seconds that rates are taken over


class Device(Protocol):
    """What does the work: runtime.batch.Decoder."""

    batch: int

    def needs(self, layout: Layout, shared: bool) -> tuple[int, int]: ...

    def read(self, prompt: tuple[int, ...], plan: Planned,
             master: SharedMaster | None) -> Generator[tuple[int, int], None, Reading]: ...

    def start(self, reading: Reading, params: SamplingParams, max_new: int, stop_ids: frozenset[int]) -> Any: ...

    def step(self, answers: list[Any]) -> list[int | Exception]: ...

    def forget(self) -> None: ...


@dataclass(frozen=True)
class SchedulerStats:
    """planning, waiting, reading, running: requests in each state. completed, cancelled, failed: those that have ended.

    bytes, limit: reserved now, and at most. tokens_per_second: drawn by all answers in the last ten seconds, over the
    time since the first of them. batch: answers per decode step in that time; together: how many of them share a pass
    over the weights at most, 1 where they take turns (float32 weights on CUDA).
    """

    planning: int
    waiting: int
    reading: int
    running: int
    completed: int
    cancelled: int
    failed: int
    bytes: int
    limit: int
    tokens_per_second: float
    batch: float
    together: int


class Schedule:
    """See Scheduler for the arguments. `add`, `stats`, `close` and an entry's cancel may be called by any thread;
    `turn` and `fail` by one, `make_plan` by another."""

    def __init__(self, device: Device, limit: int, max_running: int, pause: float, ageing: float,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit, self._device, self._max_running = limit, device, max_running
        self._pause, self._ageing, self._clock = pause, ageing, clock
        self.changed = Condition()  # guards the lists
        self._entries: dict[State, list[Entry]] = {
            state: [] for state in ("planning", "waiting", "reading", "running")}
        self._ended: Counter[str] = Counter()
        self._drawn: deque[tuple[float, int, int]] = deque()  # when, how many ids, in how many decode steps
        self._numbers = 0
        self._longest = 0.0  # prefill step, lately
        self._shared = limit  # bytes that requests may hold beside one another: less than that was not to be had
        self.closed: BaseException | None = None

    def add(self, request: Request) -> Entry:
        """Put it in line. Raises OutOfMemory where it can never fit, SchedulerError."""
        held, scratch = self._device.needs(request.plan.layout, request.master is not None)
        if held + scratch > self.limit:
            raise OutOfMemory(f"the request needs {held:,} bytes and {scratch:,} while it is read; the limit is "
                              f"{self.limit:,}: a lower --kv-bits, a shorter context or a smaller --max-tokens needs "
                              "less")
        with self.changed:
            if self.closed is not None:
                raise SchedulerError(f"no more requests are taken: {self.closed}") from self.closed
            self._numbers += 1
            now = self._clock()
            entry = Entry(request, self._numbers, now, (now - request.priority * self._ageing, self._numbers), held,
                          scratch, self._wake)
            self._entries[entry.state].append(entry)
            self.changed.notify_all()
        return entry

    @property
    def reserved(self) -> int:
        """Bytes that count now."""
        return sum(entry.reserved for state in ("reading", "running") for entry in self._entries[state])

    def turn(self) -> None:
        """End what is to end, let in what fits, read for at most `pause` seconds (a step at least), decode one step."""
        now = self._clock()
        for entry in self._all():
            if entry.cancelled:
                self._end(entry, RequestCancelled("the request was cancelled"))
            elif entry.expires is not None and now >= entry.expires:
                self._end(entry, DeadlineExceeded(f"the deadline of {entry.request.deadline:g} s passed while the "
                                                  f"request was {entry.state}, {len(entry.ids)} tokens drawn"))
        self._admit()
        self._read()
        self._decode()

    def make_plan(self) -> bool:
        """Make the plan of the first request that needs one; False where none does."""
        with self.changed:
            waiting = sorted(self._entries["planning"], key=_key)
            entry = next((entry for entry in waiting if not entry.cancelled), None)
        if entry is None:
            return False
        begin = self._clock()
        assert isinstance(entry.plan, PendingPlan)
        try:
            plan = entry.plan.make()
        except Exception as error:
            self._end(entry, error)
            return True
        entry.planning_s = self._clock() - begin
        with self.changed:
            if entry.state == "planning":  # it may have ended meanwhile
                entry.plan = plan
                self._move(entry, "waiting")
                self.changed.notify_all()
        return True

    def stats(self) -> SchedulerStats:
        """All that is known about its state at this moment."""
        with self.changed:
            now = self._clock()
            self._drop_old(now)
            tokens, steps = sum(n for _, n, _ in self._drawn), sum(step for _, _, step in self._drawn)
            seconds = now - self._drawn[0][0] if self._drawn else 0.0
            counts = {state: len(entries) for state, entries in self._entries.items()}
            return SchedulerStats(
                **counts, completed=self._ended["completed"], cancelled=self._ended["cancelled"],
                failed=self._ended["failed"], bytes=self.reserved, limit=self.limit,
                tokens_per_second=tokens / seconds if seconds else 0.0,
                batch=sum(n * step for _, n, step in self._drawn) / steps if steps else 0.0,
                together=self._device.batch)

    def wait_for_work(self) -> bool:
        """Until there is something for `turn`; False once it is closed and nothing is left."""
        with self.changed:
            while not self._is_due():
                if self.closed is not None and not self._all():
                    return False
                expiries = [entry.expires for entry in self._all() if entry.expires is not None]
                self.changed.wait(max(min(expiries) - self._clock(), 0.0) if expiries else None)
            return True

    def wait_for_plans(self) -> bool:
        """Until there is something for `make_plan`; False once it is closed and nothing is left to plan."""
        with self.changed:
            while not any(not entry.cancelled for entry in self._entries["planning"]):
                if self.closed is not None:
                    return False
                self.changed.wait()
            return True

    def close(self, why: BaseException, cancel: bool) -> None:
        """Take no more requests; cancel those there are, or let them end."""
        with self.changed:
            self.closed = self.closed or why
            for entry in self._all() if cancel else ():
                entry.cancelled = True
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The thread that drives this cannot go on: everything ends with its error."""
        self.close(error, cancel=False)
        for entry in self._all():
            self._end(entry, error)

    def _admit(self) -> None:
        while True:
            with self.changed:
                reading, running = self._entries["reading"], self._entries["running"]
                entry = min(self._entries["waiting"], key=_key, default=None)
                if entry is None or len(reading) + len(running) >= self._max_running:
                    return
                if reading and min(map(_key, reading)) < entry.key:
                    return
                reserved = self.reserved
                if reserved + entry.held + entry.scratch > (self._shared if reserved else self.limit):
                    return
                entry.reserved = entry.held + entry.scratch
                entry.waited_s = self._clock() - entry.arrived - entry.planning_s
                self._move(entry, "reading")

    def _read(self) -> None:
        """Prefill steps for as long as `pause` has room for another, so that running answers are not kept waiting. One
        prompt after the other: each that joins a batch has it made anew."""
        begin = self._clock()
        while self._entries["reading"]:
            entry, before = min(self._entries["reading"], key=_key), self._clock()
            if entry.cancelled:
                return
            self._read_step(entry)
            now = self._clock()
            self._longest = max(now - before, 0.9 * self._longest)
            if now - begin + self._longest > self._pause:
                return
            if entry.state != "reading":
                self._admit()

    def _read_step(self, entry: Entry) -> None:
        request = entry.request
        try:
            if entry.steps is None:
                assert entry.plan is not None
                entry.steps = self._device.read(request.prompt, entry.plan, request.master)
            try:
                done, total = next(entry.steps)
            except StopIteration as end:
                entry.steps, entry.reading = None, end.value
                entry.answer = self._device.start(end.value, request.sampling, request.max_new, request.stop_ids)
            else:
                if request.on_step is not None:
                    request.on_step(done, total)
                return
        except Exception as error:
            if not isinstance(error, OutOfMemory | MemoryError) or not self._put_back(entry, error):
                self._end(entry, error)
            return
        with self.changed:
            entry.reserved = entry.held
            self._move(entry, "running")
            self._drawn.append((self._clock(), 1, 0))
        self._deliver(entry, entry.answer.last)

    def _put_back(self, entry: Entry, error: Exception) -> bool:
        """Let a request that found too little memory wait for the others; False where there are none."""
        with self.changed:
            total = self.reserved
            if total == entry.reserved:
                return False
            self._shared = min(self._shared, total - 1)
            self._move(entry, "waiting")
        if entry.steps is not None:
            entry.steps.close()
        entry.steps = entry.reading = None
        _let_go(error)
        entry.reserved = 0
        return True

    def _decode(self) -> None:
        running = [entry for entry in self._entries["running"] if not entry.cancelled]
        if not running:
            return
        try:
            drawn = self._device.step([entry.answer for entry in running])
        except Exception as error:  # of none in particular
            drawn = [error] * len(running)
        with self.changed:
            self._drawn.append((self._clock(), len(running), 1))
            self._drop_old(self._clock())
        for entry, result in zip(running, drawn, strict=True):
            if isinstance(result, Exception):
                self._end(entry, result)
            else:
                self._deliver(entry, result)

    def _deliver(self, entry: Entry, token: int) -> None:
        request = entry.request
        entry.ids.append(token)
        entry.stream.put(token)
        try:
            enough = request.on_id is not None and request.on_id(token)
        except Exception as error:
            self._end(entry, error)
            return
        if enough or token in request.stop_ids or len(entry.ids) == request.max_new:
            self._end(entry, None)

    def _end(self, entry: Entry, error: BaseException | None) -> None:
        """The only way out: gives back what the request holds, and tells whoever waits for it. Once per request."""
        with self.changed:
            if entry.state == "ended":
                return
            self._move(entry, "ended")
        try:
            for under_way in (entry.steps, entry.answer):
                if under_way is not None:
                    under_way.close()
        except Exception as closing:
            error = error or closing
        if entry.answer is not None:
            self._device.forget()
        reading, entry.reading, entry.steps, entry.answer, entry.plan = entry.reading, None, None, None, None
        try:
            if entry.request.on_end is not None:
                entry.request.on_end(error, reading)
        except Exception as raised:
            error = error or raised
        _let_go(error)
        with self.changed:
            entry.reserved = 0
            self._ended["completed" if error is None else "cancelled" if isinstance(error, RequestCancelled)
                        else "failed"] += 1
            self.changed.notify_all()
        entry.stream.end(error)

    def _move(self, entry: Entry, state: State) -> None:
        self._entries[entry.state].remove(entry)
        entry.state = state
        if state != "ended":
            self._entries[state].append(entry)

    def _all(self) -> list[Entry]:
        with self.changed:
            return [entry for entries in self._entries.values() for entry in entries]

    def _is_due(self) -> bool:
        if any(self._entries[state] for state in ("waiting", "reading", "running")):
            return True
        now = self._clock()
        return any(entry.cancelled or (entry.expires is not None and now >= entry.expires)
                   for entry in self._entries["planning"])

    def _drop_old(self, now: float) -> None:
        while self._drawn and self._drawn[0][0] < now - WINDOW:
            self._drawn.popleft()

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()


def _key(entry: Entry) -> tuple[float, int]:
    return entry.key


def _let_go(error: BaseException | None) -> None:
    """The frames that an error came through hold caches; the error lives as long as someone holds the ticket."""
    chain: Iterable[BaseException | None] = (error, error and error.__cause__, error and error.__context__)
    for link in chain:
        if link is not None:
            traceback.clear_frames(link.__traceback__)
