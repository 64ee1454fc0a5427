"""How far an answer over a mixed cache is from what the exact one would have said, token by token.

The answer is teacher-forced over both caches: at each of its tokens the two distributions of the next one are compared.
bench.quality and cocktail.tune measure by the same functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.engine import Reading
from runtime.forced import force

Logs = npt.NDArray[np.float64]
ROWS = 32  # tokens whose distributions are held in float64 at a time


@dataclass(frozen=True)
class Verification:
    """An answer's tokens but the first, which comes from the exact prefill whatever the cache: per token, kl (nats) of
    the mixed cache's distribution from the exact one's, and whether both have the same token at the top (agree).

    seconds: what it took, prefill and all.
    """

    kl: tuple[float, ...]
    agree: tuple[bool, ...]
    seconds: float

    @property
    def agreement(self) -> float | None:
        """Share of tokens at which both agree; None where there is none to compare."""
        return sum(self.agree) / len(self.agree) if self.agree else None

    @property
    def mean_kl(self) -> float | None:
        """Nats, over all tokens; None where there is none to compare."""
        return sum(self.kl) / len(self.kl) if self.kl else None

    @property
    def worst_kl(self) -> float | None:
        """Nats, at the worst token; None where there is none to compare."""
        return max(self.kl, default=None)

    @property
    def worst_token(self) -> int | None:
        """Its place in the answer, from 0; None where there is none to compare."""
        return 1 + self.kl.index(max(self.kl)) if self.kl else None

    def to_dict(self) -> dict[str, Any]:
        """For the statistics' JSON."""
        return {"tokens": len(self.kl), "top1_agreement": self.agreement, "mean_kl": self.mean_kl,
                "worst_kl": self.worst_kl, "worst_token": self.worst_token, "seconds": self.seconds}


def verify(read: Callable[[], Reading], answer: Sequence[int]) -> Verification:
    """read: gives the prompt in two caches, the exact one first. answer: the ids to go along, at least one."""
    begin = time.perf_counter()
    reading = read()
    exact, mixed = (force(reading, answer, cache) for cache in (0, 1))
    kl: list[float] = []
    agree: list[bool] = []
    for at in range(1, len(answer), ROWS):
        p, q = log_softmax(exact[at : at + ROWS]), log_softmax(mixed[at : at + ROWS])
        kl += divergence(p, q).tolist()
        agree += agreement(p, q).tolist()
    return Verification(tuple(kl), tuple(agree), time.perf_counter() - begin)


def log_softmax(logits: npt.NDArray[Any]) -> Logs:
    """(T, V) -> (T, V), in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def divergence(p: Logs, q: Logs) -> Logs:
    """KL(p || q) in nats for each row of two log-probability tables (T, V): (T,)."""
    return np.asarray(np.einsum("tv,tv->t", np.exp(p), p - q))


def agreement(p: Logs, q: Logs) -> npt.NDArray[np.bool_]:
    """Whether the same token is at the top of each row of the two tables (T, V): (T,)."""
    return np.asarray(p.argmax(axis=1) == q.argmax(axis=1))
