"""Many requests on one model: a thread that drives runtime.schedule, and another that makes plans. Speaks ids only."""

from __future__ import annotations

import threading
import weakref

from runtime.batch import Decoder
from runtime.errors import BackendError, OutOfMemory, SchedulerError
from runtime.model import Model
from runtime.request import Request, Ticket
from runtime.schedule import Device, Schedule, SchedulerStats


class Scheduler:
    """Requests wait until their bytes fit, are read between the steps of those that run, and decode together.

    limit: bytes that all requests may hold at once (arenas, and what their prefills need; not the weights, nor kept
    documents); None for nine tenths of the memory that is free now besides the weights and Backend.reserve.
    max_running: requests that are read or run at once. pause: seconds for which running answers may be kept waiting
    while prompts are read; one prefill step, if that is longer. ageing: seconds of waiting that a step of priority is
    worth. exact: on CUDA up to 128 sequences share a pass over the weights, and in a pass of more than 16 the last bits
    of logits may depend on the company; exact passes have no more.

    Requests are taken in order of arrival, higher priorities first; one that does not fit yet holds up those behind it.
    One failing request ends alone. On CUDA answers of a model with float32 weights take turns, a step each.
    A context manager: leaving it lets all requests end, after an error it cancels them.
    Raises SchedulerError for settings that make no sense, BackendError where the system does not say how much memory is
    free, OutOfMemory where there is none besides the weights.
    """

    def __init__(self, model: Model, *, limit: int | None = None, max_running: int = 16, pause: float = 0.1,
                 ageing: float = 10.0, exact: bool = False) -> None:
        decoder = Decoder(model, exact)
        if limit is None:
            if (free := decoder.free_bytes()) is None:
                raise BackendError("the system does not say how much memory is free: give the scheduler a limit")
            if free <= 0:
                raise OutOfMemory("no memory is free for any request besides the weights; free some, or give the "
                                  "scheduler a limit")
            limit = free * 9 // 10
        for name, value, least in (("limit", limit, 1), ("max_running", max_running, 1), ("pause", pause, 0),
                                   ("ageing", ageing, 0)):
            if value < least:
                raise SchedulerError(f"{name} is {value}; expected at least {least}")
        self._start(decoder, limit, max_running, pause, ageing)

    def _start(self, device: Device, limit: int, max_running: int, pause: float, ageing: float) -> None:
        self._schedule = Schedule(device, limit, max_running, pause, ageing)
        self._threads = [threading.Thread(target=work, args=(self._schedule,), name=f"cocktail {work.__name__[1:]}",
                                          daemon=True) for work in (_work, _plan)]
        # Threads must not outlive the scheduler, nor run kernels while the interpreter comes down.
        weakref.finalize(self, _stop, self._schedule, self._threads)
        for thread in self._threads:
            thread.start()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._schedule.closed is not None

    def submit(self, request: Request) -> Ticket:
        """Put a request in line. Raises OutOfMemory where it can never fit, with the figures, and SchedulerError."""
        return Ticket(self._schedule.add(request))

    def stats(self) -> SchedulerStats:
        """Requests in each state, bytes, tokens per second."""
        return self._schedule.stats()

    def close(self, drain: bool = True) -> None:
        """Take no more requests, and return when those there are have ended; drain=False cancels them."""
        self._schedule.close(SchedulerError("the scheduler was closed"), cancel=not drain)
        if threading.current_thread() not in self._threads:  # a callback may close it, but cannot wait for itself
            for thread in self._threads:
                thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)


def _work(schedule: Schedule) -> None:
    try:
        while schedule.wait_for_work():
            schedule.turn()
    except BaseException as error:
        schedule.fail(error)
        raise


def _plan(schedule: Schedule) -> None:
    try:
        while schedule.wait_for_plans():
            schedule.make_plan()
    except BaseException as error:
        schedule.close(error, cancel=True)
        raise


def _stop(schedule: Schedule, threads: list[threading.Thread]) -> None:
    schedule.close(SchedulerError("the scheduler is gone"), cancel=True)
    if threading.current_thread() is threading.main_thread():  # the collector may come by in one of the threads
        for thread in threads:
            thread.join()
