"""Answers that a scheduler makes among others: what Model.submit and Document.submit return."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import replace

from cocktail.answer import Answer, Job, Stats, Transcript
from runtime.engine import PendingPlan, Planned, Reading
from runtime.errors import RequestCancelled
from runtime.plan import Plan
from runtime.request import Request, State
from runtime.scheduler import Scheduler
from runtime.stream import Stream


class Submission:
    """An answer on its way. Iterate it for pieces of text, with `for` or with `async for`, which leaves the event loop
    to others; `result()`, or `await`, gives the whole Answer.

    What ends it before it is complete is raised there: RequestCancelled, DeadlineExceeded, OutOfMemory, or what a
    scorer raised. One that nobody holds any more is cancelled, as when its consumer breaks off; pieces wait for their
    consumer for as long as it takes.
    """

    def __init__(self, scheduler: Scheduler, job: Job, priority: int = 0, deadline: float | None = None) -> None:
        self._course = course = _Course(job)
        self._ticket = scheduler.submit(Request(
            job.prompt, course.timed(job.plan), job.max_new, job.sampling, course.transcript.eos, job.master, priority,
            deadline, job.prefill_progress, course.take, course.end))

    @property
    def state(self) -> State:
        """One of "planning" (chunks are scored), "waiting" (for its turn, or memory), "reading", "running", "ended"."""
        return self._ticket.state

    @property
    def text(self) -> str:
        """What has come so far, taken or not."""
        return self._course.transcript.text

    @property
    def ids(self) -> tuple[int, ...]:
        """Those that have been drawn so far."""
        return self._ticket.ids

    @property
    def max_tokens(self) -> int:
        """At most so many are drawn."""
        return self._ticket.max_new

    @property
    def waited_s(self) -> float:
        """Seconds that went by before the prompt was read; scoring is not counted. Part of the statistics' ttft_s."""
        return self._ticket.waited_s

    @property
    def stats(self) -> Stats | None:
        """What the answer cost; None until it is complete."""
        return None if self._course.answer is None else self._course.answer.stats

    def cancel(self) -> None:
        """End it once the step that runs is done, and give its memory back; nothing happens where it has ended."""
        self._ticket.cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Until it has ended, well or not, at most so many seconds; whether it has."""
        return self._ticket.wait(timeout)

    def result(self, timeout: float | None = None) -> Answer:
        """The whole answer, once it is complete; pieces can still be taken. Raises TimeoutError after so many seconds,
        and what ended the request."""
        if not self.wait(timeout):
            raise TimeoutError(f"after {timeout:g} seconds the request is {self.state}")
        if self._course.answer is None:
            raise self._ticket.error or RequestCancelled("the request was cancelled")
        return self._course.answer

    def __await__(self) -> Generator[object, None, Answer]:
        return self._whole().__await__()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._course.pieces)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return await anext(self._course.pieces)

    async def _whole(self) -> Answer:
        await self._ticket.wait_async()
        return self.result()


class _Course:
    """The scheduler's side: ids become text on its thread, so that a stop string ends the answer at once. Knows nothing
    of the Submission, which its consumer alone keeps alive."""

    def __init__(self, job: Job) -> None:
        self.transcript = Transcript(job)
        self.pieces: Stream[str] = Stream()
        self.answer: Answer | None = None
        self._planned_s = 0.0

    def timed(self, plan: Planned) -> Planned:
        """The plan; a pending one's making is timed."""
        if not isinstance(plan, PendingPlan):
            return plan
        make = plan.make

        def timed() -> Plan:
            begin = time.perf_counter()
            made = make()
            self._planned_s = time.perf_counter() - begin
            return made

        return replace(plan, make=timed)

    def take(self, token: int) -> bool:
        if piece := self.transcript.push(token):
            self.pieces.put(piece)
        return self.transcript.ended

    def end(self, error: BaseException | None, reading: Reading | None) -> None:
        try:
            if error is None and reading is not None:
                if rest := self.transcript.finish():
                    self.pieces.put(rest)
                self.answer = self.transcript.answer(reading.plans[0], reading, self._planned_s)
        except Exception as raised:
            error = raised
            raise
        finally:
            self.pieces.end(error)
