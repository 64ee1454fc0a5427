"""Random schedules on a device that only counts, by a clock that only the work moves: every request ends exactly once
and as it should, bytes return to zero and stay under the limit, nobody waits for ever."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import PendingPlan
from runtime.errors import DeadlineExceeded, OutOfMemory, PromptError, RequestCancelled, SchedulerError
from runtime.plan import FP16, DocumentShape, Plan
from runtime.request import Request, Ticket
from runtime.schedule import Schedule

HELD, SCRATCH, STEP_S, DECODE_S = 10, 3, 1.0, 0.25  # bytes per prompt token; seconds
STOP = 7
STAGES = ("plan", "begin", "prefill", "start", "decode", "on_step", "on_id", "on_end")


class Injected(Exception):
    pass


@dataclass
class Answer:
    """Ids 100, 101, ... of a prompt; the id STOP where the answer is to end early."""

    device: Device
    request: Any
    drawn: int = 0
    last: int = 100

    def close(self) -> None:
        self.device.in_use -= HELD * len(self.request.prompt)


@dataclass
class Device:
    """Bytes of what is read or runs; prompt[0] says which request it is, device.specs what is to go wrong with it."""

    limit: int
    batch: int = 4
    now: float = 0.0
    in_use: int = 0
    room: int | None = None  # bytes that there are, where it is less than the limit
    refused: int = 0  # requests that found too few
    specs: dict[int, Spec] = field(default_factory=dict)
    reads: list[int] = field(default_factory=list)  # requests in the order of their first steps
    decoded_at: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def needs(self, layout, shared):
        return HELD * layout.prompt_tokens, SCRATCH * layout.prompt_tokens

    def read(self, prompt, plan, master):
        spec = self.specs[prompt[0]]
        assert isinstance(plan, Plan), "it is read before its plan is made"
        if spec.fails == "begin":
            raise OutOfMemory("nothing left")
        nbytes = (HELD + SCRATCH) * len(prompt)
        if self.room is not None and self.in_use + nbytes > self.room:
            self.refused += 1
            raise OutOfMemory("nothing left")
        self.take(nbytes)
        return self.steps(prompt, spec)

    def steps(self, prompt, spec):
        given_back = (HELD + SCRATCH) * len(prompt)
        try:
            self.reads.append(prompt[0])
            for done in range(1, spec.steps + 1):
                self.now += STEP_S
                if spec.fails == "prefill" and done == spec.steps:
                    raise Injected("prefill")
                yield done, spec.steps
            given_back = SCRATCH * len(prompt)
            return spec
        finally:
            self.in_use -= given_back

    def start(self, spec, params, max_new, stop_ids):
        if spec.fails == "start":
            self.in_use -= HELD * len(spec.request.prompt)  # what a Reading that is dropped gives back
            raise Injected("start")
        return Answer(self, spec.request)

    def step(self, answers):
        assert answers
        self.now += DECODE_S
        self.decoded_at.append(self.now)
        return [self.next_id(answer) for answer in answers]

    def next_id(self, answer):
        spec = self.specs[answer.request.prompt[0]]
        answer.drawn += 1
        if spec.fails == "decode" and answer.drawn == 2:
            return Injected("decode")
        answer.last = STOP if answer.drawn == spec.stops_at else 100 + answer.drawn
        return answer.last

    def forget(self):
        pass

    def take(self, nbytes: int) -> None:
        self.in_use += nbytes
        assert self.in_use <= self.limit, "more than the limit"


@dataclass
class Spec:
    """One request: sizes, what goes wrong, and how it ended."""

    tokens: int = 5
    steps: int = 2
    max_new: int = 4
    stops_at: int | None = None
    priority: int = 0
    deadline: float | None = None
    pending: bool = False
    fails: str | None = None
    ticket: Ticket | None = None
    entry: Any = None
    ends: list[Any] = field(default_factory=list)
    let_go: bool = False  # cancelled, or its ticket is gone
    request: Any = None

    @property
    def ids(self) -> list[int]:
        """What a whole answer holds."""
        n = min(self.max_new, len(self.ids_until_stop))
        return self.ids_until_stop[:n]

    @property
    def ids_until_stop(self) -> list[int]:
        if self.stops_at is None or self.stops_at < 1:
            return [100 + i for i in range(self.max_new)]
        return [*(100 + i for i in range(self.stops_at)), STOP]


def submit(schedule: Schedule, spec: Spec) -> None:
    device, number = schedule._device, len(schedule._device.specs)
    device.specs[number] = spec
    shape = DocumentShape(n_layers=1, n_kv_heads=1, head_dim=8, chunk=8, n_chunks=0, prefix=spec.tokens, remainder=0,
                          suffix=0, max_new=spec.max_new, window=None)
    layout = shape.layout([FP16], [0])
    plan = Plan(layout, ((),), policy="fp16", scorer="none")

    def failing(stage, result=None):
        def call(*_):
            if spec.fails == stage:
                raise Injected(stage)
            return result
        return call

    def on_end(error, reading):
        spec.ends.append(error)
        failing("on_end")()

    spec.request = Request(
        (number,) * spec.tokens, PendingPlan(layout, failing("plan", plan)) if spec.pending else plan, spec.max_new,
        stop_ids=frozenset([STOP]), priority=spec.priority, deadline=spec.deadline, on_step=failing("on_step"),
        on_id=failing("on_id", False), on_end=on_end)
    spec.entry = schedule.add(spec.request)
    spec.ticket = Ticket(spec.entry)


def run_out(schedule: Schedule) -> int:
    """Turns until nothing is left, plans made meanwhile."""
    turns = 0
    while any(schedule._entries.values()):
        schedule.make_plan()
        schedule.turn()
        turns += 1
        assert turns < 10_000, "somebody waits for ever"
    return turns


def check_end(spec: Spec) -> None:
    """It ended once, in a way that its fate allows, and whoever holds the ticket is told the same."""
    assert len(spec.ends) == 1 and spec.entry.state == "ended" and spec.entry.stream.ended
    error, ids = spec.entry.stream.error, spec.entry.ids
    allowed: list[type] = []
    if spec.let_go:
        allowed.append(RequestCancelled)
    if spec.deadline is not None:
        allowed.append(DeadlineExceeded)
    stage = spec.fails
    fails = stage is not None and (stage != "plan" or spec.pending) and (stage != "decode" or len(spec.ids) > 2)
    if fails:
        allowed.append(OutOfMemory if stage == "begin" else Injected)
    assert ids == spec.ids[: len(ids)]
    if error is None:
        assert ids == spec.ids and not fails
    else:
        assert isinstance(error, tuple(allowed)), repr(error)
        assert not isinstance(error, Injected) or str(error) == stage
    if spec.ticket is not None:
        taken = []
        try:
            for token in spec.ticket:
                taken.append(token)
        except Exception as raised:
            assert raised is error
        else:
            assert error is None
        assert taken == ids


specs = st.builds(
    Spec, tokens=st.integers(1, 20), steps=st.integers(1, 5), max_new=st.integers(1, 6),
    stops_at=st.none() | st.integers(1, 6), priority=st.integers(-2, 2), deadline=st.none() | st.floats(0.5, 30),
    pending=st.booleans(), fails=st.none() | st.sampled_from(STAGES))
actions = st.lists(st.one_of(
    st.tuples(st.just("submit"), specs), st.tuples(st.just("turn"), st.integers(1, 4)),
    st.tuples(st.just("plan"), st.none()), st.tuples(st.sampled_from(["cancel", "drop"]), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.floats(0, 5))), max_size=60)


@settings(max_examples=150, deadline=None)
@given(actions=actions, max_running=st.integers(1, 6), pause=st.sampled_from([0.0, 2.5, 100.0]),
       limit=st.integers(13 * 20, 13 * 60))
def test_every_request_ends_once_and_nothing_is_left(actions, max_running, pause, limit):
    device = Device(limit)
    schedule = Schedule(device, limit, max_running, pause, ageing=5, clock=device.clock)
    for action, value in actions:
        if action == "submit":
            submit(schedule, value)
        elif action == "turn":
            for _ in range(value):
                schedule.turn()
                assert device.in_use <= schedule.reserved <= limit
                assert device.in_use == schedule.reserved or schedule._entries["reading"]
                assert len(schedule._entries["reading"]) + len(schedule._entries["running"]) <= max_running
        elif action == "plan":
            schedule.make_plan()
        elif action == "wait":
            device.now += value
        elif value < len(device.specs):
            spec = device.specs[value]
            spec.let_go |= spec.entry.state != "ended"
            if action == "cancel":
                spec.entry.cancel()
            else:
                spec.ticket = None
                gc.collect(0)
    work = sum(spec.steps + spec.max_new for spec in device.specs.values())
    assert run_out(schedule) <= work + 2 * len(device.specs) + 1, "turns that did nothing"
    for spec in device.specs.values():
        check_end(spec)
    stats = schedule.stats()
    assert (stats.bytes, device.in_use) == (0, 0)
    assert stats.planning == stats.waiting == stats.reading == stats.running == 0
    errors = [spec.entry.stream.error for spec in device.specs.values()]
    assert stats.completed == sum(error is None for error in errors)
    assert stats.cancelled == sum(isinstance(error, RequestCancelled) for error in errors)
    assert stats.failed == len(errors) - stats.completed - stats.cancelled


def make(limit=13 * 40, max_running=4, pause=2.5, ageing=5.0) -> tuple[Schedule, Device]:
    device = Device(limit)
    return Schedule(device, limit, max_running, pause, ageing, clock=device.clock), device


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=2, max_size=8),
       pause=st.sampled_from([0.0, 1.0, 2.5, 4.0]))
def test_running_answers_wait_for_no_more_than_the_pause(costs, pause):
    schedule, device = make(limit=10**6, max_running=8, pause=pause)
    submit(schedule, Spec(max_new=200, steps=1))
    schedule.turn()
    for steps, max_new in costs:
        submit(schedule, Spec(steps=steps, max_new=max_new))
    schedule.turn()  # how long a step takes is known from here on
    del device.decoded_at[:-1]
    while device.specs[len(costs)].entry.state != "ended":
        schedule.turn()
    gaps = [b - a for a, b in zip(device.decoded_at, device.decoded_at[1:], strict=False)]
    assert max(gaps) <= max(pause, STEP_S) + DECODE_S


@pytest.mark.parametrize(("pause", "read"), [(2.0, 2), (6.5, 6), (100.0, 8)])
def test_as_many_prompts_are_read_before_a_step_as_the_pause_has_room_for(pause, read):
    schedule, device = make(limit=460, max_running=10, pause=pause)
    for _ in range(9):
        submit(schedule, Spec(steps=1))
    schedule.turn()
    assert (device.reads, len(device.decoded_at)) == (list(range(read)), 1)
    run_out(schedule)


def test_a_large_request_is_not_overtaken_for_ever():
    schedule, device = make(limit=13 * 40)
    submit(schedule, Spec(tokens=20, max_new=6))
    submit(schedule, Spec(tokens=40))  # fits only alone
    for _ in range(40):
        submit(schedule, Spec(tokens=2, steps=1, max_new=2))
        schedule.turn()
    run_out(schedule)
    assert device.reads == sorted(device.reads)


def test_higher_priorities_go_first_until_the_others_have_waited_enough():
    schedule, device = make(max_running=1, ageing=5.0)
    submit(schedule, Spec(priority=0))
    for _ in range(30):
        submit(schedule, Spec(priority=1, steps=1, max_new=1))
        device.now += 1.0
    run_out(schedule)
    place = device.reads.index(0)
    assert 4 <= place <= 6, "those that came within 5 seconds go before it, later ones behind it"


def test_a_request_that_comes_first_pauses_a_prefill():
    schedule, device = make(pause=0.0)
    submit(schedule, Spec(steps=50))
    for _ in range(3):
        schedule.turn()
    submit(schedule, Spec(steps=2, max_new=3, priority=9))
    for _ in range(8):
        schedule.turn()
    assert device.specs[1].entry.state == "ended" and device.specs[0].entry.state == "reading"
    run_out(schedule)
    assert device.specs[0].entry.ids == device.specs[0].ids


def test_what_can_never_fit_is_refused_with_the_figures():
    schedule, _ = make(limit=100)
    with pytest.raises(OutOfMemory, match=r"needs 80 bytes and 24 while it is read; the limit is 100"):
        submit(schedule, Spec(tokens=8))
    with pytest.raises(PromptError, match="5 new tokens are asked for; expected 1 to 4"):
        submit_request = Spec(max_new=4)
        submit(schedule, submit_request)
        Request(submit_request.request.prompt, submit_request.request.plan, 5)
    with pytest.raises(PromptError, match="deadline is 0 seconds"):
        submit(schedule, Spec(deadline=0.0))


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12), room=st.integers(13 * 20, 13 * 60),
       more=st.integers(0, 13 * 60), pause=st.sampled_from([0.0, 100.0]))
def test_who_finds_less_memory_than_there_should_be_waits_for_the_others(sizes, room, more, pause):
    """Nobody fails who fits alone, and nobody tries again before another has ended."""
    device = Device(room + more, room=room)
    schedule = Schedule(device, room + more, 16, pause, ageing=5, clock=device.clock)
    specs = [Spec(tokens=size) for size in sizes]
    for spec in specs:
        submit(schedule, spec)
    run_out(schedule)
    for spec in specs:
        check_end(spec)
        assert spec.entry.ids == spec.ids
    assert device.reads == list(range(len(sizes))), "they are read in another order than they came"
    assert device.refused <= len(sizes) - 1
    assert device.in_use == schedule.reserved == 0


@pytest.mark.parametrize("fails", [None, "plan"])
def test_cancelled_while_its_plan_is_made_it_ends_once(fails):
    """The thread that drives turns ends it; the one that makes plans comes too late."""
    schedule, device = make()
    submit(schedule, spec := Spec(pending=True, fails=fails, let_go=True))
    make_it = spec.request.plan.make

    def meanwhile():
        spec.entry.cancel()
        schedule.turn()
        return make_it()

    object.__setattr__(spec.request.plan, "make", meanwhile)
    assert schedule.make_plan()
    run_out(schedule)
    check_end(spec)
    assert schedule.stats().cancelled == 1 and schedule.stats().failed == 0 and device.reads == []


@pytest.mark.parametrize("cancel", [False, True])
def test_closed_it_takes_no_more_and_those_inside_end(cancel):
    schedule, device = make()
    submit(schedule, Spec())
    submit(schedule, Spec(pending=True))
    schedule.turn()
    schedule.close(SchedulerError("closed for the night"), cancel)
    with pytest.raises(SchedulerError, match="no more requests are taken: closed for the night"):
        submit(schedule, Spec())
    del device.specs[2]
    assert schedule.wait_for_work() and schedule.wait_for_plans() != cancel
    run_out(schedule)
    assert not schedule.wait_for_work() and not schedule.wait_for_plans()
    for spec in device.specs.values():
        spec.let_go = cancel
        check_end(spec)
        assert (spec.entry.stream.error is not None) == cancel


def test_a_step_that_fails_as_a_whole_ends_those_that_run():
    schedule, device = make()
    for spec in (Spec(steps=1, max_new=9), Spec(steps=1, max_new=9), Spec(tokens=30, steps=9)):
        submit(schedule, spec)
    for _ in range(2):
        schedule.turn()
    step, device.step = device.step, lambda answers: 1 / 0
    schedule.turn()
    device.step = step
    run_out(schedule)
    ended = [spec.entry.stream.error for spec in device.specs.values()]
    assert [type(error) for error in ended] == [ZeroDivisionError, ZeroDivisionError, type(None)]
    assert (schedule.stats().bytes, device.in_use) == (0, 0)


def test_a_thread_that_cannot_go_on_ends_everything_with_its_error():
    schedule, device = make()
    for spec in (Spec(), Spec(), Spec(pending=True)):
        submit(schedule, spec)
    for _ in range(3):
        schedule.turn()
    schedule.fail(Injected("the device is gone"))
    assert [str(spec.entry.stream.error) for spec in device.specs.values()] == ["the device is gone"] * 3
    assert (schedule.stats().bytes, device.in_use) == (0, 0)
    with pytest.raises(SchedulerError, match="the device is gone"):
        submit(schedule, Spec())
