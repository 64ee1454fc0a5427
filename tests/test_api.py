"""The public API: what `cocktail` names exists and is documented, and its page builds without a warning."""

from __future__ import annotations

import builtins
import inspect
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import cocktail

ROOT = Path(__file__).parents[1]


def members(cls: type) -> dict[str, Any]:
    """The public methods and properties that a class defines itself."""
    found = {name: getattr(member, "__func__", member) for name, member in vars(cls).items() if name[0] != "_"}
    return {name: m for name, m in found.items() if inspect.isfunction(m) or isinstance(m, property)}


EXPORTS = {name: getattr(cocktail, name) for name in cocktail.__all__}
PUBLIC = EXPORTS | {f"{cls}.{name}": member for cls, value in EXPORTS.items() if inspect.isclass(value)
                    for name, member in members(value).items()}


def test_every_export_has_one_home():
    homes = [name for names in cocktail._HOMES.values() for name in names]
    assert sorted(homes) == sorted(cocktail.__all__)


def test_public_modules_need_no_import_of_their_own():
    script = "import cocktail; print(cocktail.report.write.__name__, cocktail.promote.promote.__name__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "write promote\n"


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        _ = cocktail.Modle


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    value = PUBLIC[name]
    doc = value.__doc__ or ""
    assert doc.strip(), f"{name} has no docstring"
    assert not (is_dataclass(value) and doc.startswith(f"{value.__name__}(")), f"{name} has a dataclass's own docstring"


def test_the_errors_that_docstrings_name_are_exported():
    named = {error for value in PUBLIC.values() for error in re.findall(r"\b[A-Z]\w+(?:Error|Memory)\b", value.__doc__)}
    assert named
    assert named <= EXPORTS.keys() | vars(builtins).keys()


def test_the_page_of_the_api_builds_and_shows_every_name(tmp_path):
    """Any warning ends it: an export that does not resolve, a signature that cannot be read."""
    done = subprocess.run([sys.executable, "docs/build.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "cocktail.html").read_text(encoding="utf-8")
    assert not [name for name in PUBLIC if f'id="{name}"' not in page]
    assert "&lt;span" not in page
    assert "<ol" not in page  # a line of a docstring that begins with a number and a full stop
    assert "runtime.plan.Plan" not in re.sub(r"</?span[^>]*>", "", page)  # classes go by their public names
