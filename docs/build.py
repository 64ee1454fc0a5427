"""Builds the API page from the docstrings: `python docs/build.py [FOLDER]`, by default docs/api/ (`make docs`).

A warning is an error: a public name that does not resolve, a signature that cannot be read.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pdoc
import pdoc.render
from jinja2 import pass_context
from markupsafe import Markup

ROOT = Path(__file__).parents[1]
# Beside the public names and modules: what `policy=`, `scorer=` and their options stand for.
MODULES = ("cocktail", "cocktail.report", "cocktail.promote", "cocktail.policies", "cocktail.scorers")


def main(folder: str = str(ROOT / "docs/api")) -> None:
    warnings.simplefilter("error")
    sys.path.insert(0, str(ROOT))
    import cocktail

    public = {name: getattr(cocktail, name) for name in cocktail.__all__}  # pdoc sees what has been imported
    homes = {f"{obj.__module__}.{name}": f"cocktail.{name}" for name, obj in public.items()}
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text=f"cocktail-kv {cocktail.__version__}")
    pdoc.render.env.filters["linkify"] = linkify_to(homes, pdoc.render.env.filters["linkify"])
    pdoc.render.env.filters["to_markdown"] = listing(pdoc.render.env.filters["to_markdown"])
    pdoc.pdoc(*MODULES, output_directory=Path(folder))


def listing(to_markdown: Any) -> Any:
    """pdoc's filter, for docstrings in which `name: meaning` is an item of a list, and what is raised a paragraph."""
    name = r"[a-z]\w*"
    begins = rf"(?:^|(?<=[.;]) )(?=(?:{name}(?:, {name})*): )|(?<=\.) (?=Raises )"

    def listed(paragraph: str) -> str:
        if re.search(r"^( {4}|[-|*] )", paragraph, re.MULTILINE):
            return paragraph  # code, a list or a table
        first, *parts = re.split(begins, " ".join(paragraph.split()))
        return "\n\n".join([first, *(part if part.startswith("Raises") else re.sub(r"^(.*?): ", r"- **\1**: ", part)
                                     for part in parts)])

    @pass_context
    def converted(context: Any, docstring: str) -> str:
        markdown: str = to_markdown(context, "\n\n".join(map(listed, docstring.split("\n\n"))))
        return markdown

    return converted


def linkify_to(homes: dict[str, str], linkify: Any) -> Any:
    """pdoc's filter, for signatures in which a class goes by its public name, not by the module that defines it."""
    dot = '</span><span class="o">.</span><span class="n">'  # as pdoc highlights it
    names = homes | {home.replace(".", dot): public.replace(".", dot) for home, public in homes.items()}

    @pass_context
    def renamed(context: Any, code: str, **options: Any) -> Markup:
        text = str(code)  # a Markup would escape what is put in
        for home, public in names.items():
            text = text.replace(home, public)
        linked: Markup = linkify(context, text, **options)
        return linked

    return renamed


if __name__ == "__main__":
    main(*sys.argv[1:])
