"""Speed of prefill and decode against the memory's read rate and llama.cpp's. `python -m bench.decode --backend cpu`

Both sides run the same weights (llama.cpp as an F16 GGUF written here from our checkpoint) on the same token ids, in
short turns within one process: the read rate, our decode with the FP16 cache and with the mix of --kv-bits, llama.cpp's
with its F16 cache, once with and once without its flash attention (the better of the two counts). Prefill is timed once
a round. Figures are medians over all steps of all rounds, for each thread count.

    floor   bytes that a step must read (weights once, cache once) over the read rate; share = floor / time. Where
            other work takes turns at the memory, medians of both can put a share above 1: look at the highest rate too
    ratio   our tokens per second over llama.cpp's

On a GPU: `--backend cuda` for a checkpoint, `--shape llama-2-7b` for random weights of known sizes (bench.shapes).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import cocktail
from bench.prompts import build_text
from bench.report import (
    DEFAULT_MODEL,
    describe_run,
    emit,
    on_gpu,
    print_table,
    progress,
    read_buffer,
    read_rate,
    verdict,
)
from runtime.engine import Reading, read
from runtime.plan import Plan
from runtime.sampler import SamplingParams

GOALS = {  # figure -> at least
    "share_0": 0.91, "share_mix": 0.65, "ratio_0": 1.0, "ratio_mix": 3.0, "ratio_prefill": 1.0,
}
REPEATS = 3  # turns at each depth in each round
READ_PASSES = 4  # of the read rate in each turn: on a busy machine single ones vary by half
QUESTION = "Explain what this text is about."


@dataclass(frozen=True)
class Job:
    """One prompt and plan. name: "0", "fp16" or "mix"."""

    name: str
    prompt: tuple[int, ...]
    plan: Plan


@dataclass
class Series:
    """All repetitions of one figure. seconds: per decode step; prefill: seconds per prompt token."""

    step_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    ids: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """Decoded tokens per second."""
        return 1 / float(np.median(self.seconds))

    @property
    def prefill_rate(self) -> float:
        return 1 / float(np.median(self.prefill))


def main(arguments: Sequence[str] | None = None) -> None:
    if on_gpu(arguments, ("TPOT",), "decode"):
        return
    args = _parser().parse_args(arguments)
    run = describe_run()
    counts = args.threads or sorted({1, os.cpu_count() or 1})
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "f16.gguf"
        if args.peer:
            from bench.peer_llama import write_f16_gguf

            write_f16_gguf(args.model, gguf)
        results = [_measure(args, threads, gguf) for threads in counts]
    records = [_figures(threads, *result) for threads, result in zip(counts, results, strict=True)]
    best = _best(records)
    for record in [*records, best]:
        _print(record)
    emit({"bench": "decode", **run, "model": str(args.model), "depth": args.depth, "kv_bits": args.kv_bits,
          "tokens": args.tokens, "rounds": args.rounds, "runs": records, "best": best,
          "same_greedy_ids": _agreement(results)}, args.json)


def our_decode(model: cocktail.Model, job: Job, tokens: int, series: Series, reading: Reading | None) -> Reading:
    """Times `tokens` - 1 decode steps into series; reads the prompt first, timed too, unless a reading is given."""
    if reading is None:
        reading = read(model.engine, job.prompt, [job.plan])
        series.prefill.append(reading.timing.prefill / len(job.prompt))
    answer = reading.generate(SamplingParams(temperature=0.0), tokens, ())
    ids = [next(answer)]  # the prefill's; every later one is a step
    for _ in range(tokens - 1):
        begin = time.perf_counter()
        ids.append(next(answer))
        series.seconds.append(time.perf_counter() - begin)
    series.ids = tuple(ids)
    series.step_bytes = _step_bytes(model, reading, tokens)
    return reading


def _step_bytes(model: cocktail.Model, reading: Reading, tokens: int) -> int:
    """Bytes an average step must read: every weight but an untied embedding (one row of it), and the filled arena."""
    weights, config = model.engine.weights, model.config
    unread = 0 if config.tie_embeddings else np.asarray(weights.embed.data).nbytes
    token = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim  # K and V of one token at FP16
    return weights.nbytes - unread + reading.caches[0].sizes.nbytes - token * tokens // 2


def _measure(args: argparse.Namespace, threads: int, gguf: Path) -> tuple[dict[str, Series], list[float]]:
    """Every series at one thread count: ours by job name, llama.cpp's as "llama 0", "llama flash 0", ..."""
    model = cocktail.load(args.model, backend=args.backend, threads=threads)
    jobs = _jobs(model, args.depth, args.kv_bits, args.tokens)
    series = {job.name: Series() for job in jobs}
    readings: dict[str, Reading] = {}
    buffer, rates = read_buffer(), []
    shallow, *deep = jobs
    with ExitStack() as stack:
        peers = _peers(args, threads, gguf, max(len(job.prompt) for job in jobs), stack)
        for i in range(args.rounds):
            for repeat in range(2 * REPEATS):
                rates += [read_rate(buffer, threads) for _ in range(READ_PASSES)]
                for job in [shallow] if repeat < REPEATS else deep:
                    # Prefill is timed with the mix, which also packs, in every round; other readings are kept.
                    kept = None if job.name == "mix" and repeat == REPEATS else readings.get(job.name)
                    readings[job.name] = our_decode(model, job, args.tokens, series[job.name], kept)
                for name, peer in peers.items():
                    job = shallow if repeat < REPEATS else deep[0]
                    _peer_decode(peer, job, args.tokens, series.setdefault(f"{name} {job.name}", Series()),
                                 kept=repeat > REPEATS)
            progress(f"{threads} threads, round {i + 1}/{args.rounds}: read {np.median(rates) / 1e9:.1f} GB/s; "
                     + "  ".join(f"{name} {s.rate:.1f}" for name, s in series.items()))
    return series, rates


def _peers(args: argparse.Namespace, threads: int, gguf: Path, longest: int, stack: ExitStack) -> dict[str, Any]:
    if not args.peer:
        return {}
    from bench.peer_llama import Peer

    return {name: stack.enter_context(Peer(gguf, threads=threads, n_ctx=longest + args.tokens, flash=flash))
            for name, flash in (("llama", False), ("llama flash", True))}


def _peer_decode(peer: Any, job: Job, tokens: int, series: Series, kept: bool) -> None:
    """kept: the prompt is in llama.cpp's cache already, from the call before."""
    timing = peer.greedy(job.prompt, tokens, depth=len(job.prompt) - 1 if kept else 0)
    series.seconds += timing.step_s
    series.ids = timing.ids
    if not kept:
        series.prefill.append(timing.prefill_s / len(job.prompt))


def _jobs(model: cocktail.Model, depth: int, kv_bits: float, tokens: int) -> list[Job]:
    """Depth 0 is a prompt of a few dozen tokens (chat header and question)."""
    count = lambda text: len(model.tokenizer.encode(text))  # noqa: E731
    short = model.read("Hello.")
    long = model.read(build_text(depth - len(short.prompt(QUESTION)), count))
    return [
        Job("0", short.prompt(QUESTION), short.plan(QUESTION, policy="fp16", max_tokens=tokens)),
        Job("fp16", long.prompt(QUESTION), long.plan(QUESTION, policy="fp16", max_tokens=tokens)),
        Job("mix", long.prompt(QUESTION), long.plan(QUESTION, policy="budget", kv_bits=kv_bits, max_tokens=tokens)),
    ]


def _figures(threads: int, series: dict[str, Series], rates: Sequence[float]) -> dict[str, Any]:
    """What is reported for one thread count."""
    read_bytes = float(np.median(rates))
    record: dict[str, Any] = {"threads": threads, "read_gb_s": read_bytes / 1e9, "read_gb_s_highest": max(rates) / 1e9,
                              "prefill": series["mix"].prefill_rate}
    for name in ("0", "fp16", "mix"):
        step = series[name]
        record |= {f"decode_{name}": step.rate, f"floor_{name}": read_bytes / step.step_bytes,
                   f"share_{name}": step.rate * step.step_bytes / read_bytes, f"bytes_{name}": step.step_bytes}
    peers = [name for name in ("llama", "llama flash") if f"{name} 0" in series]
    if peers:
        for depth in ("0", "fp16"):
            record[f"llama_{depth}"] = max(series[f"{name} {depth}"].rate for name in peers)
        record["llama_prefill"] = max(series[f"{name} fp16"].prefill_rate for name in peers)
        record["llama_flash"] = {key: value for name in peers[1:] for key, value in (
            ("0", series[f"{name} 0"].rate), ("fp16", series[f"{name} fp16"].rate),
            ("prefill", series[f"{name} fp16"].prefill_rate))}
        record |= _ratios(record)
    return record


def _ratios(record: dict[str, Any]) -> dict[str, float]:
    return {"ratio_0": record["decode_0"] / record["llama_0"],
            "ratio_fp16": record["decode_fp16"] / record["llama_fp16"],
            "ratio_mix": record["decode_mix"] / record["llama_fp16"],
            "ratio_prefill": record["prefill"] / record["llama_prefill"]}


def _best(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every figure at the thread count that suits it best, on either side; shares at the best read rate."""
    best: dict[str, Any] = {"threads": "best", **{key: max(r[key] for r in records)
                                                  for key in ("read_gb_s", "read_gb_s_highest")}}
    for key in records[0]:
        if key == "prefill" or (key.startswith(("decode_", "llama_")) and key != "llama_flash"):
            best[key] = max(r[key] for r in records)
    for name in ("0", "fp16", "mix"):
        best[f"bytes_{name}"] = records[0][f"bytes_{name}"]
        best[f"floor_{name}"] = best["read_gb_s"] * 1e9 / best[f"bytes_{name}"]
        best[f"share_{name}"] = best[f"decode_{name}"] / best[f"floor_{name}"]
    return best | (_ratios(best) if "llama_0" in best else {})


def _print(record: dict[str, Any]) -> None:
    print(f"\nthreads: {record['threads']}; memory read rate {record['read_gb_s']:.1f} GB/s (median; highest "
          f"{record['read_gb_s_highest']:.1f})")
    rows = []
    for name, label, peer in (("0", "decode at depth 0", "0"), ("fp16", "decode at depth, FP16", "fp16"),
                              ("mix", "decode at depth, mix", "fp16")):
        rows.append([label, f"{record[f'decode_{name}']:.1f}", f"{record[f'floor_{name}']:.1f}",
                     f"{record[f'share_{name}']:.0%}", _against(record, f"share_{name}"),
                     _number(record, f"llama_{peer}"), _number(record, f"ratio_{name}", ".2f"),
                     _against(record, f"ratio_{name}")])
    rows.append(["prefill at depth", f"{record['prefill']:.0f}", "", "", "", _number(record, "llama_prefill", ".0f"),
                 _number(record, "ratio_prefill", ".2f"), _against(record, "ratio_prefill")])
    print_table(["tokens/s", "ours", "at the read rate", "share", "goal", "llama.cpp", "ratio", "goal"], rows)


def _number(record: dict[str, Any], key: str, form: str = ".1f") -> str:
    return format(record[key], form) if key in record else "not run"


def _against(record: dict[str, Any], key: str) -> str:
    return verdict(record[key], GOALS[key]) if key in GOALS and key in record else ""


def _agreement(results: Sequence[tuple[dict[str, Series], list[float]]]) -> dict[str, str]:
    """How many leading greedy ids our FP16 cache and llama.cpp have in common ("n of m")."""
    found = {}
    for name in ("0", "fp16"):
        ours = results[0][0][name].ids
        theirs = results[0][0].get(f"llama {name}", Series()).ids
        if theirs:
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
            found[name] = f"{same} of {len(ours)}"
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=(__doc__ or "").split("`")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu", help="cuda has options of its own")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts to measure; default: 1 and all cores")
    parser.add_argument("--depth", type=int, default=4096, help="prompt tokens of the deep figures")
    parser.add_argument("--kv-bits", type=float, default=3.3)
    parser.add_argument("--tokens", type=int, default=17, help="per turn, the prefill's first one included")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave llama.cpp out")
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    return parser


if __name__ == "__main__":
    main()
