"""The mix on one page: what each chunk of a document keeps for one question or several, where bytes and time go.

    cocktail.report.write("out.html", doc, {"Who signed?": answer, "When?": another})

The page is one file: no script, nothing fetched. What is in it that a user or a model wrote is escaped, and its own
policy forbids the browser to run or load anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cocktail import summary
from cocktail.chunks import passages
from cocktail.mix import SCALE
from cocktail.report import views
from runtime.errors import PlanError, PromptError
from runtime.plan import Plan

if TYPE_CHECKING:
    from cocktail.answer import Answer
    from cocktail.document import Document
    from cocktail.verify import Verification


def write(path: str | Path, document: Document, asked: Mapping[str, Answer | Plan],
          verified: Mapping[str, Verification] | None = None) -> None:
    """Writes the page of these questions about the document, each with its answer or with a plan alone, and with what
    Document.verify found where that is given.

    Raises PlanError where a plan is of another document, PromptError where the file cannot be written.
    """
    page = render(document, asked, verified)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise PromptError(f"the report {path} cannot be written: {error.strerror or error}") from error


def render(document: Document, asked: Mapping[str, Answer | Plan],
           verified: Mapping[str, Verification] | None = None) -> str:
    """The page as HTML. Raises PlanError as write does."""
    plans = {text: got if isinstance(got, Plan) else got.plan for text, got in asked.items()}
    for plan in plans.values():
        if plan.layout.digest not in (None, document.digest):
            raise PlanError(f"the plan was made for another document: the digest of its ids is "
                            f"{plan.layout.digest}, expected {document.digest}")
        plan.layout.check(chunk=document.chunk, context_tokens=len(document.context_ids))
    texts = passages(document.model.tokenizer, document.context_ids, document.chunk)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": views.size, "seconds": summary.seconds}
    folder = files("cocktail.report")
    return environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8")).render(
        css=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),  # our own: no text of others
        document=document, config=document.model.config, scale=SCALE,
        shades={page: views.shades(page) for page in views.PAGES}, pages=views.PAGES,
        verified={text: summary.verified(found) for text, found in (verified or {}).items()},
        heats=[views.heat(text, plan) for text, plan in plans.items()],
        questions=[views.question(text, plans[text], None if isinstance(got, Plan) else got, texts)
                   for text, got in asked.items()])
