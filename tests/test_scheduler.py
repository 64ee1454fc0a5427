"""The scheduler on a real, tiny model: answers are those of each request alone, whoever shares the steps; failures end
one request alone; threads and memory go when they are done."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
from numpy_backend import NumpyBackend
from varied_requests import request_for

import cocktail
from kernels_c import cache_ops
from runtime.backend import STATE_DRAWN, STATE_POSITION, STATE_TOKEN
from runtime.batch import Decoder
from runtime.checkpoint import Checkpoint
from runtime.engine import PendingPlan, read
from runtime.errors import (
    BackendError,
    DeadlineExceeded,
    OutOfMemory,
    RequestCancelled,
    SchedulerError,
)
from runtime.master import Exchange, Master
from runtime.model import Model
from runtime.request import Request
from runtime.sampler import SamplingParams
from runtime.scheduler import Scheduler
from runtime.weights import load_weights


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_model.save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(path):
    return cocktail.load(path, backend="cpu", threads=1)


def alone(model, request: Request) -> list[int]:
    reading = read(model.engine, request.prompt, [request.plan])
    return list(reading.generate(request.sampling, request.max_new, request.stop_ids))


def outcome(ticket) -> list[int] | BaseException:
    """All ids, or what ended them."""
    assert ticket.wait(60), "it did not end"
    return ticket.error or list(ticket)


def test_in_a_batch_every_logit_is_what_it_is_alone(model):
    requests = [request_for(model, i) for i in range(12)]
    decoder = Decoder(model.engine)
    members = [decoder.start(read(model.engine, request.prompt, [request.plan]), request.sampling, request.max_new,
                             frozenset()) for request in requests]
    ids = [[member.last] for member in members]
    logits = [[] for _ in members]
    for _ in range(max(request.max_new for request in requests)):
        going = [i for i, request in enumerate(requests) if len(ids[i]) < request.max_new]
        if not going:
            break
        for i, drawn in zip(going, decoder.step([members[i] for i in going]), strict=True):
            ids[i].append(drawn)
            logits[i].append(decoder._batches[0]._logits[going.index(i)].copy())
    for i, request in enumerate(requests):
        reading = read(model.engine, request.prompt, [request.plan])
        assert list(reading.generate(request.sampling, request.max_new, ())) == ids[i]
        assert np.array_equal(reading.force(ids[i])[1:], logits[i])


def test_the_oracle_decodes_batches_too(path):
    with Checkpoint.open(path) as checkpoint:
        backend = NumpyBackend()
        engine = Model(checkpoint.config, load_weights(checkpoint, backend), backend)
    model = SimpleNamespace(engine=engine, read=cocktail.load(path, backend="cpu", threads=1).read)
    requests = [replace(request_for(model, i), sampling=SamplingParams()) for i in (0, 4)]
    with Scheduler(engine, limit=10**9) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        assert [outcome(ticket) for ticket in tickets] == [alone(model, request) for request in requests]


class GatheredRows:
    """BatchRows by NumPy. failing: how many draws of its last sequence succeed."""

    def __init__(self, backend, states, ropes, draws, failing):
        self.backend, self.sequences, self.failing = backend, list(zip(states, ropes, draws, strict=True)), failing
        self.found = [None] * len(states)

    def gather(self, state, token, *rope):
        for b, (own, tables, _) in enumerate(self.sequences):
            state[b], token[b] = own, own[STATE_TOKEN]
            for rows, table in zip(rope, tables, strict=True):
                rows[b] = table[own[STATE_POSITION]]

    def sample(self, logits):
        for b, (own, _, draws) in enumerate(self.sequences):
            self.backend.sample(logits[b : b + 1], draws, own)
        if own[STATE_DRAWN] > self.failing:
            self.found[-1] = RuntimeError("every logit is NaN")

    def errors(self):
        return self.found


def test_a_batch_that_gathers_goes_with_its_last_reference(path):
    """It holds its members' arenas; on a GPU these are gigabytes, which no collector looks for."""
    with Checkpoint.open(path) as checkpoint:
        backend = NumpyBackend()
        engine = Model(checkpoint.config, load_weights(checkpoint, backend), backend)
    backend.bind_rows = lambda *arrays: GatheredRows(backend, *arrays, 99)
    request = request_for(cocktail.load(path, backend="cpu", threads=1), 1, sampling=SamplingParams())
    decoder = Decoder(engine)
    member = decoder.start(read(engine, request.prompt, [request.plan]), request.sampling, 3, frozenset())
    gc.disable()
    try:
        decoder.step([member])
        batch = weakref.ref(decoder._batches[0])
        decoder.forget()
        assert batch() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("failing", [99, 4])
def test_a_backend_may_gather_and_draw_for_all_at_once(path, failing):
    """With a row more than a single sequence has; what fails in a draw is one member's."""
    with Checkpoint.open(path) as checkpoint:
        backend = NumpyBackend(least_batch=2)
        engine = Model(checkpoint.config, load_weights(checkpoint, backend), backend)
    backend.bind_rows = lambda *arrays: GatheredRows(backend, *arrays, failing)
    read_by = cocktail.load(path, backend="cpu", threads=1).read
    requests = [request_for(SimpleNamespace(read=read_by), i, sampling=SamplingParams()) for i in (0, 1, 4)]
    expected = [alone(SimpleNamespace(engine=engine), request) for request in requests]
    with Scheduler(engine, limit=10**9) as scheduler:
        results = [outcome(ticket) for ticket in [scheduler.submit(request) for request in requests]]
    assert results[:1] == expected[:1]
    assert results == expected if failing > 20 else str(results[2]) == "every logit is NaN"


@pytest.mark.parametrize(("max_batch", "exact_batch", "together"), [(16, 16, 16), (16, 3, 3), (3, 16, 3), (1, 16, 1)])
def test_answers_are_those_of_each_request_alone(model, monkeypatch, max_batch, exact_batch, together):
    """In one pass, in passes of three, and in turns."""
    monkeypatch.setattr(model.backend, "max_batch", max_batch)
    monkeypatch.setattr(model.backend, "exact_batch", exact_batch)
    requests = [request_for(model, i) for i in range(8)]
    with Scheduler(model.engine, pause=0.002, exact=True) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        results = [outcome(ticket) for ticket in tickets]
        stats = scheduler.stats()
    assert results == [alone(model, request) for request in requests]
    assert (stats.completed, stats.bytes, stats.together) == (8, 0, together)
    assert stats.batch > 1 and stats.tokens_per_second > 0


def test_failures_end_one_request_alone(model, monkeypatch):
    """Memory, the plan, the prefill, each callback, the deadline, the sender, the consumer. Draws: the next test."""
    def fail(*_):
        raise ZeroDivisionError("on purpose")

    arena, refusals = model.backend.arena, [True]
    healthy = [request_for(model, i) for i in range(3)]
    expected = [alone(model, request) for request in healthy]
    base = request_for(model, 1, max_new=8)
    pending = request_for(model, 0)
    assert isinstance(pending.plan, PendingPlan)
    layerwise = request_for(model, 5)
    failing = {
        "plan": replace(pending, plan=replace(pending.plan, make=fail)),
        "prefill": replace(layerwise, plan=replace(layerwise.plan, choose=fail)),
        "prompt": replace(base, prompt=base.prompt[:-1]), "on_step": replace(base, on_step=fail),
        "on_id": replace(base, on_id=fail), "on_end": replace(base, on_end=fail), "late": replace(base, deadline=1e-6)}

    def refuse(nbytes):
        if threading.current_thread().name == "cocktail work" and refusals:
            refusals.pop()
            raise MemoryError("nothing left")
        return arena(nbytes)

    monkeypatch.setattr(model.backend, "arena", refuse)
    with Scheduler(model.engine) as scheduler:
        first = outcome(scheduler.submit(base))
        assert isinstance(first, OutOfMemory) and "nothing left" in str(first)
        tickets = {name: scheduler.submit(request) for name, request in failing.items()}
        tickets["cancelled"] = scheduler.submit(base)
        tickets["cancelled"].cancel()
        good = [scheduler.submit(request) for request in healthy]
        scheduler.submit(base)  # nobody holds its ticket
        assert [outcome(ticket) for ticket in good] == expected
        ends = {name: outcome(ticket) for name, ticket in tickets.items()}
    assert isinstance(ends.pop("cancelled"), RequestCancelled) and isinstance(ends.pop("late"), DeadlineExceeded)
    assert type(ends.pop("prompt")).__name__ == "PlanError"
    assert {str(error) for error in ends.values()} == {"on purpose"}
    stats = scheduler.stats()
    assert (stats.completed, stats.cancelled, stats.failed, stats.bytes) == (3, 2, 8, 0)


def test_a_draw_that_fails_ends_its_own_answer(model, monkeypatch):
    requests = [request_for(model, i, max_new=3) for i in range(4)]
    expected = [alone(model, request) for request in requests]
    sample, doomed = model.backend.sample, requests[2].sampling.temperature

    def failing(logits, draws, state):
        if state[3] == 1 and draws.options[0] == doomed and threading.current_thread().name == "cocktail work":
            raise RuntimeError("every logit is NaN")
        sample(logits, draws, state)

    monkeypatch.setattr(model.backend, "sample", failing)
    with Scheduler(model.engine) as scheduler:
        results = [outcome(ticket) for ticket in [scheduler.submit(request) for request in requests]]
    assert str(results.pop(2)) == "every logit is NaN"
    expected.pop(2)
    assert results == expected


@pytest.mark.parametrize("name", ["append", "bind_batch"])
def test_a_step_that_fails_for_all_is_tried_one_by_one(model, monkeypatch, name):
    """Memory that is short for a batch may do for one sequence, in the step as before it."""
    requests = [request_for(model, i) for i in range(5)]
    operation = getattr(model.backend, name)

    def short(*arguments):
        if len(arguments[-1]) > 1:  # a state, or bounds, for each
            raise MemoryError("none for so many")
        return operation(*arguments)

    monkeypatch.setattr(model.backend, name, short)
    with Scheduler(model.engine) as scheduler:
        results = [outcome(ticket) for ticket in [scheduler.submit(request) for request in requests]]
    assert results == [alone(model, request) for request in requests]


@pytest.mark.parametrize("name", ["arena", "embed"])
def test_who_finds_no_memory_beside_others_waits_for_them(model, monkeypatch, name):
    """Two caches have room, a third neither as it is allocated nor as its prefill begins. It is given back at once."""
    requests = [request_for(model, i) for i in range(5)]
    expected = [alone(model, request) for request in requests]
    arenas, arena, operation, refused = [], model.backend.arena, getattr(model.backend, name), []

    def watched(nbytes):
        made = arena(nbytes)
        arenas.append(weakref.ref(made.base))
        return made

    def short(*arguments):
        if sum(ref() is not None for ref in arenas) > (1 if name == "arena" else 2):
            refused.append(name)
            raise MemoryError("none for so many")
        return watched(*arguments) if name == "arena" else operation(*arguments)

    monkeypatch.setattr(model.backend, "arena", watched)
    monkeypatch.setattr(model.backend, name, short)
    gc.disable()
    try:
        with Scheduler(model.engine) as scheduler:
            results = [outcome(ticket) for ticket in [scheduler.submit(request) for request in requests]]
    finally:
        gc.enable()
    assert results == expected and 0 < len(refused) < len(requests)


def test_the_limit_is_measured_or_given(model, monkeypatch):
    free = model.backend.free_bytes()
    with Scheduler(model.engine) as scheduler:
        assert 0.5 * free < scheduler.stats().limit < free
    request = request_for(model, 1)
    held, scratch = Decoder(model.engine).needs(request.plan.layout)
    with Scheduler(model.engine, limit=held + scratch - 1) as scheduler, pytest.raises(OutOfMemory, match="the limit"):
        scheduler.submit(request)
    with Scheduler(model.engine, limit=held + scratch) as scheduler:
        assert outcome(scheduler.submit(request)) == alone(model, request)
    with pytest.raises(SchedulerError, match="max_running is 0"):
        Scheduler(model.engine, max_running=0)
    monkeypatch.setattr(model.backend, "free_bytes", lambda: model.weights_bytes)
    with pytest.raises(OutOfMemory, match="besides the weights"):
        Scheduler(model.engine)
    monkeypatch.setattr(model.backend, "free_bytes", lambda: None)
    with pytest.raises(BackendError, match="give the scheduler a limit"):
        Scheduler(model.engine)


@pytest.mark.parametrize("reserve", [0, 9_999])
@pytest.mark.parametrize("mapped", [True, False])
def test_free_memory_leaves_room_for_mapped_weights_and_scratch(model, monkeypatch, mapped, reserve):
    """Weights that are on a device already are not in what is free there."""
    free = 10 * model.weights_bytes
    for name, value in (("free_bytes", lambda: free), ("maps_weights", mapped), ("reserve", reserve)):
        monkeypatch.setattr(model.backend, name, value)
    room = free - reserve - model.weights_bytes * mapped
    assert Decoder(model.engine).free_bytes() == room
    with Scheduler(model.engine) as scheduler:
        assert scheduler.stats().limit == room * 9 // 10


def test_closing_drains_or_cancels_and_threads_end(model):
    before = threading.active_count()
    scheduler = Scheduler(model.engine)
    ticket = scheduler.submit(request_for(model, 1))
    scheduler.close()
    assert ticket.error is None and ticket.state == "ended" and len(ticket.ids) == ticket._entry.request.max_new
    with pytest.raises(SchedulerError, match="was closed"):
        scheduler.submit(request_for(model, 1))
    with pytest.raises(KeyError), Scheduler(model.engine) as scheduler:
        ticket = scheduler.submit(request_for(model, 1))
        raise KeyError
    assert isinstance(ticket.error, RequestCancelled)
    dropped = Scheduler(model.engine)
    gone = weakref.ref(dropped)
    ticket = dropped.submit(request_for(model, 1))
    del dropped
    gc.collect()
    assert gone() is None and isinstance(outcome(ticket), RequestCancelled)
    assert threading.active_count() == before


def test_an_ended_request_holds_no_cache(model, monkeypatch):
    """However it ends, its arena is given back at once, while the ticket and the error are still held."""
    arenas, arena = [], model.backend.arena

    def watched(nbytes):
        made = arena(nbytes)
        arenas.append(weakref.ref(made.base))
        return made

    monkeypatch.setattr(model.backend, "arena", watched)

    def fail(token):
        raise ZeroDivisionError

    requests = [request_for(model, 1), request_for(model, 3, on_id=fail)]
    layerwise = request_for(model, 5)
    requests.append(replace(layerwise, plan=replace(layerwise.plan, choose=fail)))
    gc.disable()
    try:
        with Scheduler(model.engine) as scheduler:
            tickets = [scheduler.submit(request) for request in requests]
            errors = [outcome(ticket) for ticket in tickets]
            scheduler.close()
            assert len(arenas) == len(errors) and all(ref() is None for ref in arenas)
    finally:
        gc.enable()


@pytest.mark.parametrize(("asynchronous", "layers"), [(False, 1), (True, 2)])
def test_a_layer_that_is_copied_beside_computing_counts(model, asynchronous, layers):
    backend, layout = NumpyBackend(asynchronous=asynchronous), request_for(model, 1).plan.layout
    engine = replace(model.engine, backend=backend)
    config, shape = engine.config, (engine.config.n_kv_heads, layout.prompt_tokens, engine.config.head_dim)
    alone, shared = (Decoder(engine).needs(layout, shared)[1] for shared in (False, True))
    master = Master.empty(backend, config, layout.prompt_tokens, "memory")
    for kept, needs, expected in ((None, alone, 1), (master, shared, layers)):
        buffers = Exchange(backend, shape, config.n_layers, None, kept)._buffers
        assert len(buffers) == expected
        assert needs - alone == (expected - 1) * sum(array.nbytes for array in buffers[0])


def test_what_a_request_needs_is_what_it_allocates(model, monkeypatch):
    """Live bytes of the backend's buffers: never above what admission reserved, and not far below at their peak."""
    live, peak = [0], [0]

    def counted(allocate):
        def call(*arguments):
            made = allocate(*arguments)
            root = made if made.base is None else made.base
            live[0] += made.nbytes
            peak[0] = max(peak[0], live[0])
            weakref.finalize(root, lambda nbytes=made.nbytes: live.__setitem__(0, live[0] - nbytes))
            return made

        return call

    requests = [request_for(model, i) for i in range(12)]
    for name in ("empty", "arena", "upload"):
        monkeypatch.setattr(model.backend, name, counted(getattr(model.backend, name)))
    monkeypatch.setattr(cache_ops, "allocate", counted(cache_ops.allocate))  # RoPE's tables as decode reads them
    decoder = Decoder(model.engine)
    for request in requests:
        held, scratch = decoder.needs(request.plan.layout)
        peak[0] = live[0]
        steps = decoder.read(request.prompt, request.plan, None)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                member = decoder.start(end.value, request.sampling, request.max_new, frozenset())
                break
        del steps
        read_peak, after = peak[0], live[0]
        decoder.step([member])
        stepping = live[0]
        assert after <= stepping <= held < 1.05 * stepping + 4096
        assert held + scratch >= read_peak >= 0.9 * (held + scratch)
        decoder.forget()
        del member
        assert live[0] == 0
