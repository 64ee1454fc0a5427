"""README and the pages in docs/ tell the truth: their links, files, names, commands, options and tables."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cocktail import calibrate, doctor, tune
from cocktail.cli.options import POLICIES, SCORERS, parser
from runtime import plan_json
from runtime.formats import WIDTHS, block_bytes

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PACKAGES = ("cocktail", "runtime", "kernels_c", "kernels_cu", "converters", "bench", "tests")
FOLDERS = (*PACKAGES, "examples", "docs")


def quoted(text: str) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def is_path(name: str) -> bool:
    return re.fullmatch(rf"({'|'.join(FOLDERS)})(/[\w-]+)*(/|/[\w-]+\.\w+)", name) is not None


def anchors(text: str) -> set[str]:
    """The targets of a page's headings, as they are made from their words."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        path = ROOT / "docs" / (file or page)
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_exists(page):
    assert not [name for name in quoted(PAGES[page]) if is_path(name) and not (ROOT / name).exists()]


def resolve(name: str) -> Any:
    """A dotted name from its module down. Raises AttributeError or ModuleNotFoundError."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES)
def test_every_python_name_exists(page):
    for name in quoted(PAGES[page]):
        if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", name):
            resolve(name)
    for module in re.findall(rf"python -m ((?:{'|'.join(PACKAGES)})[\w.]*)", PAGES[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


TEXTS = PAGES | {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "examples/README.md")}
COMMANDS = {"run": parser, "tune": tune.parser, "calibrate": calibrate.parser, "doctor": doctor.parser}
OTHERS = r"python (-m (?:bench|converters)\.?|examples/)([\w.]*)([^`\n]*)"  # commands with options of their own


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_every_option_mentioned_exists():
    known = {name for command in COMMANDS.values() for action in command()._actions for name in action.option_strings}
    for page, text in TEXTS.items():
        assert options_in(re.sub(OTHERS, "", text)) - {"--peers"} <= known, page


@pytest.mark.parametrize(("folder", "name", "line"), sorted({
    (folder, name, line) for text in TEXTS.values() for folder, name, line in re.findall(OTHERS, text)}))
def test_every_command_of_benches_and_examples_exists(folder, name, line):
    """Those about the GPU hand their options on to bench.shapes."""
    folder = folder.removeprefix("-m ").strip("./")
    if folder == "converters":
        return
    sources = [ROOT / folder / name] if folder == "examples" else [
        ROOT / f"{folder}/{module}.py" for module in (name, "shapes")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    assert not [option for option in options_in(line) if f'"{option}"' not in text]


def steps() -> list[tuple[str, list[str]]]:
    """(file, names) of every step of the recipes: names belong to the last file before them."""
    found = []
    for line in re.findall(r"^\d+\. (.*)$", PAGES["kernels-for-contributors.md"], re.MULTILINE):
        for word in re.findall(r"`([^`]+)`", line):
            if "/" in word or word.endswith(".md"):
                found.append((word, []))
            elif re.fullmatch(r"\w+", word) and word not in ("rotated",):
                found[-1][1].append(word)
    return found


@pytest.mark.parametrize(("file", "names"), steps(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_step_of_a_recipe_names_what_is_there(file, names):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_the_recipes_have_steps():
    assert len(steps()) > 30
    assert sum(len(names) for _, names in steps()) > 30


def first_column(page: str, header: str) -> set[str]:
    """The quoted words of the first column of the table with this header."""
    (table,) = re.findall(rf"^\| {re.escape(header)} \|.*?\n\n", PAGES[page] + "\n", re.MULTILINE | re.DOTALL)
    return {word for row in table.strip().splitlines()[2:] for word in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_fields_of_a_plan_are_those_of_its_json():
    assert first_column("formats-and-plans.md", "field") == plan_json._FIELDS


def test_every_policy_and_scorer_is_described():
    page = PAGES["choosing-a-policy.md"]
    assert set(re.findall(r"\*\*(\w+)\*\*", page.partition("## The policies")[2])) >= set(POLICIES)
    named = {name.partition(":")[0] for name in first_column("choosing-a-policy.md", "`--scorer`")}
    assert named == set(SCORERS)


def test_the_table_of_bits_is_what_formats_take():
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| ([\d.| ]+) \|$", PAGES["formats-and-plans.md"], re.MULTILINE)
    assert [(family, int(bits)) for family, bits, _ in rows] == [
        (family, bits) for family, widths in WIDTHS.items() for bits in widths]
    for family, bits, cells in rows:
        sizes = [block_bytes(kind, int(bits), 32, head_dim, family) for head_dim in (64, 128) for kind in ("K", "V")]
        values = [32 * head_dim for head_dim in (64, 64, 128, 128)]
        assert cells.split(" | ") == [f"{(8 * (codes + meta) + shared) / n:.2f}"
                                      for (codes, meta, shared), n in zip(sizes, values, strict=True)]
