"""Tokens per second against the number of sequences, end to end with scoring, as in the paper's Fig. 6.

    python -m bench.throughput [--model PATH] [--context-tokens 1024] [--tokens 64] [--batch 1,2,4,8,16] [--plot FILE]
    python -m bench.throughput --shape llama-2-7b|mistral-7b    on a GPU: see bench.throughput_shapes

Every sequence is a request of its own: another excerpt of real text and its own plan, nothing shared. All of a batch
are submitted at once to a scheduler and read one after another; each round takes every method at every size in turn.

    end to end   all generated tokens over the time from submission to the last of them: scoring, prefill, decode
    decode       tokens over the time in which all sequences ran
    floor        of decode: the weights once and every sequence's cache, over the highest read rate of the same run;
                 many sequences are bound by arithmetic instead; share = decode over its floor

On a machine with other work, --cpu-time counts the seconds for which this process had a processor: with one thread that
is what a quiet core would take, but for what neighbours do to its caches and memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import cocktail
from bench.prompts import build_text
from bench.report import (
    DEFAULT_MODEL,
    asks_for_gpu,
    describe_run,
    emit,
    print_table,
    progress,
    read_buffer,
    read_rate,
)
from runtime.arena import ArenaLayout
from runtime.model import Model as Engine
from runtime.request import Request
from runtime.scheduler import Scheduler

QUESTION = "What does this text explain?"
METHODS: dict[str, dict[str, Any]] = {"fp16": {"policy": "fp16"}, "budget": {"policy": "budget"}}
READ_ALL_FIRST = 3600.0  # seconds of pause: prompts are read one behind the other, a decode step after each


@dataclass
class Point:
    """One method at one number of sequences; a figure per round. Rates in tokens per second; cache_bytes: of all
    sequences; step_bytes: what a decode step of all of them must read."""

    method: str
    batch: int
    cache_bytes: int
    step_bytes: int
    end_to_end: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def figures(self, rate: float) -> dict[str, Any]:
        """Medians, and what the floor allows."""
        floor, decode = self.batch * rate / self.step_bytes, float(np.median(self.decode))
        return {"method": self.method, "batch": self.batch, "end_to_end": float(np.median(self.end_to_end)),
                "decode": decode, "floor": floor, "share": decode / floor, "cache_bytes": self.cache_bytes}


def main(arguments: Sequence[str] | None = None) -> None:
    if asks_for_gpu(arguments):
        from bench import throughput_shapes  # needs CuPy

        throughput_shapes.main(arguments)
        return
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts all threads' seconds: give --threads 1")
    run, model = describe_run(), cocktail.load(args.model, backend="cpu", threads=args.threads)
    threads = args.threads or model.backend.streaming_threads
    texts = _texts(model, max(args.batch), args.context_tokens)
    points, buffer, rates = _points(model, texts, args), read_buffer(), []
    for i in range(args.rounds):
        for (method, batch), point in points.items():
            progress(f"round {i + 1} of {args.rounds}: {method}, {batch} sequences")
            requests = _requests(model, texts[:batch], method, args)
            seconds, decode = timed(model.engine, requests, time.process_time if args.cpu_time else time.perf_counter)
            point.end_to_end.append(batch * args.tokens / seconds)
            point.decode.append(decode)
            rates += [read_rate(buffer, threads) for _ in range(4)]
    rate = max(rates)
    figures = [point.figures(rate) for point in points.values()]
    print(f"\n{args.context_tokens} context tokens, {args.tokens} generated, {threads} threads, scorer {args.scorer}, "
          f"{args.kv_bits} bits per value; read rate {rate / 1e9:.1f} GB/s")
    print_table(["method", "sequences", "tokens/s end to end", "decode", "floor", "share", "caches, MiB"],
                [[f["method"], f["batch"], f"{f['end_to_end']:.1f}", f"{f['decode']:.1f}", f"{f['floor']:.0f}",
                  f"{f['share']:.0%}", f"{f['cache_bytes'] / 2**20:.1f}"] for f in figures])
    if args.plot:
        plot(figures, args.plot)
    emit({"bench": "throughput", **run, "model": str(args.model), "context_tokens": args.context_tokens,
          "tokens": args.tokens, "rounds": args.rounds, "threads": threads, "cpu_time": args.cpu_time,
          "kv_bits": args.kv_bits, "scorer": args.scorer, "read_rate": rate, "points": figures}, args.json)


def timed(engine: Engine, requests: Sequence[Request], clock: Callable[[], float]) -> tuple[float, float]:
    """All requests at once: seconds from submission to the last id, and tokens per second of decode steps while all of
    them ran (of all steps where they never did)."""
    drawn: list[list[float]] = [[] for _ in requests]
    watched = [replace(request, on_id=_stamp(times, clock)) for request, times in zip(requests, drawn, strict=True)]
    with Scheduler(engine, max_running=len(requests), pause=READ_ALL_FIRST) as scheduler:
        begin = clock()
        tickets = [scheduler.submit(request) for request in watched]
        ids = [list(ticket) for ticket in tickets]
    assert [len(one) for one in ids] == [request.max_new for request in requests]
    start, end = max(times[0] for times in drawn), min(times[-1] for times in drawn)
    if end <= start:
        start, end = min(times[0] for times in drawn), max(times[-1] for times in drawn)
    tokens = sum(start < at <= end for times in drawn for at in times)
    return max(times[-1] for times in drawn) - begin, tokens / (end - start)


def _stamp(times: list[float], clock: Callable[[], float]) -> Callable[[int], bool]:
    def on_id(token: int) -> bool:
        times.append(clock())
        return False

    return on_id


def _points(model: cocktail.Model, texts: Sequence[str], args: argparse.Namespace) -> dict[tuple[str, int], Point]:
    """Sizes by method and number of sequences, from the plans that will be followed."""
    config, weights = model.config, model.engine.weights
    unread = 0 if config.tie_embeddings else np.asarray(weights.embed.data).nbytes  # one row of an untied embedding
    token = 4 * config.n_layers * config.n_kv_heads * config.head_dim  # K and V of one token at FP16
    points = {}
    for batch in args.batch:
        for method in args.methods:
            sizes = [ArenaLayout(request.plan.layout).nbytes
                     for request in _requests(model, texts[:batch], method, args)]
            unfilled = batch * token * args.tokens // 2  # slots of the answer that an average step finds empty
            points[method, batch] = Point(method, batch, sum(sizes), weights.nbytes - unread + sum(sizes) - unfilled)
    return points


def _requests(model: cocktail.Model, texts: Sequence[str], method: str, args: argparse.Namespace) -> list[Request]:
    """None of them ends before its last token: there are no stop ids."""
    options = METHODS[method] | ({"kv_bits": args.kv_bits, "scorer": args.scorer} if method == "budget" else {})
    requests = []
    for text in texts:
        doc = model.read(text, keep=False)
        plan = doc.pending(QUESTION, max_tokens=args.tokens, **options)
        requests.append(Request(doc.prompt(QUESTION), plan, args.tokens))
    return requests


def _texts(model: cocktail.Model, n: int, tokens: int) -> list[str]:
    """n excerpts of `tokens` tokens each, none of which has the beginning of another."""
    whole = model.tokenizer.encode(build_text(n * (tokens + 8), lambda text: len(model.tokenizer.encode(text))))
    size = min(tokens, len(whole) // n)
    return [model.tokenizer.decode(whole[i * len(whole) // n :][:size]) for i in range(n)]


def plot(figures: Sequence[dict[str, Any]], path: str) -> None:
    """figures: method, batch, end_to_end and decode of each point."""
    try:
        from matplotlib.figure import Figure  # no backend, no window
    except ImportError as error:
        raise SystemExit("a plot needs matplotlib: pip install matplotlib, or leave --plot out") from error
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("end_to_end", "decode"), strict=True):
        for method in dict.fromkeys(f["method"] for f in figures):
            points = [f for f in figures if f["method"] == method]
            axes.plot([f["batch"] for f in points], [f[kind] for f in points], "-o", markersize=4, label=method)
        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(max(f["batch"] for f in figures).bit_length())]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("sequences")
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0)
        axes.set_title(kind.replace("_", " "))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(fontsize=8)
    figure.savefig(path)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers of sequences, at least 1 each")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL)
    add("--context-tokens", type=int, default=1024)
    add("--tokens", type=int, default=64, help="generated by every sequence (default: %(default)s)")
    add("--batch", type=_numbers, default=[1, 2, 4, 8, 16], help="numbers of sequences (default: 1,2,4,8,16)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--kv-bits", type=float, default=3.3, help="of budget (default: %(default)s)")
    add("--scorer", default="bm25", help="of budget (default: %(default)s)")
    add("--threads", type=int)
    add("--rounds", type=int, default=1)
    add("--cpu-time", action="store_true", help="processor seconds instead of the wall clock's; needs --threads 1")
    add("--plot", metavar="FILE", help="the table as a PNG")
    add("--json", metavar="FILE", help="the last line in a file too")
    return parser


if __name__ == "__main__":
    main()
