"""Calibration prompts, and what pairs of widths cost on them.

A prompt is read once: its exact K and V stay in memory as FP16, so that trying other pairs costs packing and one pass
over the answer, no prefill. The cost of pairs is the mean KL divergence of the next-token distribution from the FP16
cache's, in nats, teacher-forced along a fixed answer; its first token is left out: it comes from the exact prefill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cocktail.document import Document
from cocktail.model import Model
from cocktail.policies import load_policy, sink_chunks
from cocktail.policies.pairs import LayerPairs
from cocktail.verify import divergence, log_softmax
from runtime.backend import Array, Backend
from runtime.cache import Cache
from runtime.engine import Reading
from runtime.errors import OutOfMemory, PromptError
from runtime.forced import force
from runtime.model import prefill
from runtime.plan import DocumentShape, Plan, Tier
from runtime.sampler import SamplingParams

QUOTED_WORDS = 6  # of a passage to repeat


@dataclass(frozen=True)
class Prompt:
    """answer: forced, as far as there is room; None for the FP16 cache's own greedy one."""

    context: str
    query: str
    answer: str | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt that has been read.

    shape: with room for the answer. kv: per layer, exact K and V, FP16 (G, prompt tokens, D). answer: ids.
    exact: the FP16 cache's log probabilities of the answer's tokens but the first, float32 (T - 1, V).
    """

    model: Model
    prompt: tuple[int, ...]
    shape: DocumentShape
    kv: tuple[tuple[Array, Array], ...]
    rope: tuple[Array, Array]
    first_logits: npt.NDArray[np.float32]
    answer: tuple[int, ...]
    exact: npt.NDArray[np.float32]

    def reading(self, *plans: Plan) -> Reading:
        """The prompt in one cache per plan."""
        engine = self.model.engine
        caches = tuple(Cache(engine.backend, engine.config, plan.layout) for plan in plans)
        for cache, plan in zip(caches, plans, strict=True):
            cache.assign(plan)
            for layer, (k, v) in enumerate(self.kv):
                cache.pack(layer, k, v)
        return Reading(engine, self.prompt, caches, self.rope, self.first_logits)

    def divergence(self, pairs: Sequence[Tier], sink: int | None) -> npt.NDArray[np.float64]:
        """KL from the FP16 cache under one pair per layer: (T - 1,) nats."""
        policy = load_policy("kvtuner", pairs=LayerPairs(tuple(pairs), {}, "the search"), sink=sink)
        q = log_softmax(force(self.reading(policy.plan(self.shape)), self.answer, 0)[1:])
        return divergence(self.exact.astype(np.float64), q)


@dataclass(frozen=True)
class Calibration:
    """All samples. sink: leading chunks that stay FP16, as under the policies; None for their default."""

    samples: tuple[Sample, ...]
    sink: int | None = None

    def kl(self, pairs: Sequence[Tier]) -> float:
        """Mean over all answer tokens of all samples."""
        return float(np.concatenate([sample.divergence(pairs, self.sink) for sample in self.samples]).mean())

    @cached_property
    def described(self) -> dict[str, int | None]:
        """Prompts, context tokens in whole chunks, and answer tokens that were compared."""
        return {"prompts": len(self.samples), "sink": self.sink, "chunk": self.samples[0].shape.chunk,
                "context_tokens": sum(sample.shape.n_chunks * sample.shape.chunk for sample in self.samples),
                "answer_tokens": sum(len(sample.exact) for sample in self.samples)}


def calibrate(model: Model, prompts: Sequence[Prompt], *, chunk: int = 32, answer_tokens: int = 24,
              sink: int | None = None, progress: Callable[[int, int], None] | None = None) -> Calibration:
    """Read every prompt once; progress(prompts done, prompts in all). Raises PromptError, OutOfMemory."""
    samples = []
    for done, prompt in enumerate(prompts):
        if progress is not None:
            progress(done, len(prompts))
        samples.append(_read(model, prompt, chunk, answer_tokens, f"calibration prompt {done + 1}", sink))
    if not samples:
        raise PromptError("there is no calibration prompt; give some with --prompts or --text")
    return Calibration(tuple(samples), sink)


def read_prompts(path: str | Path) -> list[Prompt]:
    """A file of JSON lines {"context": text, "query": text, "answer": text or absent}. Raises PromptError."""
    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            known = data.keys() <= {"context", "query", "answer"} and all(isinstance(v, str) for v in data.values())
        except (ValueError, AttributeError, RecursionError):
            known = False
        if not known or not data.keys() >= {"context", "query"}:
            raise PromptError(f'{path}, line {number}: expected a JSON object of texts "context", "query" and, '
                              'where it should be forced, "answer"')
        prompts.append(Prompt(**data))
    return prompts


def prompts_of_text(model: Model, text: str, count: int, tokens: int, answer_tokens: int, seed: int) -> list[Prompt]:
    """`count` windows of `tokens` tokens of the text, at places drawn by seed, each with one of three tasks in turn: to
    repeat a passage of it, to summarise it (the model's own answer), to go on where it ends. Raises PromptError."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text)
    if len(ids) < tokens + answer_tokens:
        raise PromptError(f"the text has {len(ids)} tokens; a window and what follows it take {tokens + answer_tokens}")
    rng, prompts = np.random.default_rng(seed), []
    for i in range(count):
        start = int(rng.integers(len(ids) - tokens - answer_tokens + 1))
        end = start + tokens
        context = tokenizer.decode(ids[start:end])
        if i % 3 == 0:
            place = start + int(rng.integers(tokens - answer_tokens + 1))
            words = tokenizer.decode(ids[place : place + answer_tokens]).split(" ")
            beginning = " ".join(words[:QUOTED_WORDS])
            prompts.append(Prompt(context, f'Repeat word for word the passage that begins with "{beginning}"',
                                  tokenizer.decode(ids[place : place + answer_tokens])))
        elif i % 3 == 1:
            prompts.append(Prompt(context, "Summarise the text above."))
        else:
            prompts.append(Prompt(context, "", tokenizer.decode(ids[end : end + answer_tokens])))
    return prompts


def read_text(path: str | Path) -> str:
    """A UTF-8 file. Raises PromptError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 (byte {error.start})") from None


class _Keeper:
    """Stands where a Cache would in prefill, and keeps a copy of every layer's K and V."""

    def __init__(self, backend: Backend) -> None:
        self.kv: list[tuple[Array, Array]] = []
        self._backend = backend

    def pack(self, layer: int, k: Array, v: Array) -> None:
        upload, download = self._backend.upload, self._backend.download
        self.kv.append((upload(download(k)), upload(download(v))))


def _read(model: Model, prompt: Prompt, chunk: int, answer_tokens: int, name: str, sink: int | None) -> Sample:
    doc, engine = Document(model, prompt.context, chunk), model.engine
    shape = doc.shape(prompt.query, answer_tokens)
    if shape.n_chunks <= sink_chunks(shape, sink).stop:
        raise PromptError(f"{name} has {shape.n_chunks} whole chunks of {chunk} tokens, of which none would be "
                          "quantized; give a longer context")
    ids = doc.prompt(prompt.query)
    forced = None if prompt.answer is None else tuple(model.tokenizer.encode(prompt.answer)[: answer_tokens + 1])
    if forced is not None and len(forced) < 2:
        raise PromptError(f"{name}: its answer has {len(forced)} tokens; expected at least 2, since the first says "
                          "nothing")
    plan = load_policy("fp16").plan(shape)
    cache, keeper = Cache(engine.backend, engine.config, plan.layout), _Keeper(engine.backend)
    cache.assign(plan)
    try:
        rope = engine.rope(len(ids), len(ids) + answer_tokens)
        logits = engine.backend.empty((1, engine.config.vocab_size), np.float32)
        both: Any = (cache, keeper)
        for _ in prefill(engine, ids, rope, both, logits, engine.backend.prefill_tile):
            pass
    except MemoryError as error:
        raise OutOfMemory(f"no memory to keep {name} ({len(ids)} tokens): {error}; fewer or shorter prompts need less"
                          ) from error
    first = engine.backend.download(logits)
    reading = Reading(engine, ids, (cache,), rope, first)
    answer = forced or tuple(_greedy(model, reading, answer_tokens, name))
    return Sample(model, ids, shape, tuple(keeper.kv), rope, first, answer,
                  log_softmax(force(reading, answer, 0)[1:]).astype(np.float32))


def _greedy(model: Model, reading: Reading, answer_tokens: int, name: str) -> Iterator[int]:
    """The exact cache's own answer; one of a single token would be no answer to compare along."""
    eos = frozenset(model.tokenizer.eos_ids) | frozenset(model.config.eos_ids)
    ids = list(reading.generate(SamplingParams(), answer_tokens, eos))
    if len(ids) < 2:
        raise PromptError(f"{name}: the model answers nothing to {name}; give the answer to force")
    yield from ids
