"""Sequences that decode together on the GPU: each gets the bits of a batch of its own, whoever shares its steps.

Alone means in a batch of its own (runtime.batch). Needs a GPU.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import tiny_model
from cuda_backend import BACKEND, OTHERS
from cuda_sequence import Sequence
from test_cuda_cache import check_batch
from varied_requests import POLICIES, QUESTIONS, SAMPLINGS, TEXT, request_for

import cocktail
from runtime.batch import Decoder, TakesTurns
from runtime.engine import read
from runtime.sampler import SamplingParams
from runtime.scheduler import Scheduler

LIMIT = 10**9
TOLERANCE = 2e-3  # of logits, relative


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cocktail.load(tiny_model.save_tiny_model(tmp_path_factory.mktemp("model"), dtype=np.float16, head_dim=64),
                         backend="cuda")


def members_of(model, requests):
    """A decoder, and the members that it steps."""
    decoder = Decoder(model.engine)
    return decoder, [decoder.start(read(model.engine, request.prompt, [request.plan]), request.sampling,
                                   request.max_new, frozenset()) for request in requests]


def decoded(model, requests, groups):
    """Ids and logits of each request. groups: of the requests that still run, those of each step, in its order."""
    decoder, members = members_of(model, requests)
    ids, logits = [[member.last] for member in members], [[] for _ in members]
    while going := [i for i, request in enumerate(requests) if len(ids[i]) < request.max_new]:
        chosen = groups(going)
        for i, drawn in zip(chosen, decoder.step([members[i] for i in chosen]), strict=True):
            assert isinstance(drawn, int), drawn
            ids[i].append(drawn)
            batch = next(batch for batch in decoder._batches if members[i] in batch.members)
            logits[i].append(BACKEND.download(batch._logits)[batch.members.index(members[i])])
    return ids, logits


def alone(model, requests):
    """Each in a batch of its own, one after the other."""
    found = [decoded(model, [request], list) for request in requests]
    return [ids[0] for ids, _ in found], [logits[0] for _, logits in found]


def same(found, expected):
    """Ids and every bit of the logits."""
    assert found[0] == expected[0]
    assert all(np.array_equal(one, other) for one, other in zip(found[1], expected[1], strict=True))


def test_in_a_batch_every_logit_is_what_it_is_alone(model):
    """Plans of four families, other lengths and other ways to draw; members leave as they end, so that batches of 12
    down to 1 are captured."""
    requests = [request_for(model, i) for i in range(12)]
    same(decoded(model, requests, list), alone(model, requests))


@pytest.mark.parametrize("size", [2, 8, 9, 16])
def test_every_number_of_column_tiles(model, size):
    requests = [request_for(model, i, max_new=3) for i in range(size)]
    same(decoded(model, requests, list), alone(model, requests))


@pytest.mark.parametrize("seed", range(max(2, OTHERS // 16)))
def test_members_come_and_go(model, seed):
    """Any part of those that run, in any order, step after step."""
    chance = random.Random(seed)
    requests = [request_for(model, chance.randrange(60)) for _ in range(6)]

    def some(going):
        if chance.random() < 0.5:
            return going  # the same again: a captured step
        return chance.sample(going, chance.randint(1, len(going)))

    same(decoded(model, requests, some), alone(model, requests))


def test_a_batch_follows_the_single_sequence_closely(model):
    """Other kernels multiply one row; how far that moves logits, against what K4V2 does to them."""
    request = replace(request_for(model, 4), sampling=SamplingParams())
    ids, logits = alone(model, [request])
    reading = read(model.engine, request.prompt, [request.plan])
    doc = model.read(TEXT * 2, chunk=16, keep=False)
    exact, mixed = (doc.logits(QUESTIONS[1], ids[0], **options) for options in (POLICIES[1], POLICIES[4]))
    assert rms(np.array(logits[0]) - reading.force(ids[0])[1:]) < 0.1 * rms(mixed - exact)


def test_the_scheduler_answers_as_alone(model):
    requests = [request_for(model, i) for i in range(10)]
    expected, _ = alone(model, requests)
    with Scheduler(model.engine, limit=LIMIT, pause=0.002) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        assert all(ticket.wait(60) for ticket in tickets)
        stats = scheduler.stats()
    assert [ticket.error or list(ticket) for ticket in tickets] == expected
    assert (stats.completed, stats.bytes, stats.together) == (10, 0, BACKEND.max_batch)
    assert stats.batch > 1


@pytest.mark.parametrize("size", [17, 40])
def test_more_sequences_share_a_pass_within_the_tolerance_of_one(model, size):
    """cuBLAS multiplies their rows and adds in another order, which moves what is rounded to 11 bits in every layer."""
    requests = [request_for(model, i, max_new=3, sampling=SamplingParams()) for i in range(size)]
    (expected, exact), (ids, logits) = alone(model, requests), decoded(model, requests, list)
    for i in range(size):
        n = next((j for j, pair in enumerate(zip(ids[i], expected[i], strict=True)) if len(set(pair)) > 1), 3)
        for one, other in zip(logits[i][:n], exact[i][:n], strict=True):  # up to the one that drew another id
            assert rms(one - other) < TOLERANCE * rms(other)


def test_a_draw_that_fails_ends_its_own_answer(model):
    """An id seen that lies outside the vocabulary, in the middle of a batch."""
    requests = [request_for(model, i, max_new=3, sampling=SAMPLINGS[2]) for i in range(3)]
    expected, _ = alone(model, requests)
    decoder, members = members_of(model, requests)
    ids = [[member.last] for member in members]
    members[1].sampler.draws.seen[:1] = 10**6
    found = decoder.step(members)
    assert "outside the vocabulary" in str(found[1]) and isinstance(found[1], Exception)
    for i in (0, 2):
        ids[i].append(found[i])
    for i, drawn in zip((0, 2), decoder.step([members[0], members[2]]), strict=True):
        ids[i].append(drawn)
    assert [ids[0], ids[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("size", [2, 18])
def test_prompts_are_read_between_steps(model, size):
    """A prefill takes scratch memory that grows; a captured step keeps its own."""
    roomy = [i for i in range(60) if i % 5 > 1][:size]
    first, late = ([request_for(model, i, max_new=12) for i in lot] for lot in (roomy, (7, 13)))
    expected, _ = decoded(model, first, list)
    decoder, members = members_of(model, first)
    ids = [[member.last] for member in members]
    for step in range(11):
        for one, drawn in zip(ids, decoder.step(members), strict=True):
            one.append(drawn)
        if step % 4 == 2:
            members_of(model, late)
    assert ids == expected


def test_float32_weights_take_turns(tmp_path):
    """cuBLAS multiplies their rows, and promises nothing of the kind."""
    wide = cocktail.load(tiny_model.save_tiny_model(tmp_path, head_dim=64), backend="cuda")
    decoder, members = members_of(wide, [request_for(wide, i) for i in range(2)])
    assert decoder.batch == 1 and all(isinstance(member, TakesTurns) for member in members)
    assert all(isinstance(drawn, int) for drawn in decoder.step(members))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_of_several_families(head_dim):
    """A launch for each, one merge."""
    lot = (("rotated", [(3, 2), (16, 16)], None), ("atom", [(4, 4)], 40), ("kivi", [(2, 2)], 40),
           ("rotated", [(16, 16)], None), ("kvquant", [(3, 2)], None), ("atom", [(4, 4)], None),
           ("rotated", [(2, 2), (4, 4)], None))
    check_batch([Sequence(i, tiers, [9 + i] * len(tiers), 32, head_dim, kv_heads=2, prefix=i, suffix=70 - i,
                          family=family, flush=flush) for i, (family, tiers, flush) in enumerate(lot)], 2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_append_writes_one_slot_of_every_tail(head_dim):
    G, T, rng = 3, 5, np.random.default_rng(head_dim)
    batch = [Sequence(i, [(16, 16)], [0], 32, head_dim, kv_heads=G, suffix=5 + 3 * i, max_new=9) for i in range(3)]
    bound = BACKEND.bind_batch([sequence.ready(2)[2] for sequence in batch])
    before = [BACKEND.download(sequence.arena) for sequence in batch]
    k, v = (rng.standard_normal((G, T, head_dim)).astype(np.float16) for _ in "kv")
    state = np.full((T, 8), 10**6, np.int32)  # rows behind the sequences are not looked at
    state[:3, 1] = 7, 0, 12
    BACKEND.append(BACKEND.upload(k), BACKEND.upload(v), bound, BACKEND.upload(state))
    for b, (sequence, expected) in enumerate(zip(batch, before, strict=True)):
        shape, tail = (G, sequence.tail.capacity, head_dim), sequence.tail
        for x, at in ((k, tail.k), (v, tail.v)):
            view = expected[at : at + 2 * int(np.prod(shape))].view(np.float16).reshape(shape)
            view[:, state[b, 1]] = x[:, b]
        assert np.array_equal(BACKEND.download(sequence.arena), expected)


def test_append_beyond_a_tail_is_a_fault():
    from kernels_cu.errors import KernelError

    sequence = Sequence(1, [(16, 16)], [0], 32, 64, suffix=5)
    bound, rows = BACKEND.bind_batch([sequence.ready(2)[2]]), BACKEND.upload(np.zeros((1, 1, 64), np.float16))
    state = np.zeros((1, 8), np.int32)
    state[0, 1] = sequence.tail.capacity
    BACKEND.append(rows, rows, bound, BACKEND.upload(state))
    with pytest.raises(KernelError, match="slot lies outside its table"):
        BACKEND.launched()()


def rms(x):
    return np.sqrt(np.mean(np.square(x)))
