"""A stand-in for the API that the command line calls: Model, Document and AnswerStream with made-up answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from runtime.errors import BackendError, CheckpointError
from runtime.plan import DocumentShape, Plan, Tier

STATS = {
    "prompt_tokens": 140, "context_tokens": 100, "reused_tokens": 0, "generated_tokens": 3, "ttft_s": 0.5,
    "tpot_s": 0.05, "score_s": 0.01, "score_wait_s": 0.004, "prefill_s": 0.4, "pack_s": 0.02,
    "chunks": {"FP16": 1, "K3V2": 2}, "context_bits_per_value": 7.5,
    "cache_bytes": 1 << 20, "cache_fp16_bytes": 4 << 20, "outliers_kept": 0, "outliers_without_room": 0,
    "master_bytes": 0, "weights_bytes": 3 << 30, "peak_memory_bytes": 5 << 20,
    "backend": "cpu", "kernels": {"decode": "decode_avx2"}, "policy": "budget", "scorer": "bm25",
}


def make_plan() -> Plan:
    shape = DocumentShape(n_layers=2, n_kv_heads=1, head_dim=8, chunk=32, n_chunks=3, prefix=2, remainder=4, suffix=5,
                          max_new=8, window=None)
    return Plan(shape.layout([Tier(3, 2), Tier(16, 16)], [2, 1]), ((1, 0, 0),) * 2, policy="budget", scorer="bm25")


@dataclass
class FakeStream:
    """Pieces that may be exceptions: raised in place of a piece."""

    pieces: list[str | BaseException]
    text: str = ""
    reason: str = "length"
    plan: Plan | None = field(default_factory=make_plan)

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            self.text += piece
            yield piece

    def close(self) -> None:
        self.reason = "interrupted"

    @property
    def answer(self) -> Any:
        stats = SimpleNamespace(**STATS, to_dict=lambda: dict(STATS))
        return SimpleNamespace(text=self.text, ids=(1, 2, 3), finish_reason=self.reason, plan=make_plan(),
                               stats=stats)


@dataclass
class FakeModel:
    """Stands in for Model and Document and keeps the calls."""

    pieces: list[Any] = field(default_factory=lambda: ["Odo ", "Farrant"])
    backend: Any = field(default_factory=lambda: SimpleNamespace(name="cpu"))
    context_ids: tuple[int, ...] = tuple(range(100))
    n_chunks: int = 3
    chunk: int = 32
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    template: str = "a chat template"
    chunk, n_chunks = 32, 3  # of the document
    config: Any = field(default_factory=lambda: SimpleNamespace(
        generation={"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 9},
        rope=SimpleNamespace(kind="default")))
    context: str = ""  # of the document

    @property
    def model(self) -> FakeModel:
        """Of the document."""
        return self

    def serve(self, **options: Any) -> NoReturn:
        raise BackendError("how much memory is free is not known")

    def load(self, *args: Any, **options: Any) -> FakeModel:
        self.calls.append(("load", args, options))
        if not Path(args[0]).exists():
            raise CheckpointError(f"{args[0]} does not exist")
        return self

    def read(self, *args: Any, **options: Any) -> FakeModel:
        self.calls.append(("read", args, options))
        self.context = args[0]
        return self

    def shape(self, query: str) -> None:
        """Any document fits."""

    def save(self, *args: Any) -> None:
        self.calls.append(("save", args, {}))

    def after(self, turns: list[tuple[str, str]]) -> FakeModel:
        self.calls.append(("after", (list(turns),), {}))
        return self

    def close(self) -> None:
        self.calls.append(("close", (), {}))

    def ask(self, *args: Any, **options: Any) -> FakeStream:
        self.calls.append(("ask", args, options))
        options["progress"]("prefill", 1, 2)
        return FakeStream(list(self.pieces))

    def generate(self, prompt: Any, **options: Any) -> FakeStream:
        self.calls.append(("generate", (prompt,), options))
        return FakeStream(list(self.pieces))

    def options(self, name: str) -> dict[str, Any]:
        return next(options for call, _, options in self.calls if call == name)
