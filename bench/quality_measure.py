"""One prompt under every setting, from one prefill: what bench.quality measures, and how.

Two answers are teacher-forced. Along the reference, KL and top-1 agreement are taken: it is the FP16 cache's own greedy
answer, for what is dictated the given answer behind its lead. Along the prompt's lead and answer, what the setting gets
right: a token of the answer is right where greedy decoding would choose it. The first token of all never counts: it
comes from the exact prefill whatever the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import cocktail
from bench.prompts import Prompt
from bench.quality_settings import Setting
from cocktail.document import Document
from cocktail.scorers import Scorer, Scores, load_scorer
from cocktail.scorers.hybrid import z_scores
from cocktail.verify import agreement, divergence, log_softmax
from runtime.arena import ArenaLayout
from runtime.engine import Planned, Reading, read
from runtime.errors import CocktailError, PlanError
from runtime.forced import force
from runtime.plan import FP16, HIDDEN, Plan
from runtime.sampler import SamplingParams

ANSWER_TOKENS = 24  # of the FP16 cache's own answer


@dataclass(frozen=True)
class Sample:
    """One prompt under one setting. kl (nats), agree: per token of the reference. recall: share
    of needed chunks above the lowest tier, NaN where none is needed or nothing was scored. mib: the whole cache."""

    kind: str
    bpv: float
    mib: float
    kl: tuple[float, ...]
    agree: tuple[bool, ...]
    correct: float
    recall: float


def measure(model: cocktail.Model, prompt: Prompt, settings: Sequence[Setting], scorers: Mapping[str, Scorer],
            seed: int) -> dict[str, Sample]:
    """Samples by the settings' names; the first setting is FP16.

    A budget that cannot be as low as the setting whose bytes it matches is left out. Raises CocktailError, naming the
    setting, where its policy or the backend refuses it.
    """
    encode = model.tokenizer.encode
    given, lead = encode(prompt.lead + prompt.answer), encode(prompt.lead) if prompt.lead else []
    if given[: len(lead)] != lead:
        raise ValueError(f"{prompt.lead + prompt.answer!r} does not begin with the tokens of {prompt.lead!r}")
    documents = {chunk: model.read(prompt.context, chunk=chunk) for chunk in {setting.chunk for setting in settings}}
    plans = make_plans(documents, prompt, settings, Judges(documents, prompt, scorers, seed), seed,
                       room=max(ANSWER_TOKENS, len(given)))
    reading = _read(model, documents[settings[0].chunk].prompt(prompt.query), plans)
    reference, first = (given, max(len(lead), 1)) if prompt.dictated else (_greedy(model, reading), 1)
    exact = log_softmax(force(reading, reference, 0)[first:])
    samples, scorer_of = {}, {setting.name: setting.scorer for setting in settings}
    for i, (name, plan) in enumerate(zip(plans, reading.plans, strict=True)):
        logits = force(reading, reference, i)
        answered = logits if prompt.dictated else force(reading, given, i)
        needed = prompt.needed_chunks(documents[plan.layout.chunk].chunk_texts) if scorer_of[name] != "none" else ()
        sizes = reading.caches[i].sizes
        logs = log_softmax(logits[first:])
        samples[name] = Sample(
            prompt.kind, sizes.context_bits_per_value, sizes.nbytes / 2**20,
            tuple(divergence(exact, logs).tolist()), tuple(agreement(exact, logs).tolist()),
            correctness(answered, given, len(lead), prompt.exact), recall(plan, needed))
    return samples


class Judges:
    """The scorers of one prompt. Scoring costs more than planning and many settings share it, so it is done once.

    Beside those given: "none"; "hybrid", of bm25 and encoder; "random", by the seed; "oracle", the needed chunks first
    and the others in hybrid's order (bm25's where there is no encoder): what a scorer could reach; "anti-oracle", the
    reverse. "attention" scores in the prefill.
    """

    def __init__(self, documents: Mapping[int, Document], prompt: Prompt, scorers: Mapping[str, Scorer], seed: int):
        self._documents, self._prompt, self._scorers, self._seed = documents, prompt, scorers, seed
        self._known: dict[tuple[str, int], Known] = {}

    def get(self, name: str, chunk: int) -> Known | str:
        """The scorer of that name for chunks of that size."""
        return name if name == "attention" else self._known_one(name, chunk)

    def _known_one(self, name: str, chunk: int) -> Known:
        if (name, chunk) not in self._known:
            self._known[name, chunk] = Known(name, self._score(name, chunk))
        return self._known[name, chunk]

    def _score(self, name: str, chunk: int) -> Scores:
        document = self._documents[chunk]
        if name == "hybrid":
            return z_scores(self._of("bm25", chunk)) + z_scores(self._of("encoder", chunk))
        if name == "oracle":
            best = self._of("hybrid" if "encoder" in self._scorers else "bm25", chunk)
            needed = self._prompt.needed_chunks(document.chunk_texts)
            return best + np.float32(np.ptp(best) + 1) * np.isin(np.arange(document.n_chunks), needed)
        if name == "anti-oracle":
            return -self._of("oracle", chunk)
        scorer = self._scorers.get(name) or load_scorer(name, **({"seed": self._seed} if name == "random" else {}))
        # The policy does not matter: a plan holds the scores, and knows what to ask where there is no question.
        plan = document.plan(self._prompt.query, policy="budget", scorer=scorer, max_tokens=1)
        return np.array(plan.scores, np.float32)

    def _of(self, name: str, chunk: int) -> Scores:
        return self._known_one(name, chunk).scores


@dataclass(frozen=True)
class Known:
    """A scorer whose scores are known."""

    name: str
    scores: Scores

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        return self.scores


def make_plans(documents: Mapping[int, Document], prompt: Prompt, settings: Sequence[Setting], judges: Judges,
               seed: int, room: int) -> dict[str, Planned]:
    """One plan per setting, by name, in the settings' order; room: tokens of an answer, at most."""
    plans: dict[str, Planned] = {}
    for setting in sorted(settings, key=lambda setting: setting.match is not None):
        options = dict(setting.options)
        if setting.match is not None:
            matched = ArenaLayout(plans[setting.match].layout)
            if matched.layout.chunk == setting.chunk:
                options["kv_bits"] = matched.context_bits_per_value
            else:
                options["kv_budget"] = matched.nbytes
        if "no_search" in options:
            options["seed"] = seed
        try:
            plans[setting.name] = documents[setting.chunk].pending(
                prompt.query, policy=setting.policy, scorer=judges.get(setting.scorer, setting.chunk), max_tokens=room,
                **options)
        except PlanError as error:
            if setting.match is None:
                raise PlanError(f"{setting.name}: {error}") from error
    return {setting.name: plans[setting.name] for setting in settings if setting.name in plans}


def correctness(logits: npt.NDArray[np.float32], answer: Sequence[int], lead: int, exact: bool) -> float:
    """Whether all (exact), or which share, of the tokens behind the lead are those that greedy decoding would choose.

    logits (n, V): row i predicts answer[i]. The first token is never judged.
    """
    right = (logits.argmax(axis=1) == answer)[max(lead, 1) :]
    return float(right.all() if exact else right.mean())


def recall(plan: Plan, needed: Sequence[int]) -> float:
    """Share of the needed chunks whose tier is above the layer's lowest, mean over layers; the sink does not count.

    NaN where nothing is needed from a whole chunk, or all chunks share one tier in every layer.
    """
    shares = []
    for assignment in dict.fromkeys(plan.assignment):
        tiers = [plan.layout.tiers[index] for index in assignment]
        lowest = min((t.k_bits + t.v_bits for t in tiers if t not in (HIDDEN, FP16)), default=None)
        if lowest is not None and needed:
            above = np.mean([tiers[i].k_bits + tiers[i].v_bits > lowest for i in needed])
            shares += [above] * plan.assignment.count(assignment)
    return float(np.mean(shares)) if shares else float("nan")


def _read(model: cocktail.Model, prompt: Sequence[int], plans: Mapping[str, Planned]) -> Reading:
    try:
        return read(model.engine, prompt, list(plans.values()))
    except (CocktailError, RuntimeError):
        for name, plan in plans.items():  # whose was it?
            try:
                read(model.engine, prompt, [plan])
            except (CocktailError, RuntimeError) as error:
                raise PlanError(f"{name}: {error}") from error
        raise


def _greedy(model: cocktail.Model, reading: Reading) -> list[int]:
    stop = {*model.tokenizer.eos_ids, *model.config.eos_ids}
    return list(reading.generate(SamplingParams(), ANSWER_TOKENS, stop))
