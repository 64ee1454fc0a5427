"""Submitted answers are those of ask and generate, for threads and event loops; whoever goes away is cancelled."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
import tiny_model

import cocktail
from runtime.errors import (
    DeadlineExceeded,
    OutOfMemory,
    PlanError,
    PromptError,
    RequestCancelled,
    SchedulerError,
    ScorerError,
)
from runtime.sampler import SamplingParams

TEXT = "The cracked iron pan was mended by Odo Farrant in the spring of 1843, says the ledger of the ferry. " * 8
QUESTIONS = ("Who mended the pan?", "When?", "Where does the ledger lie?", "What is iron?")
LONG = dict(max_tokens=400, policy="fp16")  # so long that something can happen meanwhile


@pytest.fixture
def scheduler(model):
    with model.serve(pause=0.005) as scheduler:
        yield scheduler
        scheduler.close(drain=False)
        assert scheduler.stats().bytes == 0


@pytest.fixture(scope="module")
def doc(model):
    return model.read(TEXT)


def without_times(stats):
    """What does not depend on the clock, nor on which question came first."""
    varying = {"peak_memory_bytes", "master_bytes", "reused_tokens"}
    return {name: value for name, value in stats.to_dict().items() if not name.endswith("_s") and name not in varying}


def test_a_submitted_answer_is_that_of_ask(doc, scheduler):
    options = [dict(max_tokens=12, kv_bits=4), dict(max_tokens=9, policy="cocktail"),
               dict(max_tokens=9, scorer="attention", kv_bits=5),
               dict(max_tokens=12, sampling=SamplingParams(temperature=1.0, seed=7))]
    submissions = [doc.submit(question, **chosen) for question, chosen in zip(QUESTIONS, options, strict=True)]
    for submission, question, chosen in zip(submissions, QUESTIONS, options, strict=True):
        pieces, answer, asked = list(submission), submission.result(60), doc.ask(question, **chosen)
        assert "".join(pieces) == answer.text == submission.text == asked.text
        assert (answer.ids, answer.finish_reason, answer.plan) == (asked.ids, asked.finish_reason, asked.plan)
        assert (submission.ids, submission.max_tokens) == (asked.ids, chosen["max_tokens"]) and submission.wait(0)
        assert without_times(answer.stats) == without_times(asked.stats)
        stats = submission.stats
        assert 0 <= submission.waited_s <= stats.ttft_s and stats.tpot_s > 0 and submission.state == "ended"
        assert (stats.score_s > 0) == (chosen.get("policy") != "fp16")
    assert submissions[-1].result().stats.reused_tokens > 0, "the document was read again"


def test_a_submitted_prompt_is_that_of_generate(model, scheduler):
    generated = model.generate("Once upon", max_tokens=10)
    assert model.submit("Once upon", max_tokens=10).result(60).ids == generated.ids
    stop = generated.text[2:5]
    stopped = model.submit("Once upon", max_tokens=10, stop=[stop])
    assert stopped.result(60).text == generated.text[:2] and stopped.result().finish_reason == "stop"
    assert len(stopped.result().ids) < 10, "a stop string ends the answer on the scheduler's side"


def test_answers_stream_in_an_event_loop_that_goes_on(doc, scheduler):
    async def consume(question):
        return "".join([piece async for piece in doc.submit(question, max_tokens=30)])

    async def main():
        beats, done = 0, asyncio.Event()

        async def heart():
            nonlocal beats
            while not done.is_set():
                beats += 1
                await asyncio.sleep(0.001)

        heartbeat = asyncio.create_task(heart())
        texts = await asyncio.gather(*map(consume, QUESTIONS))
        whole = await doc.submit(QUESTIONS[0], max_tokens=30)
        done.set()
        await heartbeat
        return texts, whole, beats

    texts, whole, beats = asyncio.run(main())
    assert texts == [doc.ask(question, max_tokens=30).text for question in QUESTIONS]
    assert whole.text == texts[0] and beats > 5


def test_whoever_goes_away_is_cancelled(doc, scheduler):
    """A loop that is broken off, a handle that is dropped, a task that is cancelled."""
    for _ in doc.submit(QUESTIONS[0], **LONG):
        break
    doc.submit(QUESTIONS[1], **LONG)

    async def main():
        async def consume():
            async for _ in doc.submit(QUESTIONS[2], **LONG):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gc.collect()
    wait_for(lambda: scheduler.stats().cancelled == 3)
    assert scheduler.stats().completed == 0


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_what_ends_a_request_is_raised_where_its_answer_is_taken(doc, scheduler, monkeypatch):
    cancelled = doc.submit(QUESTIONS[0], **LONG)
    next(cancelled)
    cancelled.cancel()
    with pytest.raises(RequestCancelled):
        cancelled.result(60)
    with pytest.raises(RequestCancelled):
        list(cancelled)
    assert cancelled.text and cancelled.stats is None
    late = doc.submit(QUESTIONS[0], deadline=0.01, **LONG)
    with pytest.raises(DeadlineExceeded, match=r"deadline of 0.01 s passed while the request was \w+, \d+ tokens"):
        asyncio.run(asyncio.wait_for(gathered(late), 60))

    class Broken:
        name = "broken"

        def score(self, chunks, query):
            raise ScorerError("no encoder today")

    with pytest.raises(ScorerError, match="no encoder today"):
        doc.submit(QUESTIONS[0], scorer=Broken()).result(60)
    slow = doc.submit(QUESTIONS[0], **LONG)
    with pytest.raises(TimeoutError, match="after 0 seconds the request is"):
        slow.result(0)
    assert not slow.wait(0)
    for error, options in ((PromptError, dict(max_tokens=10**6)), (PlanError, dict(kv_bits=1)),
                           (PromptError, dict(stop=[""])), (PromptError, dict(deadline=-1.0))):
        with pytest.raises(error):
            doc.submit(QUESTIONS[0], **options)


async def gathered(submission):
    return [piece async for piece in submission]


def test_one_scheduler_is_open_at_a_time_and_the_default_opens_by_itself(model, doc):
    with model.serve(limit=10_000) as scheduler:
        assert model.scheduler is scheduler
        with pytest.raises(SchedulerError, match="has an open scheduler"):
            model.serve()
        with pytest.raises(OutOfMemory, match="the limit is 10,000"):
            doc.submit(QUESTIONS[0])
    assert doc.submit(QUESTIONS[0], max_tokens=4).result(60).ids
    assert model.scheduler is not scheduler
    model.scheduler.close()
    assert scheduler.closed and model.scheduler is model.scheduler
    model.scheduler.close()


def test_a_model_that_goes_takes_its_threads_along(tmp_path):
    before = threading.active_count()
    model = cocktail.load(tiny_model.save_tiny_model(tmp_path), backend="cpu", threads=1)
    assert model.submit("Once", max_tokens=2).result(60).ids
    assert threading.active_count() == before + 2
    del model
    gc.collect()
    wait_for(lambda: threading.active_count() == before)
