"""The import direction: cocktail -> runtime -> kernels, converters -> three of runtime's modules, nobody else.

And what must stay light: importing the packages, and answering --help.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cocktail", "runtime", "kernels_c", "kernels_cu", "converters", "tests", "bench")
ALLOWED = {
    "cocktail": {"cocktail", "runtime"},
    "runtime": {"runtime", "kernels_c", "kernels_cu"},
    "kernels_c": {"kernels_c"},
    "kernels_cu": {"kernels_cu"},
    "converters": {"converters", "runtime.checkpoint", "runtime.config", "runtime.errors"},
}
LAZY_ONLY = {"runtime": {"kernels_c", "kernels_cu"}}  # a backend is imported when it is chosen
TORCH = {"torch", "transformers"}
# sentence-transformers brings both along; inside functions, and only where the user asked for it by name.
TORCH_ON_DEMAND = {"cocktail/scorers/library.py"}
SOURCES = sorted(path.relative_to(ROOT) for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is), for every import statement and import_module("...")."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    package = list(path.with_suffix("").parts[:-1])
    lazy = {id(inner) for outer in ast.walk(tree) if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
            for inner in ast.walk(outer)}
    lazy |= {id(inner) for outer in ast.walk(tree)
             if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.dump(outer.test)
             for statement in outer.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        eager = id(node) not in lazy
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from runtime import errors` imports runtime.errors; `from runtime.errors import X` does not.
                inner = f"{module}.{alias.name}"
                yield (inner if (ROOT / (inner.replace(".", "/") + ".py")).exists() else module), eager
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield argument.value, eager


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_import_direction(path):
    package = path.parts[0]
    for module, eager in imports(path):
        if module.split(".")[0] in PACKAGES:
            assert within(module, ALLOWED[package]), f"{path} imports {module}"
            if eager:
                assert not within(module, LAZY_ONLY.get(package, set())), f"{path} imports {module} when it is imported"
        if module.split(".")[0] in TORCH:
            assert not eager, f"{path} imports {module} when it is imported"
            assert path.as_posix() in TORCH_ON_DEMAND, f"{path} imports {module}"


def test_the_walk_sees_every_kind_of_import(tmp_path, monkeypatch):
    """So that the test above cannot pass by seeing nothing."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/errors.py").write_text("")
    path = Path("runtime/example.py")
    (tmp_path / path).write_text(
        "import a.b\nfrom c import d\nfrom . import errors\nfrom .errors import X\nfrom runtime import errors\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import e\n"
        "def f():\n    import g\n    importlib.import_module('h.i')\n")
    assert sorted(imports(path)) == sorted([
        ("a.b", True), ("c", True), ("runtime.errors", True), ("runtime.errors", True), ("runtime.errors", True),
        ("typing", True), ("e", False), ("g", False), ("h.i", False)])


def loaded(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after the statement."""
    script = f"{statement}\nimport sys; print(*sorted(sys.modules), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("statement", [
    "import cocktail, runtime",
    "from cocktail import *",  # every public name, and with them the whole engine
    "import cocktail, sys; sys.path.insert(0, 'tests'); from encoder_files import minilm; "
    "from cocktail.scorers import load_scorer; "
    "load_scorer(str(minilm()), device='cpu', threads=1).score(['a', 'b'], 'a')",  # threads: none are measured
])
def test_importing_loads_neither_torch_nor_transformers(statement):
    modules = loaded(statement)
    assert "cocktail" in modules
    assert not modules & {"torch", "transformers", "sentence_transformers", "cupy"}


def test_importing_cocktail_is_free():
    assert not loaded("import cocktail, runtime, cocktail.run") & {"numpy", "rich", "tokenizers", "cffi"}


def test_help_answers_at_once():
    """Under 0.4 s; the best of several, since others may use this machine."""
    command = [sys.executable, "-m", "cocktail.run", "--help"]

    def seconds() -> float:
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        assert b"--context" in done.stdout
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.4
