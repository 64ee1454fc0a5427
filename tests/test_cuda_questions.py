"""Several questions of one command on the GPU: together as one after another, in what memory is free. Needs a GPU."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from cuda_backend import BACKEND, cupy
from tiny_model import HANDBOOK, save_tiny_model

import cocktail
from cocktail import run
from runtime.batch import Decoder

MIB = 2**20
NEAR = 0.02  # of the logits' spread: two of them as close as this may change places in a batch, which rounds to 11 bits
QUERIES = tuple(f"Who mended the {thing}?" for thing in ("pan", "gate", "bell", "oven", "boat", "roof", "cart", "door"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Answers of all questions, and how many were decoded at a time, by how often."""
    (tmp_path / "questions.txt").write_text("\n".join(QUERIES), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    together, step = Counter(), Decoder.step

    def counted(self, answers):
        together.update([len(answers)])
        return step(self, answers)

    monkeypatch.setattr(Decoder, "step", counted)

    def answers(model, *options, document=HANDBOOK[:3000]):
        (tmp_path / "doc.txt").write_text(document, encoding="utf-8")
        monkeypatch.setitem(vars(cocktail), "load", lambda *_, **__: model)
        together.clear()
        assert run.main(["tiny.safetensors", "--context", "doc.txt", "--queries", "questions.txt", "--backend", "cuda",
                         "--max-tokens", "24", *options]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["question"] for line in lines] == list(QUERIES)
        return [line["answer"] for line in lines], together.copy()

    return answers


def load(folder, dtype=np.float32, **changes):
    return cocktail.load(save_tiny_model(folder, dtype=dtype, head_dim=64, **changes), backend="cuda")


def test_free_bytes_are_the_drivers_and_the_pools():
    """Counted against a limit of the pool's own: what the driver has free changes with every other process."""
    pool = cupy.get_default_memory_pool()
    free, total = cupy.cuda.runtime.memGetInfo()
    assert 0.5 * free < BACKEND.free_bytes() <= total
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + 128 * MIB)
    try:
        assert BACKEND.free_bytes() == 128 * MIB
        held = BACKEND.empty((64 * MIB,), np.uint8)
        assert BACKEND.free_bytes() == 64 * MIB
        del held
        assert pool.free_bytes() >= 64 * MIB  # the pool keeps it, for whoever asks next
        assert BACKEND.free_bytes() == 128 * MIB
    finally:
        pool.set_limit(size=0)
    assert BACKEND.free_bytes() > 0.5 * free


def test_float32_answers_are_those_of_each_question_alone(tmp_path, command, monkeypatch):
    model = load(tmp_path)
    found, together = command(model)
    assert max(together) == len(QUERIES)
    monkeypatch.setattr(model.backend, "free_bytes", lambda: None)  # so that they are asked one after another
    assert (found, {}) == command(model)


def test_answers_of_a_batch_leave_those_of_each_question_alone_at_near_ties_only(tmp_path, command):
    model = load(tmp_path, np.float16)
    found, together = command(model)
    assert max(together) == len(QUERIES)
    doc = model.read(HANDBOOK[:3000], keep=True)
    with model.serve() as scheduler:
        batched = [each.result() for each in [doc.submit(query, max_tokens=24) for query in QUERIES]]
        assert scheduler.stats().batch > 1
    assert [answer.text for answer in batched] == found
    for query, answer in zip(QUERIES, batched, strict=True):
        alone = doc.ask(query, max_tokens=24)
        if (ids := alone.ids) != answer.ids:
            i = next(i for i, pair in enumerate(zip(ids, answer.ids, strict=False)) if len(set(pair)) > 1)
            logits = doc.logits(query, ids[: i + 1], plan=alone.plan)[i]
            assert logits[ids[i]] - logits[answer.ids[i]] < NEAR * logits.std(), query


def test_what_requests_take_is_within_what_is_said_to_be_free(tmp_path, command, monkeypatch):
    """Room for two of the caches at a time: the others wait. All that is allocated counts, scratch too, and only this
    process's: the GPU is not the test's alone."""
    model = load(tmp_path, np.float16, num_hidden_layers=16, num_key_value_heads=4)
    pool = cupy.get_default_memory_pool()
    free, pack, taken = model.backend.reserve + 220 * MIB, model.backend.pack, []

    def watched(*arguments, **options):  # at a layer's end all that a prefill holds is there
        taken.append(pool.used_bytes())
        pack(*arguments, **options)

    monkeypatch.setattr(model.backend, "pack", watched)
    monkeypatch.setattr(model.backend, "free_bytes", lambda: free)
    before = pool.used_bytes()
    _, together = command(model, "--policy", "fp16", document=HANDBOOK[:10_000])
    assert 1 < max(together) < len(QUERIES)
    assert 160 * MIB < max(taken) - before < free
