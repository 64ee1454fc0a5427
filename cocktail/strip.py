"""A plan in the terminal: a table of its tiers and one strip of all chunks in document order."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from cocktail.mix import chunk_bits, layers_differ, legend, step

if TYPE_CHECKING:
    from rich.text import Text

    from runtime.plan import Plan


def show_plan(plan: Plan, file: TextIO) -> None:
    """Prints plan.table(), a legend and the strip, which is as wide as the terminal.

    Coloured where the file is a terminal that has colours and NO_COLOR is not set; else the marks alone.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False)
    print(plan.table(), file=file)
    if plan.layout.n_chunks:
        for text in strip(plan, coloured=console.color_system is not None and not console.no_color):
            console.print(text, soft_wrap=False, overflow="fold")


def strip(plan: Plan, coloured: bool) -> tuple[Text, Text]:
    """The legend, and one mark per chunk."""
    from rich.style import Style
    from rich.text import Text

    def style(colour: str) -> Style:
        return Style(color="#101418", bgcolor=colour) if coloured else Style.null()

    bits = chunk_bits(plan)
    what = "mean over layers" if layers_differ(plan) else "in document order"
    named, drawn = Text(f"chunks, {what}:"), Text()
    for one, name, count in legend(plan, bits):
        named.append("  ").append(one.mark, style(one.colour)).append(f" {name} ({count})")
    for one, same in groupby(map(step, bits)):
        drawn.append(one.mark * len(list(same)), style(one.colour))
    return named, drawn
