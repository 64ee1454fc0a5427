"""One request of a scheduler: what is asked (Request), where it stands (Entry), and what its sender holds (Ticket)."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.engine import PendingPlan, Planned, Reading
from runtime.errors import PromptError
from runtime.master import SharedMaster
from runtime.sampler import SamplingParams
from runtime.stream import Stream

State = Literal["planning", "waiting", "reading", "running", "ended"]


@dataclass(frozen=True)
class Request:
    """An answer to be made of ids. plan covers all tokens of prompt; master: its first tokens, kept between requests.

    priority: higher ones come first. deadline: seconds from submission within which the answer must be complete.
    The rest is called on the scheduler's threads, and what it raises ends this request alone: on_step(done, total)
    after each step of the prefill; on_id(id) for every id, True where no more are wanted; on_end(error, reading) last,
    once, with what it ended with.
    """

    prompt: tuple[int, ...]
    plan: Planned
    max_new: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    master: SharedMaster | None = None
    priority: int = 0
    deadline: float | None = None
    on_step: Callable[[int, int], None] | None = None
    on_id: Callable[[int], bool] | None = None
    on_end: Callable[[BaseException | None, Reading | None], None] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_new <= self.plan.layout.max_new:
            raise PromptError(f"{self.max_new} new tokens are asked for; expected 1 to {self.plan.layout.max_new}, for "
                              "which the plan has room")
        if self.deadline is not None and self.deadline <= 0:
            raise PromptError(f"the deadline is {self.deadline:g} seconds; expected more than 0")


@dataclass(eq=False)
class Entry:
    """A request on its way. Only the scheduler's threads write to it, `cancel` apart.

    key: its place in line, smaller first. held, scratch: bytes until its end, and while it is read; reserved: those
    that count now. steps: its prefill, while it is read; answer: while it runs.
    """

    request: Request
    number: int
    arrived: float
    key: tuple[float, int]
    held: int
    scratch: int
    wake: Callable[[], None]
    state: State = "waiting"
    reserved: int = 0
    cancelled: bool = False
    plan: Planned | None = None
    planning_s: float = 0.0
    waited_s: float = 0.0
    steps: Generator[tuple[int, int], None, Reading] | None = None
    reading: Reading | None = None
    answer: Any = None
    ids: list[int] = field(default_factory=list)
    stream: Stream[int] = field(default_factory=Stream)

    def __post_init__(self) -> None:
        self.plan = self.request.plan
        if isinstance(self.plan, PendingPlan):
            self.state = "planning"

    @property
    def expires(self) -> float | None:
        """When the deadline passes, by the scheduler's clock."""
        return None if self.request.deadline is None else self.arrived + self.request.deadline

    def cancel(self) -> None:
        if self.state != "ended":
            self.cancelled = True
            self.wake()


class Ticket:
    """What the sender of a request holds: iterate it for ids, with `for` or `async for`.

    The iteration ends with the answer, or raises what ended the request: RequestCancelled, DeadlineExceeded,
    OutOfMemory, or what a plan, a callback or the device raised. A ticket that nobody holds any more cancels its
    request; ids wait for their consumer however long it takes, since there are at most max_new of them.
    """

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        weakref.finalize(self, entry.cancel).atexit = False

    @property
    def state(self) -> State:
        """One of "planning", "waiting", "reading", "running", "ended"."""
        return self._entry.state

    @property
    def ids(self) -> tuple[int, ...]:
        """Those that have been drawn so far, taken or not."""
        return tuple(self._entry.ids)

    @property
    def max_new(self) -> int:
        """At most so many ids."""
        return self._entry.request.max_new

    @property
    def waited_s(self) -> float:
        """Seconds from submission to the first step of the prefill, the making of its plan left out."""
        return self._entry.waited_s

    @property
    def planning_s(self) -> float:
        """Seconds that making the plan took before that."""
        return self._entry.planning_s

    @property
    def error(self) -> BaseException | None:
        """What ended the request before its answer was complete."""
        return self._entry.stream.error

    def cancel(self) -> None:
        """End the request as soon as the step that runs is done. Nothing happens where it has ended."""
        self._entry.cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Until the request has ended, at most so many seconds; whether it has."""
        return self._entry.stream.wait(timeout)

    async def wait_async(self) -> None:
        """Until the request has ended."""
        await self._entry.stream.wait_async()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self._entry.stream)

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        return await anext(self._entry.stream)
