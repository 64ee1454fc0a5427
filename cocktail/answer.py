"""Answers: ids turned into text piece by piece, stop strings, and the statistics of one answer."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from runtime.arena import ArenaLayout
from runtime.config import ModelConfig
from runtime.engine import Planned, Progress, Reading, Timing, read
from runtime.errors import PromptError
from runtime.layerwise import LayerwisePlan
from runtime.master import SharedMaster
from runtime.model import Model as Engine
from runtime.plan import HIDDEN, Plan
from runtime.sampler import SamplingParams
from runtime.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
FinishReason = Literal["eos", "length", "stop", "interrupted"]


@dataclass(frozen=True)
class Stats:
    """What one answer cost. Bytes are those of the allocation, times are seconds of wall clock.

    prompt_tokens: prefix, context and suffix; context_tokens: the context alone; reused_tokens: those whose K and V had
    been kept of an earlier question, or in a file; generated_tokens: with the end token.
    ttft_s: scoring, prefill (packing included) and the first draw. tpot_s: mean of the decode steps after it.
    score_s: all of scoring, by attention too; score_wait_s: the part of it that no prefill covered, which alone is in
    ttft_s. prefill_s: the forward pass over the prompt and packing; pack_s: packing's share of it.
    chunks: per tier, in the first layer. context_bits_per_value: context bytes * 8 / context values, all metadata and
    the sink counted, the tail not (FP16: 16). cache_bytes: the whole arena; cache_fp16_bytes: the same tokens at 16
    bits. master_bytes: the exact K and V that are kept of the document. weights_bytes: on the device.
    peak_memory_bytes: resident memory of the process, its maximum so far.
    outliers_kept, outliers_without_room: values that kvquant's sparse stores hold exactly, and those that they had no
    room for, which were clipped; of all packed chunks and layers, 0 with other formats.
    kernels: operation -> the kernel that ran it. policy, scorer: the names in the plan.
    """

    prompt_tokens: int
    context_tokens: int
    reused_tokens: int
    generated_tokens: int
    ttft_s: float
    tpot_s: float
    score_s: float
    score_wait_s: float
    prefill_s: float
    pack_s: float
    chunks: dict[str, int]
    context_bits_per_value: float
    cache_bytes: int
    cache_fp16_bytes: int
    outliers_kept: int
    outliers_without_room: int
    master_bytes: int
    weights_bytes: int
    peak_memory_bytes: int
    backend: str
    kernels: dict[str, str]
    policy: str
    scorer: str

    def to_dict(self) -> dict[str, Any]:
        """Every statistic by its name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    text: without the stop string and special tokens. ids: what was generated, with the end token where it came.
    finish_reason: "eos", "length" (max_tokens reached), "stop" (a stop string), "interrupted" (Ctrl-C or closed).
    plan: which chunk kept how many bits. stats: what it cost.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    plan: Plan
    stats: Stats


@dataclass(frozen=True)
class Job:
    """Everything one answer needs, checked before any work. plan covers all tokens of prompt; score_seconds went by
    before, for a plan that is not pending."""

    engine: Engine
    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    plan: Planned
    sampling: SamplingParams
    max_new: int
    stop: tuple[str, ...] = ()
    score_seconds: float = 0.0
    progress: Callable[[str, int, int], None] | None = None
    master: SharedMaster | None = None

    def __post_init__(self) -> None:
        if any(not text for text in self.stop):
            raise PromptError("a stop string is empty; leave it out instead")

    @property
    def prefill_progress(self) -> Progress | None:
        """`progress` for the steps of the prefill."""
        return None if self.progress is None else partial(self.progress, "prefill")


class Transcript:
    """An answer as it comes: ids go in, text comes out, and in the end the Answer that both make.

    eos: the ids that end it. reason: why it has ended; as long as it has not, what it would be if no more came.
    """

    def __init__(self, job: Job) -> None:
        self.eos = frozenset(job.tokenizer.eos_ids) | frozenset(job.engine.config.eos_ids)
        self.reason: FinishReason = "length"
        self.ids: list[int] = []
        self._job, self._text = job, list[str]()
        self._decoder, self._stops = job.tokenizer.stream(), StopStrings(job.stop)
        self._begin, self._first_at = time.perf_counter(), 0.0

    @property
    def text(self) -> str:
        """What has come out so far."""
        return "".join(self._text)

    @property
    def ended(self) -> bool:
        """Whether the last id was an end token, or completed a stop string."""
        return self.reason != "length"

    def begin(self) -> None:
        """The time to the first id counts from here."""
        self._begin = time.perf_counter()

    def push(self, token: int) -> str:
        """The next id; the text that is safe to show by now."""
        if not self.ids:
            self._first_at = time.perf_counter()
        self.ids.append(token)
        if token in self.eos:
            self.reason = "eos"
            return ""
        return self._shown(self._stops.push(self._decoder.push(token)))

    def finish(self) -> str:
        """No more ids: what was held back and turned out to be ordinary text."""
        return self._shown(self._stops.push(self._decoder.finish()) + self._stops.finish())

    def answer(self, plan: Plan, reading: Reading | None, planned_s: float = 0.0) -> Answer:
        """The whole. planned_s: of making the plan, outside the reading."""
        job, timing = self._job, reading.timing if reading else Timing()
        layout, sizes = plan.layout, plan_sizes(plan)
        kept, without_room = reading.caches[0].outliers() if reading else (0, 0)
        return Answer(self.text, tuple(self.ids), self.reason, plan, Stats(
            prompt_tokens=len(job.prompt),
            context_tokens=layout.n_chunks * layout.chunk + layout.remainder,
            reused_tokens=reading.reused if reading else 0,
            generated_tokens=len(self.ids),
            ttft_s=job.score_seconds + max(self._first_at - self._begin, 0.0),
            tpot_s=timing.per_token,
            score_s=job.score_seconds + planned_s + timing.plan,
            score_wait_s=job.score_seconds + planned_s + timing.wait,
            prefill_s=timing.prefill,
            pack_s=timing.pack,
            outliers_kept=kept,
            outliers_without_room=without_room,
            master_bytes=job.master.nbytes if job.master else 0,
            weights_bytes=job.engine.weights.nbytes,
            peak_memory_bytes=peak_memory(),
            backend=job.engine.backend.name,
            kernels={operation: by for operation, by in job.engine.backend.kernels().items()
                     if operation != "attention_mass" or isinstance(job.plan, LayerwisePlan)},
            policy=plan.policy, scorer=plan.scorer, **sizes))

    def _shown(self, piece: str) -> str:
        if self._stops.found:
            self.reason = "stop"
        if piece:
            self._text.append(piece)
        return piece


@dataclass
class AnswerStream:
    """Iterate for pieces of text; `answer` holds the whole once the iteration has ended.

    The prompt is read when the first piece is asked for. Ctrl-C while a piece is made, or close(), ends the answer
    with what was generated so far. plan is None until the chunks are scored, with scorer attention until
    prefill's end: there is no answer yet, and Ctrl-C passes through.
    """

    job: Job
    _pieces: Iterator[str] = field(init=False, repr=False)
    _answer: Answer | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self._transcript = Transcript(self.job)
        self._reading: Reading | None = None
        self.plan: Plan | None = self.job.plan if isinstance(self.job.plan, Plan) else None
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer here; `answer` then holds what there is."""
        if self._answer is None and self.plan is not None:
            self._transcript.reason = "interrupted"
            self._answer = self._transcript.answer(self.plan, self._reading)
        self._pieces = iter(())

    @property
    def answer(self) -> Answer:
        """The whole answer; what is left of it is generated first."""
        for _ in self:
            pass
        if self._answer is None:
            raise PromptError("this answer ended with an error, or before its chunks were scored; "
                              "there is nothing to return")
        return self._answer

    def _run(self) -> Iterator[str]:
        job, transcript = self.job, self._transcript
        try:
            transcript.begin()
            self._reading = read(job.engine, job.prompt, [self._kept(job.plan)], job.prefill_progress,
                                 master=job.master)
            for token in self._reading.generate(job.sampling, job.max_new, transcript.eos):
                if piece := transcript.push(token):
                    yield piece
                if transcript.ended:
                    break
        except KeyboardInterrupt:
            if self.plan is None:
                raise
            transcript.reason = "interrupted"
        if rest := transcript.finish():
            yield rest
        assert self.plan is not None
        self._answer = transcript.answer(self.plan, self._reading)

    def _kept(self, plan: Planned) -> Planned:
        """The plan; where it is to come, one that is kept here once it is made, whatever becomes of the prefill."""
        def keep(made: Plan) -> Plan:
            self.plan = made
            return made

        if isinstance(plan, LayerwisePlan):
            return replace(plan, make=lambda chunks, masses: keep(plan.make(chunks, masses)))
        return plan if isinstance(plan, Plan) else replace(plan, make=lambda: keep(plan.make()))


class StopStrings:
    """Passes text on except from the first stop string; holds back what may become the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is safe to show; after a stop string has been found, nothing."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        longest = max((length for stop in self._stops for length in range(1, len(stop))
                       if text.endswith(stop[:length])), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def finish(self) -> str:
        """What was held back and turned out to be ordinary text."""
        held, self._held = self._held, ""
        return held


def check_positions(config: ModelConfig, prompt_tokens: int, max_tokens: int | None) -> int:
    """How many tokens may be generated: max_tokens, or up to 256 where the caller left it open.

    Raises PromptError where prompt and answer exceed the positions that the model was made for. Dynamic NTK scaling
    has no such limit: its frequencies follow the length.
    """
    if max_tokens is not None and max_tokens < 1:
        raise PromptError(f"max_tokens is {max_tokens}; expected at least 1")
    if prompt_tokens < 1:
        raise PromptError("the prompt is empty; give a context, a query or both")
    if config.rope.kind == "dynamic":
        return max_tokens or DEFAULT_MAX_TOKENS
    room = config.max_positions - prompt_tokens
    if room < (max_tokens or 1):
        raise PromptError(f"the prompt has {prompt_tokens} tokens and {max_tokens or 1} are to be generated, but the "
                          f"model has {config.max_positions} positions; shorten the prompt or lower max_tokens")
    return max_tokens or min(DEFAULT_MAX_TOKENS, room)


def plan_sizes(plan: Plan) -> dict[str, Any]:
    """chunks per tier (of the first layer), bits per context value, bytes of the arena and of the same at FP16."""
    sizes = ArenaLayout(plan.layout)
    counts = plan.layout.counts[0]
    return {
        "chunks": {"not stored" if tier == HIDDEN else str(tier): n
                   for tier, n in zip(plan.layout.tiers, counts, strict=True) if n},
        "context_bits_per_value": sizes.context_bits_per_value,
        "cache_bytes": sizes.nbytes,
        "cache_fp16_bytes": sizes.fp16_bytes,
    }


def peak_memory() -> int:
    """Peak resident memory of this process in bytes (macOS reports bytes, Linux KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
