"""Answers that come with a bound: the budget is raised until an answer is close enough to the exact cache's.

    found = cocktail.promote.promote(doc, "Who signed?", kl=0.01, kv_bits=3.3)
    print(found.answer.text, found.verification.mean_kl, found.steps)

Every step answers anew with a quarter more bits per value, spent along the budget's own path, and is verified. Keeping
the document (Model.read's keep) makes a step cheap: only the question is read again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from cocktail.policies import DEFAULT_POLICY, Policy, load_policy
from cocktail.policies.budget import BudgetPolicy
from runtime.errors import PlanError

if TYPE_CHECKING:
    from cocktail.answer import Answer
    from cocktail.document import Document, ProgressReport
    from cocktail.verify import Verification
    from runtime.sampler import SamplingParams

DEFAULT_KL = 0.01  # nats; the log's budgets of 4 to 5 bits have about that
STEP = 1.25  # bits per value, from one step to the next


@dataclass(frozen=True)
class Step:
    """One answer on the way: bits per context value, bytes of the cache, mean KL (nats; None where there was nothing to
    compare)."""

    bits: float
    cache_bytes: int
    kl: float | None


@dataclass(frozen=True)
class Promotion:
    """answer, verification: of the last step. steps: all of them, the first with the budget that was asked for.
    seconds: from the question to the end, verification included."""

    answer: Answer
    verification: Verification
    steps: tuple[Step, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For the statistics' JSON."""
        return {"steps": [vars(step) for step in self.steps], "seconds": self.seconds}


def promote(document: Document, query: str, *, kl: float = DEFAULT_KL, policy: str | Policy = DEFAULT_POLICY,
            scorer: Any = "bm25", max_tokens: int | None = None, pin: Sequence[str] = (),
            sampling: SamplingParams | None = None, stop: Sequence[str] = (),
            progress: ProgressReport | None = None, **options: Any) -> Promotion:
    """Ask, and raise the budget until the mean KL along the answer is at most kl nats. Arguments as for Document.ask.

    Raises PlanError where the policy has no budget to raise, or where the bound does not hold at the policy's top tier
    either; besides what ask and verify raise.
    """
    begin = time.perf_counter()
    if not (isfinite(kl) and kl >= 0):
        raise PlanError(f"the bound on KL is {kl}; expected nats, such as {DEFAULT_KL}")
    chosen = load_policy(policy, **options) if isinstance(policy, str) else policy
    if not isinstance(chosen, BudgetPolicy) or chosen.shares is not None:
        raise PlanError(f"policy {chosen.name} has no budget to raise; use policy budget with bits or bytes")
    steps: list[Step] = []
    while True:
        answer = document.ask(query, policy=chosen, scorer=scorer, max_tokens=max_tokens, pin=pin, sampling=sampling,
                              stop=stop, progress=progress)
        verification = document.verify(query, answer, progress)
        stats = answer.stats
        steps.append(Step(stats.context_bits_per_value, stats.cache_bytes, verification.mean_kl))
        if verification.mean_kl is None or verification.mean_kl <= kl:
            return Promotion(answer, verification, tuple(steps), time.perf_counter() - begin)
        if len(steps) > 1 and steps[-1].bits <= steps[-2].bits:
            raise PlanError(f"the mean KL is {verification.mean_kl:.4f} at {steps[-1].bits:.2f} bits per value, above "
                            f"the bound of {kl:g}, and policy budget has no higher tier to go to; add one to tiers")
        chosen = chosen.with_bits(stats.context_bits_per_value * STEP)
