"""Read a long document on one machine with a KV cache whose precision follows the question.

    import cocktail
    model = cocktail.load("model.safetensors")
    doc = model.read(open("report.txt").read())
    print(doc.ask("Who signed the contract?", kv_bits=3.3).text)

Names are imported on first use, so that `import cocktail` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocktail.answer import Answer, AnswerStream, Stats
    from cocktail.document import Comparison, Document, plan_stats
    from cocktail.model import Model, load
    from runtime.errors import CocktailError
    from runtime.plan import Plan
    from runtime.sampler import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "Answer": "cocktail.answer", "AnswerStream": "cocktail.answer", "Stats": "cocktail.answer",
    "Comparison": "cocktail.document", "Document": "cocktail.document", "plan_stats": "cocktail.document",
    "Model": "cocktail.model", "load": "cocktail.model",
    "CocktailError": "runtime.errors", "Plan": "runtime.plan", "SamplingParams": "runtime.sampler",
}
__all__ = ["Answer", "AnswerStream", "CocktailError", "Comparison", "Document", "Model", "Plan", "SamplingParams",
           "Stats", "load", "plan_stats"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cocktail' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
