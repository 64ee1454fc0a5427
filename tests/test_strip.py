"""A plan in the terminal: one mark per chunk, whatever the width; colours only where there are any."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from plans import plan_of_layers, plans
from rich.console import Console

from cocktail.mix import SCALE, chunk_bits, legend, step
from cocktail.strip import show_plan, strip

MIXED = plan_of_layers((1, *[2] * 150, *[0] * 49))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "50")
    return Terminal()


def test_every_tier_is_named_and_every_chunk_drawn(terminal):
    show_plan(MIXED, terminal)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert plain != terminal.getvalue()
    lines = plain.splitlines()
    assert "".join(lines[-4:]) == "#" + 150 * ":" + 49 * "+"
    assert [len(line) for line in lines[-4:]] == [50] * 4
    for name in (": K3V2 (150)", "+ K4V4 (49)", "# FP16 (1)"):
        assert name in " ".join(plain.split())


def test_plain_where_nothing_has_colours(terminal, monkeypatch):
    file = io.StringIO()
    show_plan(MIXED, file)
    assert "\x1b" not in file.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    show_plan(MIXED, terminal)
    assert terminal.getvalue() == file.getvalue()


def test_where_layers_differ_their_mean_is_drawn():
    differing = plan_of_layers((1, 0, 2), (1, 1, 2), (1, 0, 2))
    assert chunk_bits(differing) == [16, 8, 2.5]
    names, drawn = strip(differing, coloured=False)
    assert drawn.plain == "#%:"
    assert names.plain == "chunks, mean over layers:  : 2.5 bits (1)  % 8 bits (1)  # 16 bits (1)"


@settings(max_examples=40, deadline=None)
@given(plans())
def test_any_plan_has_its_strip(any_plan):
    bits = chunk_bits(any_plan)
    named, drawn = strip(any_plan, coloured=True)
    assert len(drawn.plain) == len(bits) == any_plan.layout.n_chunks
    assert sum(count for *_, count in legend(any_plan, bits)) == len(bits)
    Console(file=io.StringIO(), width=20, force_terminal=True).print(named, drawn)


def test_the_scale_grows_and_no_two_steps_look_alike():
    assert all(low.bits < high.bits for low, high in pairwise(SCALE))
    assert len({one.mark for one in SCALE}) == len({one.colour for one in SCALE}) == len(SCALE)
    assert [step(one.bits) for one in SCALE] == list(SCALE)
