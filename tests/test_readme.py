"""The README tells the truth: its example runs, its files, commands and options exist, its figures are filled in."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from tiny_model import save_tiny_model

from cocktail.run import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def test_the_examples_run(tmp_path):
    """One after another in a process of their own, with a tiny random model in the demo model's place."""
    examples = blocks("python")
    assert examples and all(len(example.splitlines()) <= 12 for example in examples)
    save_tiny_model(tmp_path / ".models", "smollm2-135m.safetensors")
    (tmp_path / "examples").mkdir()
    text = (ROOT / "examples/handbook.txt").read_text(encoding="utf-8")
    (tmp_path / "examples/handbook.txt").write_text(text[:6000], encoding="utf-8")
    script = "\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r})", *examples])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "'K4V3': " in done.stdout and "SchedulerStats(" in done.stdout


def test_every_figure_is_filled_in():
    assert "TODO" not in README


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (demo|test|check|bench|[a-z]+(?=`))", README)) <= targets


def test_the_file_tree_is_the_file_tree():
    """Every package and module has its line; folders without modules of their own listed are one line."""
    tree = next(block for block in blocks("") if block.startswith("cocktail/"))
    listed, folders = set(), []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        del folders[len(indent) // 2 :]
        listed.add("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    assert not [name for name in listed if not (ROOT / name).exists()]
    detailed = {Path(name).parent for name in listed if name.endswith(".py")}
    modules = {path.relative_to(ROOT).as_posix() for folder in detailed for path in (ROOT / folder).glob("*.py")
               if path.name not in ("__init__.py", "__main__.py")}
    assert modules - listed == set()


def options() -> list[argparse.Action]:
    return [action for action in parser()._actions if action.option_strings]


def test_the_options_table_is_complete():
    (table,) = re.findall(r"^\| option .*?\n\n", README, re.MULTILINE | re.DOTALL)
    documented = set(re.findall(r"--[a-z][a-z-]*", re.sub(r"^(\|[^|]*\|).*", r"\1", table, flags=re.MULTILINE)))
    existing = {name for action in options() for name in action.option_strings if name.startswith("--")}
    assert documented == existing
