"""What every command does alike: options of convention, defaults in --help, environment, log, completion."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cocktail import answer, calibrate, doctor, run, tune
from cocktail.cli import options
from cocktail.cli.entry import run_command
from cocktail.document import Document
from cocktail.policies import DEFAULT_POLICY, POLICIES, baselines, budget, thresholds, uniform
from cocktail.scorers import SCORERS
from runtime.sampler import SamplingParams

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {"run": options.parser, "tune": tune.parser, "calibrate": calibrate.parser,
            "doctor": doctor.parser}


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def shown_defaults(parser: argparse.ArgumentParser) -> dict[str, str | None]:
    """Option -> the default that --help shows, None where it shows none."""
    formatter: Any = parser._get_formatter()
    found = {action: re.search(r"\(default: (.+)\)$", formatter._get_help_string(action)) for action in actions(parser)}
    return {name: match and match[1] for action, match in found.items() for name in action.option_strings}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_options_of_convention(name):
    assert {"--quiet", "--log-level", "--version", "--help", "-h"} <= shown_defaults(COMMANDS[name]()).keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_default_of_every_option_that_takes_a_value(name):
    parser = COMMANDS[name]()
    shown = shown_defaults(parser)
    missing = [action.option_strings for action in actions(parser) if action.nargs != 0 and not action.required
               and action.default is not argparse.SUPPRESS and shown[action.option_strings[0]] is None]
    assert missing == []
    for action in actions(parser):
        if isinstance(action.default, (int, float)) and action.nargs != 0:
            assert shown[action.option_strings[0]] == str(action.default), action.option_strings


def documented_defaults() -> dict[str, str | None]:
    """Option -> its default in README's table. A row of several options has one default for all, or one each."""
    (table,) = re.findall(r"^\| option .*?\n\n", README, re.MULTILINE | re.DOTALL)
    found: dict[str, str | None] = {}
    for row in table.strip().splitlines()[2:]:
        cell, _, default = (part.strip() for part in row.strip("|").split("|"))
        names = re.findall(r"--[a-z-]+", cell)
        each = default.replace("`", "").split(", ")
        if len(each) != len(names):
            each = [default.replace("`", "")] * len(names)
        found |= dict(zip(names, (value or None for value in each), strict=True))
    return found


def test_the_readmes_defaults_are_those_of_help():
    shown = {name: None if value == "none" else value for name, value in shown_defaults(options.parser()).items()
             if name.startswith("--")}
    assert documented_defaults() == shown


def signature_default(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize(("option", "default"), [
    ("--policy", DEFAULT_POLICY), ("--kv-bits", budget.DEFAULT_KV_BITS),
    ("--scorer", signature_default(Document.ask, "scorer")),
    ("--alpha", thresholds.ALPHA), ("--beta", thresholds.BETA),
    ("--bits", signature_default(baselines.KiviPolicy, "bits")),
    ("--bits", signature_default(baselines.KvquantPolicy, "bits")),
    ("--residual", signature_default(baselines.KiviPolicy, "residual")),
    ("--formats", signature_default(uniform.UniformPolicy, "formats")),
    ("--formats", signature_default(thresholds.CocktailPolicy, "formats")),
    ("--chunk", signature_default(Document, "chunk")), ("--max-tokens", answer.DEFAULT_MAX_TOKENS),
    ("--temperature", int(SamplingParams.temperature)), ("--seed", SamplingParams.seed),
])
def test_the_shown_default_is_the_apis(option, default):
    assert shown_defaults(options.parser())[option] == str(default)


@pytest.mark.parametrize(("program", "usage"), [
    ("/usr/bin/cocktail", "usage: cocktail MODEL"), ("cocktail/run.py", "usage: python -m cocktail.run MODEL")])
def test_help_shows_the_command_as_it_was_called(monkeypatch, program, usage):
    monkeypatch.setattr(sys, "argv", [program])
    assert options.parser().format_help().startswith(usage)


def test_the_names_in_help_are_those_that_exist():
    assert sorted(options.POLICIES) == sorted(POLICIES)
    assert sorted(options.SCORERS) == sorted(SCORERS)


def test_the_environment_table_is_complete():
    folders = ("cocktail", "runtime", "kernels_c", "kernels_cu", "converters", "bench", "tests", "docs", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources
            for name in re.findall(r"""environ(?:\.get\(|\[)["'](\w+)["']""", path.read_text(encoding="utf-8"))}
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", "".join(re.findall(r"^\| `[A-Z].*", DOCS, re.MULTILINE))))
    assert documented >= {"COCKTAIL_ISA", "COCKTAIL_LOG_LEVEL"}
    assert documented == {name for name in read if not name.startswith("PYTEST")}


def test_every_exit_code_is_documented():
    from cocktail.cli import entry

    table = set(map(int, re.findall(r"^\| (\d+) \|", DOCS, re.MULTILINE)))
    assert table == {0, entry.FAILED, entry.ERROR, entry.INTERRUPTED, entry.BROKEN_PIPE}


@pytest.fixture
def command() -> argparse.ArgumentParser:
    return options.parser()


def noisy(_: argparse.Namespace) -> None:
    logging.getLogger("cocktail.example").info("two\nlines")
    logging.getLogger("cocktail.runtime.example").warning("odd")
    logging.getLogger("elsewhere").warning("not ours")


@pytest.mark.parametrize(("level", "err"), [
    ("info", "info: cocktail.example: two lines\nwarning: odd\n"), ("warning", "warning: odd\n"), ("error", "")])
def test_the_log_goes_to_stderr_from_its_level_on(command, capsys, level, err):
    assert run_command(command, noisy, ["model", "--log-level", level]) == 0
    assert run_command(command, noisy, ["model", "--log-level", level]) == 0  # nothing twice the second time
    assert capsys.readouterr() == ("", err * 2)


def test_the_level_may_come_from_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("COCKTAIL_LOG_LEVEL", "ERROR")
    assert run_command(options.parser(), noisy, ["model"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("COCKTAIL_LOG_LEVEL", "loud")
    with pytest.raises(SystemExit) as stop:
        run_command(options.parser(), noisy, ["model"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --log-level: 'loud'; expected one of debug, info, ")


def test_memory_that_runs_out_anywhere_is_one_line(command, capsys):
    def hungry(_: argparse.Namespace) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    assert run_command(command, hungry, ["model"]) == 2
    assert capsys.readouterr().err == "error: out of memory: Unable to allocate 9 GiB\n"


@pytest.mark.parametrize(("error", "line"), [
    (PermissionError(13, "Permission denied", "secret.txt"), "error: secret.txt: Permission denied\n"),
    (OSError(28, "No space left on device"), "error: No space left on device\n")])
def test_an_error_of_the_system_is_one_line(command, capsys, error, line):
    def refused(_: argparse.Namespace) -> None:
        raise error

    assert run_command(command, refused, ["model"]) == 2
    assert capsys.readouterr().err == line


def complete(script: str, *words: str) -> set[str]:
    """What bash offers for the last word, with the script that the command prints."""
    line = " ".join(f"'{word}'" for word in words)
    probe = (f"{script}\nCOMP_WORDS=(cocktail {line}); COMP_CWORD={len(words)}; _shtab_cocktail cocktail; "
             'printf "%s\\n" "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True, timeout=20)
    return set(done.stdout.split())


def test_bash_completes_options_and_their_values():
    pytest.importorskip("shtab")
    done = subprocess.run([sys.executable, "-m", "cocktail.run", "--print-completion", "bash"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert complete(done.stdout, "--kv") == {"--kv-bits", "--kv-budget"}
    assert complete(done.stdout, "model", "--policy", "k") == {"kivi", "kvtuner", "kvquant"}
    assert complete(done.stdout, "model", "--backend", "c") == {"cpu", "cuda"}


def test_completion_without_shtab_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        run.main(["--print-completion", "zsh"])
    assert stop.value.code == 2
    assert "pip install 'cocktail-kv[completion]'" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback_and_exits_with_1():
    script = ("import sys; from cocktail.cli import entry, options\n"
              "sys.exit(entry.run_command(options.parser(), lambda _: 1 // 0, ['model']))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
