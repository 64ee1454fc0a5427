"""Where encoders run: what was said of the model's backend and threads holds for them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from encoder_files import minilm
from tiny_model import save_tiny_model

import cocktail
from cocktail import run
from cocktail.scorers import load_scorer
from kernels_c import KernelError
from kernels_c.encoder import CpuEncoder
from kernels_c.isa import lib
from runtime.errors import BackendError, ScorerError

SCORERS = [str(minilm()), f"llm-embedder:{minilm()}", f"hybrid:{minilm()}", f"hybrid:llm-embedder:{minilm()}"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(device, threads) of every encoder's kernels that were asked for; none is loaded."""
    found = []

    def record(device: Any, threads: Any) -> None:
        found.append((device, threads))
        raise BackendError("no kernels in this test")

    monkeypatch.setattr("cocktail.scorers.encoder.load_encoder_backend", record)
    return found


@pytest.mark.parametrize(("given", "expected"), [
    ([], (None, None)), (["--backend", "cpu"], ("cpu", None)), (["--backend", "cpu", "--threads", "2"], ("cpu", 2)),
    (["--backend", "cuda"], (None, None)),  # the encoder's own choice: CUDA where it has kernels for it
])
@pytest.mark.parametrize("scorer", SCORERS)
def test_the_command_line_speaks_for_encoders(tmp_path: Path, asked: list[Any], scorer: str, given: list[str],
                                              expected: tuple[Any, Any]) -> None:
    (tmp_path / "doc.txt").write_text("The pan was mended by Odo Farrant.\n")
    assert run.main(["model", "--context", str(tmp_path / "doc.txt"), "--query", "Who?", "--scorer", scorer,
                     *given]) == 2
    assert asked == [expected]


@pytest.mark.parametrize("scorer", SCORERS)
def test_scorers_by_name_run_where_the_model_does(tmp_path: Path, asked: list[Any], scorer: str) -> None:
    model = cocktail.load(save_tiny_model(tmp_path), backend="cpu", threads=1)
    with pytest.raises(ScorerError, match="no kernels in this test"):
        model.read("The pan was mended. " * 40).plan("Who?", scorer=scorer)
    assert asked == [("cpu", None)]  # the pool's threads are the model's


def test_the_library_gets_the_device_and_others_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def load(model: str, device: str | None) -> None:
        found.append(device)
        raise ScorerError("not loaded in this test")

    monkeypatch.setattr("cocktail.scorers.library._load", load)
    with pytest.raises(ScorerError, match="not loaded"):
        load_scorer(f"library:{minilm()}", device="cpu", threads=2)
    assert found == ["cpu"]
    assert load_scorer("bm25", device="cpu", threads=2).name == "bm25"


def test_threads_are_those_of_the_pool() -> None:
    before = lib.pool_threads()
    try:
        CpuEncoder(threads=3)
        assert lib.pool_threads() == 3
        CpuEncoder()
        assert lib.pool_threads() == 3
        with pytest.raises(KernelError, match="threads must be at least 1, but is 0"):
            CpuEncoder(threads=0)
    finally:
        lib.pool_set_threads(before, before)
