"""Every example runs as its first lines say: in a process of its own, on a tiny random model, or where
COCKTAIL_DEMO_MODEL names it on the demo model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny_model import save_tiny_model

ROOT = Path(__file__).parents[1]
QUESTION = "What is the access code of the boathouse?"
DEMO = os.environ.get("COCKTAIL_DEMO_MODEL")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return DEMO or str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The chapter of the handbook that has the answer."""
    text = (ROOT / "examples/handbook.txt").read_text(encoding="utf-8")
    at = text.index("7294")
    path = tmp_path_factory.mktemp("document") / "chapter.txt"
    path.write_text(text[at - 1500 : at + 500], encoding="utf-8")
    return str(path)


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "examples" / name), *arguments], capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=300)


def test_embed(model, document):
    done = run("embed.py", model, document, QUESTION, "What is the name of the ferry?")
    assert done.returncode == 0, done.stderr
    costs = re.findall(r"^  ([\d.]+) s to the first of \d+ tokens; cache ([\d.]+) MiB, ([\d.]+) bits", done.stdout,
                       re.MULTILINE)
    assert len(costs) == 2
    assert all(float(bits) <= 3.5 for _, _, bits in costs)
    assert not DEMO or "7294" in done.stdout


def test_compare(model, document):
    done = run("compare.py", model, document, QUESTION, "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(.*): ([\d.]+) bits per value, ([\d.]+) MiB, KL ([\d.]+)$", done.stdout, re.MULTILINE)
    (fp16, bits, size, kl), *quantized = rows
    assert (fp16, float(kl)) == ("fp16", 0.0)
    assert 16 <= float(bits) < 16.1  # positions are counted too
    assert [name for name, *_ in quantized] == ["budget kv_bits=3.3", "uniform tier=K3V2"]
    assert all(float(b) < 4 and float(s) < float(size) and 0 < float(k) < 20 for _, b, s, k in quantized)


@contextmanager
def serve(name: str, *arguments: str) -> Iterator[str]:
    """Runs the example until the block ends; its address. Ctrl-C has to end it well."""
    process = subprocess.Popen([sys.executable, str(ROOT / "examples" / name), *arguments, "--port", "0"], text=True,
                               stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        shown = ""
        while not (running := re.search(r"running on (http://\S+)", shown)):
            line = process.stderr.readline()
            assert line, f"{name} ended with {process.wait(60)}: {shown}"
            shown += line
        yield running[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def post(address: str, question: str) -> str:
    with urllib.request.urlopen(address, question.encode(), timeout=120) as response:
        return response.read().decode()


def numbers(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/stats", timeout=60) as response:
        return json.load(response)


def test_web(model, document):
    questions = [QUESTION, "What is the name of the ferry?"]
    with serve("web.py", model, document) as address, ThreadPoolExecutor() as users:
        together = list(users.map(partial(post, f"{address}/ask"), questions))
        assert together == [post(f"{address}/ask", question) for question in questions]  # whoever else is there
        assert not DEMO or "7294" in together[0]

        gone = socket.create_connection((urlsplit(address).hostname, urlsplit(address).port))
        gone.sendall(b"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nWho?")
        assert gone.recv(12) == b"HTTP/1.1 200"
        gone.close()
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(f"{address}/ask", "  ")
        end = time.monotonic() + 60
        while (stats := numbers(address))["completed"] + stats["cancelled"] < 5 and time.monotonic() < end:
            time.sleep(0.05)
        assert stats["completed"] >= 4
        assert {stats[name] for name in ("planning", "waiting", "reading", "running", "failed", "bytes")} == {0}


@pytest.mark.parametrize(("name", "questions"), [("embed.py", [QUESTION]), ("compare.py", [QUESTION]), ("web.py", [])])
def test_errors_are_one_line(name, questions, document):
    done = run(name, "nowhere.safetensors", document, *questions)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*nowhere.*\n", done.stderr)


def test_every_example_has_a_test_and_a_line_in_the_readme():
    programs = {path.name for path in (ROOT / "examples").glob("*.py")}
    tests = Path(__file__).read_text(encoding="utf-8")
    readme = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    for name in programs:
        assert f'run("{name}"' in tests or f'serve("{name}"' in tests, f"no test runs {name}"
        assert f"`{name}`" in readme, f"examples/README.md does not name {name}"
