"""A document to ask about: its chunks, plans for a question, answers, and comparisons of plans.

The context is tokenized apart from the chat header before it and the question behind it, so its ids and its chunks
never depend on the question. Nor do its exact K and V, so they are kept when they are first computed (runtime.master):
every later question brings them in layer by layer, computes its own rows over them, and packs the context anew for its
own plan.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from cocktail.answer import Answer, AnswerStream, Job, check_positions, plan_sizes
from cocktail.chunks import cut
from cocktail.pins import chunks_with
from cocktail.policies import Policy, default_query, load_policy
from cocktail.scorers import Scorer, Scores, load_scorer
from cocktail.scorers.attention import AttentionScorer, query_rows
from cocktail.serving import Submission
from cocktail.verify import Verification, verify
from runtime.chat import PromptParts, split_prompt
from runtime.engine import PendingPlan, Planned, Reading, keep, read
from runtime.errors import DocumentError, PlanError, PromptError
from runtime.master import Master, Place, SharedMaster, is_keepable
from runtime.plan import HIDDEN, DocumentShape, Plan
from runtime.sampler import SamplingParams

if TYPE_CHECKING:
    from cocktail.model import Model

ProgressReport = Callable[[str, int, int], None]
Keep = bool | Place | None  # what Model.read takes


@dataclass(frozen=True)
class Comparison:
    """One plan's side of Document.compare.

    ids, text: its own greedy answer. logits: (len(answer_ids), V) float32, teacher-forced along the common answer;
    row 0 is the exact prefill's. arena_bytes: of its whole cache. context_bits_per_value: as in Stats. plan: the one
    that was followed, whole.
    """

    ids: tuple[int, ...]
    text: str
    logits: npt.NDArray[np.float32]
    arena_bytes: int
    context_bits_per_value: float
    plan: Plan


class Document:
    """What Model.read returns. No question loses anything to the precision that another one chose. On the CPU several
    threads may ask at once; where nothing is kept yet they wait for the first to read the document. On CUDA one thread
    may ask at a time; `submit` is for several.

    model, context, chunk, system, keep: as Model.read was given them. turns: the questions and answers that `after` put
    behind the document. digest: of the context's ids, which plans record.
    """

    def __init__(self, model: Model, context: str, chunk: int = 32, system: str | None = None, keep: Keep = None):
        if not context:
            raise PromptError("the context is empty; give a document or use generate")
        self.model = model
        self.context = context
        self.chunk = chunk
        self.system = system
        self.turns: tuple[tuple[str, str], ...] = ()
        parts = split_prompt(model.tokenizer, model.template, context, "", system)
        self.prefix_ids, self.context_ids = tuple(parts.prefix_ids), tuple(parts.context_ids)
        _, self.chunk_texts, self.remainder = cut(model.tokenizer, self.context_ids, chunk)
        self.digest = hashlib.sha256(np.array(self.context_ids, "<i4").tobytes()).hexdigest()[:16]
        self._scorers: dict[str, Scorer] = {}
        self._loading = Lock()
        self._master = self._new_master(keep)

    def after(self, turns: Sequence[tuple[str, str]]) -> Document:
        """The same document, later in a conversation: behind these questions and answers.

        Nothing is copied, and both share what is kept. The turns stand between the document and the next question, as
        the chat template has them, and are computed exactly for each question; their K and V are never quantized.
        Scorers of text are asked for the last of the turns' questions together with the next. Raises PromptError where
        the chat template begins otherwise when there are turns.
        """
        later = copy(self)
        later.turns = tuple(turns)
        if later._parts("x").prefix_ids != self._parts("x").prefix_ids:
            raise PromptError("the chat template begins otherwise where there are earlier turns; the document would "
                              "have to be read anew: ask without them")
        return later

    @property
    def nbytes(self) -> int:
        """What is kept of the document's K and V now, in bytes: 0 before it is first read, and where it is not kept."""
        return 0 if self._master is None else self._master.nbytes

    def prefill(self, progress: ProgressReport | None = None) -> None:
        """Read the document now, so that the first question, too, finds it read. Raises PromptError where it exceeds
        the model's positions, DocumentError where there is no room to keep it or nothing is to be kept, OutOfMemory.
        """
        if self._master is None:
            raise DocumentError("this document is not kept between questions: there is nothing to read in advance; "
                                "read it with keep=True")
        check_positions(self.model.config, len(self._master.ids), None)
        keep(self.model.engine, self._master, _prefill_report(progress))

    def save(self, path: str | Path, progress: ProgressReport | None = None) -> int:
        """Write the text and the exact K and V to a file that `cocktail.open_document` maps; returns its bytes.

        The document is read first where it is not yet. Raises as `prefill`, and DocumentError where the file cannot be
        written; nothing is left behind then, and a file of that name stays as it was.
        """
        from cocktail.saved import save_document

        self.prefill(progress)
        if self._master is None or (full := self._master.full) is None:
            raise DocumentError("another reading of this document is paused midway; save it once that has ended")
        return save_document(self, full, path)

    def close(self) -> None:
        """Give back what is kept, file or memory. The document can still be asked; it is then read again."""
        if self._master is not None:
            self._master.clear()

    def __enter__(self) -> Document:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_chunks(self) -> int:
        """Whole chunks of the context; what is left over stays FP16."""
        return len(self.chunk_texts)

    def prompt(self, query: str) -> tuple[int, ...]:
        """All ids for a question: prefix, context, suffix."""
        return (*self.prefix_ids, *self.context_ids, *self._parts(query).suffix_ids)

    def shape(self, query: str, max_tokens: int | None = None) -> DocumentShape:
        """The prompt's sizes for a question. Raises PromptError where it exceeds the model's positions."""
        config, prefix, suffix = self.model.config, len(self.prefix_ids), len(self._parts(query).suffix_ids)
        length = prefix + len(self.context_ids) + suffix
        return DocumentShape(
            n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, chunk=self.chunk,
            n_chunks=self.n_chunks, prefix=prefix, remainder=self.remainder, suffix=suffix,
            max_new=check_positions(config, length, max_tokens), window=config.sliding_window, digest=self.digest)

    def plan(self, query: str, *, policy: str | Policy = "budget", scorer: str | Scorer = "bm25",
             max_tokens: int | None = None, pin: Sequence[str] = (), **options: Any) -> Plan:
        """Which chunk keeps how many bits for this question. options go to the policy (kv_bits, alpha, sink, ...).

        pin: texts of the document; every chunk that holds one gets the policy's top tier, within its budget (policies
        budget and cocktail). Any white space in them stands for any other.

        With scorer "attention" the whole prompt is read for it; `pending` gives what ask and compare can make the plan
        of while they read it themselves.
        """
        planned = self.pending(query, policy=policy, scorer=scorer, max_tokens=max_tokens, pin=pin,
                               **options)
        if isinstance(planned, PendingPlan):
            return planned.make()
        return planned if isinstance(planned, Plan) else self._read(query, [planned]).plans[0]

    def pending(self, query: str, *, policy: str | Policy = "budget", scorer: str | Scorer = "bm25",
                max_tokens: int | None = None, pin: Sequence[str] = (), progress: ProgressReport | None = None,
                **options: Any) -> Planned:
        """The plan that `ask` follows, as far as it is known before the prompt is read: whole, or scored while that
        goes on. For `ask` and `compare`; arguments as for `plan`. Raises PromptError, PlanError, ScorerError."""
        return self._planned(query, policy, scorer, max_tokens, pin, progress, options)[0]

    @overload
    def ask(self, query: str, *, policy: str | Policy = "budget", scorer: str | Scorer = "bm25",
            plan: Plan | None = None, max_tokens: int | None = None, pin: Sequence[str] = (),
            sampling: SamplingParams | None = None, stop: Sequence[str] = (), stream: Literal[False] = False,
            progress: ProgressReport | None = None, **options: Any) -> Answer: ...

    @overload
    def ask(self, query: str, *, policy: str | Policy = "budget", scorer: str | Scorer = "bm25",
            plan: Plan | None = None, max_tokens: int | None = None, pin: Sequence[str] = (),
            sampling: SamplingParams | None = None, stop: Sequence[str] = (), stream: Literal[True],
            progress: ProgressReport | None = None, **options: Any) -> AnswerStream: ...

    def ask(self, query: str, *, policy: str | Policy = "budget", scorer: str | Scorer = "bm25",
            plan: Plan | None = None, max_tokens: int | None = None, pin: Sequence[str] = (),
            sampling: SamplingParams | None = None, stop: Sequence[str] = (), stream: bool = False,
            progress: ProgressReport | None = None, **options: Any) -> Answer | AnswerStream:
        """Answer a question about the document.

        policy, scorer, pin, options: see plan(); plan: one made before, instead. max_tokens: None for up to 256.
        progress(stage, done, total) reports "score" and "prefill". stream=True returns an AnswerStream: iterate it
        for pieces of text. Raises PromptError, PlanError, ScorerError, OutOfMemory before any work is done; what goes
        wrong while chunks are scored comes once the first layer has been read, where the policy can wait so long.
        """
        answer = AnswerStream(self._job(query, policy, scorer, plan, max_tokens, pin, sampling, stop, progress,
                                        options))
        return answer if stream else answer.answer

    def submit(self, query: str, *, policy: str | Policy = "budget", scorer: str | Scorer = "bm25",
               plan: Plan | None = None, max_tokens: int | None = None, pin: Sequence[str] = (),
               sampling: SamplingParams | None = None, stop: Sequence[str] = (),
               progress: ProgressReport | None = None, priority: int = 0, deadline: float | None = None,
               **options: Any) -> Submission:
        """`ask` among other requests, in the model's scheduler (Model.serve): returns at once; see Submission for how
        to take the answer.

        priority: higher ones go first. deadline: seconds within which the answer must be complete. Chunks are scored
        on a thread of the scheduler's, but before this returns where the policy needs the scores for the cache's size
        (`cocktail`). progress is called on its threads. Raises as ask does, OutOfMemory where it can never fit, and
        SchedulerError.
        """
        job = self._job(query, policy, scorer, plan, max_tokens, pin, sampling, stop, progress, options)
        return Submission(self.model.scheduler, job, priority, deadline)

    def _job(self, query: str, policy: str | Policy, scorer: str | Scorer, plan: Plan | None, max_tokens: int | None,
             pin: Sequence[str], sampling: SamplingParams | None, stop: Sequence[str],
             progress: ProgressReport | None, options: Mapping[str, Any]) -> Job:
        chosen_plan: Planned
        if plan is None:
            chosen_plan, seconds = self._planned(query, policy, scorer, max_tokens, pin, progress, options)
        elif useless := sorted([*options, *["pin"] * bool(pin)]):
            raise PlanError(f"a plan was given; {', '.join(useless)} would change nothing")
        else:
            chosen_plan, seconds = plan, 0.0
        max_new = chosen_plan.layout.max_new if max_tokens is None else max_tokens
        self.check_plan(chosen_plan, query, max_new)
        return Job(self.model.engine, self.model.tokenizer, self.prompt(query), chosen_plan,
                   sampling or SamplingParams(), max_new, tuple(stop), seconds, progress, self._master)

    def logits(self, query: str, answer_ids: Sequence[int], *, plan: Planned | None = None,
               **options: Any) -> npt.NDArray[np.float32]:
        """Teacher forcing over a mixed cache: (len(answer_ids), V) float32; row i predicts answer_ids[i].

        Row 0 is the exact prefill's (the paper's order of work). options as for plan().
        """
        if plan is None:
            plan = self.pending(query, max_tokens=max(len(answer_ids), 1), **options)
        return self._read(query, [plan]).force(answer_ids)

    def compare(self, query: str, plans: Mapping[str, Planned], *, answer_ids: Sequence[int] | None = None,
                max_tokens: int = 64, progress: ProgressReport | None = None) -> dict[str, Comparison]:
        """Run several plans, or what `pending` gives, over one prefill of the same prompt.

        answer_ids: the answer along which every plan is teacher-forced; None for the greedy one of the plan named
        "fp16", which must then be there.
        """
        if answer_ids is None and "fp16" not in plans:
            raise PlanError("compare needs answer_ids or a plan named 'fp16' whose answer is the reference")
        reading = self._read(query, list(plans.values()), progress)
        eos = frozenset(self.model.tokenizer.eos_ids) | frozenset(self.model.config.eos_ids)
        names = list(plans)
        own = [tuple(reading.generate(SamplingParams(), max_tokens, eos, cache)) for cache in range(len(names))]
        common = own[names.index("fp16")] if answer_ids is None else tuple(answer_ids)
        return {name: Comparison(own[i], self.model.tokenizer.decode(own[i]), reading.force(common, i),
                                 reading.caches[i].sizes.nbytes, reading.caches[i].sizes.context_bits_per_value,
                                 reading.plans[i])
                for i, name in enumerate(names)}

    def verify(self, query: str, answer: Answer, progress: ProgressReport | None = None) -> Verification:
        """How far the answer is from what the exact cache would have said: one more prefill, whose context comes from
        what is kept of the document, and room for the FP16 cache beside the mixed one.

        Raises PlanError where the answer is to another document or question, PromptError where it has no token,
        OutOfMemory.
        """
        exact = self.plan(query, policy="fp16", max_tokens=answer.plan.layout.max_new)
        return verify(lambda: self._read(query, [exact, answer.plan], progress), answer.ids)

    def _planned(self, query: str, policy: str | Policy, scorer: str | Scorer, max_tokens: int | None,
                 pin: Sequence[str], progress: ProgressReport | None,
                 options: Mapping[str, Any]) -> tuple[Planned, float]:
        """The plan as far as it is known without reading the prompt, and the seconds that scoring took."""
        chosen = load_policy(policy, **options) if isinstance(policy, str) else policy
        chosen.check_model(self.model.engine)
        if pin:
            chosen = chosen.pinned(chunks_with(self, pin))
        shape = self.shape(query, max_tokens)
        if scorer == AttentionScorer.name or isinstance(scorer, AttentionScorer):
            attention = AttentionScorer()
            attention.checked(chosen)  # before a layout is asked for, which may need scores
            asked = self._parts(query).query if query.strip() else range(0)
            rows = query_rows(shape.prompt_tokens, shape.suffix, asked)
            return attention.plan(chosen, chosen.layout(shape), rows), 0.0
        if not chosen.uses_scores:
            return chosen.plan(shape), 0.0
        judge = self._scorer(scorer)

        def score() -> Scores:
            if progress is not None:
                progress("score", 0, 1)
            # A question behind others may be no more than "And when?": the one before says what it is about.
            about = " ".join(text for text in (*(question for question, _ in self.turns[-1:]), query) if text.strip())
            scores = judge.score(self.chunk_texts, about.strip() or default_query(self.system, self._last_text()))
            if progress is not None:
                progress("score", 1, 1)
            return scores

        if not chosen.layout_needs_scores:
            layout = chosen.layout(shape)
            return PendingPlan(layout, lambda: chosen.assign(layout, score(), judge.name)), 0.0
        begin = time.perf_counter()
        scores = score()
        seconds = time.perf_counter() - begin
        return chosen.plan(shape, scores, judge.name), seconds

    def _read(self, query: str, plans: Sequence[Planned], progress: ProgressReport | None = None) -> Reading:
        for plan in plans:
            self.check_plan(plan, query)
        return read(self.model.engine, self.prompt(query), plans, _prefill_report(progress), master=self._master)

    def check_plan(self, plan: Planned, query: str, max_new: int | None = None) -> None:
        """Raises PlanError where it was made for another model, document or length of question, as far as known, or
        lacks room for max_new tokens (None: for those it was made for)."""
        layout = plan.layout
        max_new = layout.max_new if max_new is None else max_new
        shape = self.shape(query, max_new)
        layout.check(**{name: getattr(shape, name) for name in (
            "n_layers", "n_kv_heads", "head_dim", "window", "chunk", "prefix", "context_tokens", "suffix")})
        if layout.digest not in (None, shape.digest):
            raise PlanError(f"the plan was made for another document, of as many tokens: the digest of its ids is "
                            f"{layout.digest}, expected {shape.digest}; make a new plan")
        if max_new > layout.max_new:
            raise PlanError(f"{max_new} tokens are to be generated; the plan has room for {layout.max_new}")
        if isinstance(plan, Plan):
            _check_stored(plan)

    def _parts(self, query: str) -> PromptParts:
        # Any context gives the same suffix: it is tokenized apart. A letter spares tokenizing the document again.
        return split_prompt(self.model.tokenizer, self.model.template, "x", query, self.system, self.turns)

    def _scorer(self, scorer: str | Scorer) -> Scorer:
        if not isinstance(scorer, str):
            return scorer
        with self._loading:
            if scorer not in self._scorers:
                device = "cpu" if self.model.backend.name == "cpu" else None
                self._scorers[scorer] = load_scorer(scorer, device=device)
            return self._scorers[scorer]

    def _new_master(self, keep: Keep) -> SharedMaster | None:
        config, backend = self.model.config, self.model.backend
        if keep not in (None, False, True, "file", "memory"):
            raise DocumentError(f'keep is {keep!r}; expected True, False, None, "file" or "memory"')
        if keep is None:
            keep = backend.name == "cpu" and is_keepable(config)
        if keep is False:
            return None
        if not is_keepable(config):
            raise DocumentError("this model's positions are scaled by the length of the whole prompt (dynamic NTK), so "
                                "the document's K changes with every question; read it with keep=False")
        return SharedMaster(backend, config, (*self.prefix_ids, *self.context_ids), self._place(keep))

    def _place(self, keep: Keep) -> Place:
        return keep if isinstance(keep, str) else "file" if self.model.backend.name == "cpu" else "memory"

    def _adopt(self, ids: tuple[int, ...], prefix: int, full: Master) -> None:
        """For open_document. The prefix is the file's: a template may put today's date there."""
        self.prefix_ids = ids[:prefix]
        self._master = SharedMaster(self.model.backend, self.model.config, ids, self._place(True), full)

    def _last_text(self) -> str:
        return self.model.tokenizer.decode(self.context_ids[-64:])


def _check_stored(plan: Plan) -> None:
    """Every chunk that an answer can see has to be stored; policies see to it, an edited plan may not."""
    layout = plan.layout
    if HIDDEN not in layout.tiers:
        return
    index, visible = layout.tiers.index(HIDDEN), len(layout.hidden_chunks())
    for layer, tiers in enumerate(plan.assignment):
        if index in tiers[visible:]:
            raise PlanError(f"chunk {tiers.index(index, visible)} of layer {layer} is not stored ({HIDDEN}), but the "
                            "answer can see it; expected a tier of 2 bits or more")


def _prefill_report(progress: ProgressReport | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("prefill", done, total)


def plan_stats(plan: Plan) -> dict[str, Any]:
    """bpv: bits per context value; cache_bytes: the arena; fp16_bytes: the same tokens at 16 bits; chunks per tier."""
    sizes = plan_sizes(plan)
    return {"bpv": sizes["context_bits_per_value"], "cache_bytes": sizes["cache_bytes"],
            "fp16_bytes": sizes["cache_fp16_bytes"], "chunks": sizes["chunks"]}
