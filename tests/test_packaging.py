"""What a wheel carries, without building one: `make wheel` does that and tries it in an empty environment."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGES = ("cocktail", "runtime", "kernels_c", "kernels_cu", "converters")
BUILT_FROM = ("kernels_c/src",)  # compiled into the wheel, not carried in it
FROM = {"Stemmer": "pystemmer", "sklearn": "scikit-learn", "sentence_transformers": "sentence-transformers",
        "markupsafe": "jinja2", "huggingface_hub": "tokenizers"}  # which distribution brings a module along
WITH_CUPY = ("cupy", "cupy_backends")  # of either extra


def tracked(folder: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [Path(name) for name in listed.stdout.split()]


def test_every_folder_with_modules_is_a_package_in_the_wheel():
    found = find_packages(str(ROOT), include=SETUPTOOLS["packages"]["find"]["include"])
    folders = {path.parent.as_posix().replace("/", ".") for package in PACKAGES for path in tracked(package)
               if path.suffix == ".py"}
    assert set(found) >= folders


def test_every_file_that_is_no_module_is_package_data():
    for package in PACKAGES:
        for path in tracked(package):
            if path.suffix == ".py" or path.parent.as_posix().startswith(BUILT_FROM):
                continue
            patterns = SETUPTOOLS["package-data"].get(path.parent.as_posix().replace("/", "."), [])
            assert any(fnmatch(path.name, pattern) for pattern in patterns), path


@pytest.mark.parametrize("package", ["cocktail", "runtime"])
def test_the_typed_packages_say_so(package):
    assert (ROOT / package / "py.typed").exists()


def test_every_library_that_is_imported_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for name in extras if name != "test" for line in extras[name])]
    declared = {re.split(r"[\[>=<]", line)[0].lower() for line in lines}
    for package in PACKAGES:
        for path in tracked(package):
            for name in imported(ROOT / path) if path.suffix == ".py" else ():
                top = name.split(".")[0]
                if top in PACKAGES or top in sys.stdlib_module_names or top in WITH_CUPY:
                    continue
                assert FROM.get(top, top).lower() in declared, f"{path} imports {name}"


def imported(path: Path) -> list[str]:
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return ([alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level])
