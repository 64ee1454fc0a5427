"""Read a long document on one machine with a KV cache whose precision follows the question.

    import cocktail
    model = cocktail.load("model.safetensors")
    doc = model.read(open("report.txt").read())
    print(doc.ask("Who signed the contract?", kv_bits=3.3).text)

What is named here is the public API, the modules `cocktail.report` and `cocktail.promote` among it: it changes only
with an entry in CHANGELOG.md, and a name that goes is deprecated for one release first. Everything else may change at
any time. It is typed (`py.typed`). Arrays are NumPy arrays on the host; token ids are ints; sizes are bytes, times
seconds. What is refused raises a subclass of `CocktailError`.

Names are imported on first use, so that `import cocktail` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocktail import promote as promote
    from cocktail import report as report
    from cocktail.answer import Answer, AnswerStream, Stats
    from cocktail.document import Comparison, Document, plan_stats
    from cocktail.model import Model, load
    from cocktail.policies import Policy, load_policy
    from cocktail.saved import open_document
    from cocktail.scorers import Scorer, load_scorer
    from cocktail.serving import Submission
    from cocktail.verify import Verification
    from runtime.errors import (
        BackendError,
        CheckpointError,
        CocktailError,
        DeadlineExceeded,
        DocumentError,
        OutOfMemory,
        PlanError,
        PromptError,
        RequestCancelled,
        SchedulerError,
        ScorerError,
        TokenizerError,
    )
    from runtime.plan import DocumentShape, Layout, Plan, Tier
    from runtime.request import Request, Ticket
    from runtime.sampler import SamplingParams
    from runtime.schedule import SchedulerStats
    from runtime.scheduler import Scheduler

__version__ = "0.1.0"

_HOMES = {
    "cocktail.answer": ("Answer", "AnswerStream", "Stats"),
    "cocktail.document": ("Comparison", "Document", "plan_stats"),
    "cocktail.model": ("Model", "load"),
    "cocktail.policies": ("Policy", "load_policy"),
    "cocktail.saved": ("open_document",),
    "cocktail.scorers": ("Scorer", "load_scorer"),
    "cocktail.serving": ("Submission",),
    "cocktail.verify": ("Verification",),
    "runtime.errors": ("BackendError", "CheckpointError", "CocktailError", "DeadlineExceeded", "DocumentError",
                       "OutOfMemory", "PlanError", "PromptError", "RequestCancelled", "SchedulerError", "ScorerError",
                       "TokenizerError"),
    "runtime.plan": ("DocumentShape", "Layout", "Plan", "Tier"),
    "runtime.request": ("Request", "Ticket"),
    "runtime.sampler": ("SamplingParams",),
    "runtime.schedule": ("SchedulerStats",),
    "runtime.scheduler": ("Scheduler",),
}
_MODULES = ("promote", "report")
__all__ = [  # noqa: RUF022 (the order of the API page)
    "load", "Model", "Document", "open_document", "Answer", "AnswerStream", "Stats", "SamplingParams", "Comparison",
    "Verification",
    "Plan", "Layout", "DocumentShape", "Tier", "plan_stats", "Policy", "load_policy", "Scorer", "load_scorer",
    "Submission", "Scheduler", "SchedulerStats", "Request", "Ticket",
    "CocktailError", "CheckpointError", "TokenizerError", "BackendError", "OutOfMemory", "PromptError", "PlanError",
    "ScorerError", "DocumentError", "RequestCancelled", "DeadlineExceeded", "SchedulerError",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"cocktail.{name}")
    for module, names in _HOMES.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(module), name))
    raise AttributeError(f"module 'cocktail' has no attribute {name!r}")
