"""What the command line shows besides the answer: progress bars and the summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocktail import Answer, Stats, Verification
    from cocktail.promote import Promotion


def table(answer: Answer, verification: Verification | None = None, promotion: Promotion | None = None) -> str:
    """A few aligned lines: tokens, times, chunks per width, bytes, kernels, what verification found."""
    s = answer.stats
    context = f", {s.context_tokens} of them context" if s.context_tokens else ""
    context += f", {s.reused_tokens} read before" if s.reused_tokens else ""
    rate = f" ({1 / s.tpot_s:.1f} tokens/s)" if s.tpot_s else ""
    rows = [
        ("tokens", f"{s.prompt_tokens} in the prompt{context}; {s.generated_tokens} generated "
                   f"(ended by {answer.finish_reason})"),
        ("time", f"TTFT {seconds(s.ttft_s)} ({_scoring(s)}prefill {seconds(s.prefill_s)}, "
                 f"pack {seconds(s.pack_s)}), TPOT {seconds(s.tpot_s)}{rate}"),
    ]
    if total := sum(s.chunks.values()):
        rows += [("chunks" if i == 0 else "", f"{tier:6} {count:6} {count / total:6.1%}")
                 for i, (tier, count) in enumerate(s.chunks.items())]
        rows.append(("choice", f"policy {s.policy}, scorer {s.scorer}"))
        rows.append(("context", f"{s.context_bits_per_value:.2f} bits per value, metadata included (FP16: 16)"))
    if answer.plan.layout.formats == "kvquant":
        rows.append(("outliers", f"{s.outliers_kept:,} kept exactly, {s.outliers_without_room:,} found no room"))
    rows += [
        ("cache", f"{size(s.cache_bytes)}, {s.cache_bytes / s.cache_fp16_bytes:.1%} of "
                  f"{size(s.cache_fp16_bytes)} at FP16"),
        ("memory", f"weights {size(s.weights_bytes)}, {_kept(s)}process peak {size(s.peak_memory_bytes)}"),
        ("backend", f"{s.backend}: {_kernels(s.kernels)}"),
    ]
    if verification is not None:
        rows.append(("verified", verified(verification)))
    if promotion is not None:
        rows.append(("promoted", _promoted(promotion)))
    rows += [("note", note) for note in answer.plan.notes]
    return "\n".join(f"{name:8} {text}" for name, text in rows)


def line(answer: Answer) -> str:
    """The same in one line, for a chat."""
    s = answer.stats
    cache = f"; {s.context_bits_per_value:.2f} bits per value" if sum(s.chunks.values()) else ""
    rate = f", then {1 / s.tpot_s:.1f} tokens/s" if s.tpot_s else ""
    return f"[{s.prompt_tokens} + {s.generated_tokens} tokens; {seconds(s.ttft_s)} to the first{rate}{cache}]"


def json_line(answer: Answer, verification: Verification | None = None, promotion: Promotion | None = None) -> str:
    """Every statistic, the finish reason and what verification found as one line of JSON."""
    found = {name: value.to_dict() for name, value in (("verification", verification), ("promotion", promotion))
             if value is not None}
    return json.dumps(answer.stats.to_dict() | {"finish_reason": answer.finish_reason} | found, allow_nan=False)


class ProgressBar:
    """The `progress` callback of Document.ask and Model.generate, as a bar on a terminal's stderr.

    Not shown, it does nothing and imports nothing.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        # The callback comes once per tile and layer: drawing is left to rich's own refresh.
        self._bar.update(self._tasks[stage], completed=done, total=total)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._shown = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class ProgressBars:
    """How far several requests are: a bar for each of them, on a terminal's stderr.

    Not shown, it does nothing and imports nothing.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._bars: Any = None
        self._tasks: dict[int, Any] = {}

    def show(self, rows: Mapping[int, tuple[str, int, int]]) -> None:
        """rows: by request what is done for it, how much of that is done, and how much there is. Other bars go."""
        if not self.shown:
            return
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
                                  console=Console(stderr=True), transient=True)
        for request in self._tasks.keys() - rows.keys():
            self._bars.remove_task(self._tasks.pop(request))
        for request, (text, done, total) in rows.items():
            if request not in self._tasks:
                self._tasks[request] = self._bars.add_task(text)
            self._bars.update(self._tasks[request], description=text, completed=done, total=total)
        self._bars.start()

    def hide(self) -> None:
        """Until they are shown again. While they are, rich takes what is written to stdout to their terminal, too."""
        if self._bars is not None:
            self._bars.stop()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.hide()


class StageProgress:
    """How far a command's stages are: a bar on a terminal, else a line on stderr now and then."""

    def __init__(self, shown: bool = True) -> None:
        self._shown, self._terminal = shown, sys.stderr.isatty()
        self._bar = ProgressBar(shown=shown and self._terminal)

    def of(self, stage: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if self._terminal:
                self._bar(stage, done, total)
            elif self._shown and done % max(1, total // 10) == 0:
                print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)

        return report

    def close(self) -> None:
        self._bar.close()


def _kept(s: Stats) -> str:
    return f"document kept {size(s.master_bytes)}, " if s.master_bytes else ""


def verified(v: Verification) -> str:
    """What was found, in one line."""
    if not v.kl:
        return "nothing: the only token comes from the exact prefill"
    return (f"{v.agreement:.1%} of {len(v.kl)} tokens have the FP16 cache's top token; KL to it {v.mean_kl:.4f} on "
            f"average, {v.worst_kl:.4f} at token {v.worst_token} ({seconds(v.seconds)})")


def _promoted(p: Promotion) -> str:
    if len(p.steps) == 1:
        return "nothing: the bound held with the budget asked for"
    first, last = p.steps[0], p.steps[-1]
    kl = ", ".join("none" if step.kl is None else f"{step.kl:.4f}" for step in p.steps)
    return (f"{first.bits:.2f} to {last.bits:.2f} bits per value in {len(p.steps)} answers (mean KL {kl}): cache "
            f"{size(first.cache_bytes)} to {size(last.cache_bytes)}, {seconds(p.seconds)} in all")


def _scoring(s: Stats) -> str:
    hidden = s.score_s - s.score_wait_s
    return f"score {seconds(s.score_s)}{f', {seconds(hidden)} of it during prefill' if hidden > 1e-4 else ''}, "


def _kernels(names: Mapping[str, str]) -> str:
    """The instruction set where every kernel is named after its operation and that, as on the CPU; else all names."""
    suffixes = {name.removeprefix(f"{operation}_") for operation, name in names.items()}
    return f"{suffixes.pop()} kernels" if len(suffixes) == 1 else ", ".join(dict.fromkeys(names.values()))


def seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def size(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.2f} GiB"
