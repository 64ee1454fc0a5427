"""Many requests with random lengths, cancellations and injected failures: nothing is lost, nothing leaks.

    python -m bench.soak [--model PATH] [--requests 200] [--seed 0]

Requests of a dozen kinds (lengths, policies, sampling) come at random to a scheduler whose limit holds a few of them.
Some are cancelled, some dropped, some have a deadline; plans, callbacks, allocations, draws and whole decode steps fail
at random. Every request has to end exactly once; whatever was drawn has to be the beginning of what the request draws
alone, all of it where it was completed; bytes in use have to return to zero; and resident memory has to stay where a
first quarter of the requests has left it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil

import cocktail
from bench.prompts import build_text
from bench.report import DEFAULT_MODEL, describe_run, emit, print_table, progress
from runtime.batch import Decoder
from runtime.engine import PendingPlan, read
from runtime.model import Model as Engine
from runtime.request import Request, Ticket
from runtime.sampler import SamplingParams
from runtime.scheduler import Scheduler

QUESTION = "What does this text explain?"
POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "budget", "kv_bits": 4}, {"policy": "fp16"}, {"policy": "kivi"}, {"policy": "uniform", "tier": "K4V2"},
    {"scorer": "attention", "kv_bits": 5})
SAMPLINGS = (SamplingParams(), SamplingParams(temperature=0.9, seed=3),
             SamplingParams(repetition_penalty=1.3, top_k=9, temperature=0.5, seed=5))
FATES = ("complete", "complete", "complete", "on_id", "on_step", "plan", "deadline", "cancel", "drop")
FLAT = 8 * 2**20  # bytes by which resident memory may differ: what keeps blocks from being given back
RARE = 0.002  # how often an operation of the device fails


class Injected(Exception):
    """A failure on purpose."""


@dataclass(frozen=True)
class Outcome:
    """Requests by their ends; lost: how many ended not once, or with other ids. grown: bytes of resident memory."""

    completed: int
    cancelled: int
    failed: int
    lost: int
    left: int
    grown: int
    seconds: float

    @property
    def good(self) -> bool:
        return not self.lost and not self.left and self.grown < FLAT and min(self.completed, self.cancelled,
                                                                             self.failed) > 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--context-tokens", type=int, default=200, help="of the longest kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="the last line in a file too")
    args = parser.parse_args(arguments)
    run, model = describe_run(), cocktail.load(args.model, backend="cpu", threads=args.threads)
    outcome = soak(model.engine, kinds(model, args.context_tokens), args.requests, args.seed, gap=0.4)
    print_table(["completed", "cancelled", "failed", "lost", "bytes left", "memory grown, MiB", "seconds"],
                [[outcome.completed, outcome.cancelled, outcome.failed, outcome.lost, outcome.left,
                  f"{outcome.grown / 2**20:.1f}", f"{outcome.seconds:.0f}"]])
    emit({"bench": "soak", **run, "model": str(args.model), "requests": args.requests, "seed": args.seed,
          **vars(outcome), "good": outcome.good}, args.json)
    if not outcome.good:
        raise SystemExit("requests were lost, or memory was")


def kinds(model: cocktail.Model, longest: int, n: int = 12) -> list[Request]:
    """Requests over texts of up to `longest` tokens, each of another length, policy, sampling and number of ids."""
    text = build_text(longest, lambda text: len(model.tokenizer.encode(text)))
    requests = []
    for i in range(n):
        doc = model.read(text[: len(text) * (i + 1) // n], chunk=16, keep=False)
        max_new = 2 + 5 * i % 23
        plan = doc.pending(QUESTION, max_tokens=max_new, **POLICIES[i % len(POLICIES)])
        requests.append(Request(doc.prompt(QUESTION), plan, max_new, SAMPLINGS[i % len(SAMPLINGS)]))
    return requests


def soak(engine: Engine, requests: Sequence[Request], n: int, seed: int, gap: float) -> Outcome:
    """n of the requests, at most `gap` seconds apart; a first quarter, not counted, warms up."""
    rng, begin = random.Random(seed), time.perf_counter()
    alone = [tuple(read(engine, request.prompt, [request.plan]).generate(request.sampling, request.max_new, ()))
             for request in requests]
    _round(engine, requests, alone, n // 4, rng, gap)
    before = _resident()
    stats, lost = _round(engine, requests, alone, n, rng, gap)
    return Outcome(stats.completed, stats.cancelled, stats.failed, lost, stats.bytes, _resident() - before,
                   time.perf_counter() - begin)


def _round(engine: Engine, requests: Sequence[Request], alone: Sequence[tuple[int, ...]], n: int, rng: random.Random,
           gap: float) -> tuple[cocktail.SchedulerStats, int]:
    """The scheduler's last statistics, and how many requests did not end as they should."""
    limit = 3 * max(sum(Decoder(engine).needs(request.plan.layout)) for request in requests)
    ends: list[list[BaseException | None]] = [[] for _ in range(n)]
    held: list[tuple[int, int, Ticket]] = []
    timers: list[threading.Timer] = []
    with _faults(engine.backend, random.Random(rng.random())), \
            Scheduler(engine, limit=limit, max_running=8, pause=min(gap, 0.05)) as scheduler:
        for i in range(n):
            kind, fate = rng.randrange(len(requests)), rng.choice(FATES)
            ticket = scheduler.submit(_doomed(requests[kind], fate, rng, gap, ends[i]))
            if fate == "cancel":
                timers.append(threading.Timer(rng.uniform(0, 10 * gap), ticket.cancel))
                timers[-1].start()
            if fate != "drop":
                held.append((i, kind, ticket))
            del ticket
            time.sleep(rng.uniform(0, gap))
            if i % 50 == 49:
                progress(f"{i + 1} of {n}: {scheduler.stats()}")
        for *_, ticket in held:
            ticket.wait()
    for timer in timers:
        timer.join()
    lost = sum(len(end) != 1 for end in ends)
    for i, kind, ticket in held:
        whole = alone[kind][: ticket.max_new]
        lost += ticket.ids != (whole if ends[i] == [None] else whole[: len(ticket.ids)])
    return scheduler.stats(), lost


def _doomed(request: Request, fate: str, rng: random.Random, gap: float,
            ends: list[BaseException | None]) -> Request:
    def fail(*_: object) -> Any:
        raise Injected(fate)

    request = replace(request, max_new=rng.randint(1, request.max_new), priority=rng.randint(0, 2),
                      on_end=lambda error, reading: ends.append(error))
    if fate == "deadline":
        return replace(request, deadline=rng.uniform(0.01, 20) * gap)
    if fate == "plan" and isinstance(request.plan, PendingPlan):
        return replace(request, plan=replace(request.plan, make=fail))
    return replace(request, on_id=fail) if fate == "on_id" else (
        replace(request, on_step=fail) if fate == "on_step" else request)


@contextmanager
def _faults(backend: Any, rng: random.Random) -> Iterator[None]:
    """Operations of the device fail now and then: allocations, single draws, and the steps of a whole batch."""
    def sometimes(operation: Callable[..., Any], error: type[Exception]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if rng.random() < RARE:
                raise error("on purpose")
            return operation(*arguments)

        return call

    healthy = {"arena": MemoryError, "sample": RuntimeError, "append": RuntimeError}
    for name, error in healthy.items():
        setattr(backend, name, sometimes(getattr(backend, name), error))
    try:
        yield
    finally:
        for name in healthy:
            delattr(backend, name)


def _resident() -> int:
    """Resident memory but for mapped files, whose pages come and go as the system likes, and for what malloc keeps of
    freed blocks: on glibc it gives that back first (tens of MiB, in an arena per thread)."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


if __name__ == "__main__":
    main()
