"""A prefill in steps is the prefill in one go; given up midway, it leaves nothing behind."""

import gc
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import tiny_model

import cocktail
from runtime.engine import PendingPlan, read, read_in_steps
from runtime.errors import OutOfMemory, PromptError

QUESTION = "Who mended the cracked iron pan?"
TILE = 64


@pytest.fixture(scope="module")
def doc(tmp_path_factory):
    model = cocktail.load(tiny_model.save_tiny_model(tmp_path_factory.mktemp("model")), backend="cpu", threads=1)
    return model.read("The cracked iron pan was mended by Odo Farrant in the spring of 1843. " * 12)


def arenas_of(doc, monkeypatch):
    """Weak references to all arenas that the model allocates from now on."""
    made, allocate = [], doc.model.backend.arena

    def arena(nbytes):
        array = allocate(nbytes)
        made.append(weakref.ref(array.base))
        return array

    monkeypatch.setattr(doc.model.backend, "arena", arena)
    return made


def test_steps_are_the_whole_prefill(doc):
    prompt, plan = doc.prompt(QUESTION), doc.plan(QUESTION, kv_bits=4, max_tokens=4)
    steps, seen = read_in_steps(doc.model.engine, prompt, [plan], TILE), []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            stepwise = end.value
            break
    whole = read(doc.model.engine, prompt, [plan], tile=TILE)
    total = doc.model.config.n_layers * -(-len(prompt) // TILE)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {of for _, of in seen} == {len(seen)} and len(seen) in (total, total - doc.model.config.n_layers)
    np.testing.assert_array_equal(stepwise.first_logits, whole.first_logits)
    np.testing.assert_array_equal(stepwise.force([1, 2, 3]), whole.force([1, 2, 3]))


def test_caches_are_there_before_the_first_step(doc, monkeypatch):
    made = arenas_of(doc, monkeypatch)
    plan = doc.plan(QUESTION, max_tokens=4)
    steps = read_in_steps(doc.model.engine, doc.prompt(QUESTION), [plan, plan])
    assert len(made) == 2 and all(ref() is not None for ref in made)
    del steps
    assert all(ref() is None for ref in made)


@pytest.mark.parametrize("steps_taken", [1, 3])
def test_closed_midway_everything_is_given_back(doc, monkeypatch, steps_taken):
    made = arenas_of(doc, monkeypatch)
    steps = read_in_steps(doc.model.engine, doc.prompt(QUESTION), [doc.plan(QUESTION, max_tokens=4)], TILE)
    gc.disable()  # nothing may wait for the collector
    try:
        for _ in range(steps_taken):
            next(steps)
        assert made[0]() is not None
        steps.close()
        assert made[0]() is None
    finally:
        gc.enable()


def test_time_between_steps_is_not_the_prefills(doc):
    steps = read_in_steps(doc.model.engine, doc.prompt(QUESTION), [doc.plan(QUESTION, max_tokens=4)], TILE)
    begin, paused = time.perf_counter(), 0.0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            took = end.value.timing.prefill
            break
        time.sleep(0.02)
        paused += 0.02
    assert 0 < took <= time.perf_counter() - begin - paused


def test_what_cannot_be_read_is_refused_before_a_step(doc, monkeypatch):
    plan = doc.plan(QUESTION, max_tokens=4)
    with pytest.raises(PromptError, match="empty"):
        read_in_steps(doc.model.engine, (), [plan])
    monkeypatch.setattr(doc.model.backend, "arena", lambda nbytes: (_ for _ in ()).throw(MemoryError("none left")))
    with pytest.raises(OutOfMemory, match="none left"):
        read_in_steps(doc.model.engine, doc.prompt(QUESTION), [plan])


def test_memory_short_between_steps_is_named(doc):
    """A plan made while the prompt is read, or a layer's scratch, may not fit either."""
    pending = doc.pending(QUESTION, max_tokens=4)
    assert isinstance(pending, PendingPlan)

    def make():
        raise MemoryError("no room for scores")

    steps = read_in_steps(doc.model.engine, doc.prompt(QUESTION), [replace(pending, make=make)], TILE)
    with pytest.raises(OutOfMemory, match=r"read \d+ tokens: no room for scores"):
        for _ in steps:
            pass
