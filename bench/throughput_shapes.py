"""Tokens per second against the number of sequences on the GPU, with sizes of known models: the paper's Fig. 6.

    python -m bench.throughput --shape mistral-7b [--context-tokens 4096,32768] [--methods fp16,mix,...] [--limit 500]

Weights are random. One prompt is read as in the product; every other sequence has a copy of its arena in memory of its
own: a hundred sequences would take a hundred prefills, and a step's time depends on sizes alone. There are 1, 2, 4, ..
sequences until memory is full, and at last as many as fit, each with its RoPE tables, its buffers and the room to read
one more prompt. All are the same, so all must draw the same ids: a step in which one differs ends the bench.

    read        seconds of one prompt: the scorer on its chunks where the method asks for scores, prefill and packing
    decode      tokens per second of steps of all sequences, up to 128 in one pass over the weights, as a scheduler runs
                them; median step
    end to end  all generated tokens over the time to read all prompts, one behind the other, and to decode: from
                the two figures above (the scores of a budget can come behind the first layer instead, for less)
    change      what the first two steps of a set of members take on top of later ones: work lists, a graph
    floor       of decode: the weights once for each pass, and every cache, at the best read rate of this run

--limit: seconds after which no new size begins; what is there by then is shown. kvtuner's pairs, the scores that plans
are made of and kvquant's levels are those of bench.policies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from bench.gpu import SHAPES, measure_rates, prompt_of, random_model, read_rate, release, shape_of, unread_weights
from bench.policies import EXACT, plan_of, step_bytes
from bench.policies import POLICIES as BASELINES
from bench.report import describe_run, emit, print_table, progress, some_of, verdict
from bench.scoring import SCORERS, check_scorers, chunk_texts, make_scorer, score_seconds
from bench.shapes import MIX_OPTIONS
from bench.throughput import plot
from kernels_cu.backend import CudaBackend
from runtime.batch import Decoder, Member
from runtime.cache import Cache
from runtime.engine import Reading, read
from runtime.errors import BackendError, CocktailError, OutOfMemory
from runtime.format_data import format_data
from runtime.model import Model, prefill_bytes
from runtime.plan import Plan
from runtime.sampler import SamplingParams

MIX = "mix"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **BASELINES, MIX: ("budget", MIX_OPTIONS), "budget": ("budget", {"kv_bits": 3.3})}
SCORED = (MIX, "budget", "cocktail", "cocktail-in-place")  # methods whose plans follow scores
DEFAULT = (EXACT, MIX, "K4V4", "kivi-4", "atom", "kvquant-4", "kvtuner", "cocktail")
CONTEXTS, WARM_STEPS, STEPS = (4096, 32768), 3, 9
# Goals at 32K on the shape with grouped heads, of the mix at its largest batch over FP16 at its own.
GOAL_SHAPE, GOAL_TOKENS, GOAL_FITS, GOAL_RATE = "mistral-7b", 32768, 4.0, 3.0


@dataclass(frozen=True)
class Point:
    """One method at one number of sequences: seconds, bytes, tokens per second. full: no more fit."""

    context: int
    method: str
    batch: int
    full: bool
    read: float
    step: float
    change: float
    decode: float
    end_to_end: float
    floor: float
    cache_bytes: int


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    if args.show:
        show(json.loads(Path(args.show).read_text()), args.plot)
        return
    scorers = [args.scorer] if args.scorer else []
    check_scorers(scorers)
    begin, backend = time.perf_counter(), CudaBackend()
    rate = read_rate(measure_rates(backend))
    release()
    model = random_model(args.shape, max(args.context_tokens) + args.tokens + 1024, backend)
    release()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    points: list[Point] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for context in args.context_tokens:
            score = 0.0
            for name in scorers:
                texts = chunk_texts(shape_of(model.config, context, 1).n_chunks)
                score = score_seconds(make_scorer(name, texts, Path(folder)), texts)
                progress(f"{context}: {name} scores in {score:.3f} s")
            for method in args.methods:
                try:
                    for point in measure(model, context, method, score, rate, args, begin, Path(folder)):
                        progress(f"{context} {method} {point.batch}{' (full)' * point.full}: "
                                 f"{1e3 * point.step:.2f} ms, {point.decode:.0f} tokens/s, {point.end_to_end:.1f} end "
                                 "to end")
                        if points and replace(points[-1], full=True) == point:
                            points.pop()
                        points.append(point)
                except CocktailError as refused:
                    failed[f"{method} at {context}"] = " ".join(str(refused).split())
                    progress(f"{context} {method}: {refused}")
                release()
    record = {"bench": "throughput", "run": describe_run(), "device": device, "shape": args.shape,
              "tokens": args.tokens, "scorer": args.scorer, "read_rate": rate,
              "points": [asdict(point) for point in points], "failed": failed}
    emit(record, args.json)
    show(record, args.plot)


def show(record: dict[str, Any], path: str | None) -> None:
    """Table, goals and, if there is a path, plot of each context, of what main has emitted."""
    points = [Point(**point) for point in record["points"]]
    for context in dict.fromkeys(point.context for point in points):
        mine = [point for point in points if point.context == context]
        print(f"\n{record['shape']}, {context} context tokens, {record['tokens']} generated, {record['device']}, "
              f"scorer {record['scorer'] or 'none'}")
        report(record["shape"], context, mine)
        if path:
            to = Path(path)
            plot([asdict(point) for point in mine], str(to.with_stem(f"{to.stem}-{context}")))
    for case, reason in record["failed"].items():
        print(f"{case}: {reason}")


def measure(model: Model, context: int, method: str, score: float, rate: float, args: argparse.Namespace, begin: float,
            folder: Path) -> Iterator[Point]:
    """One method at every size, as they are done; once more, as full, where the last one was all that fits.

    begin: of the time that --limit counts.
    """
    if time.perf_counter() - begin >= args.limit:
        return
    shape = shape_of(model.config, context, args.tokens)
    plan = plan_of(model, shape, *METHODS[method], folder)
    ids = prompt_of(model.config, shape.prompt_tokens)
    readings: list[Reading] = []
    for _ in range(2):  # the first one compiles
        readings.clear()
        release()
        before = time.perf_counter()
        readings.append(read(model, ids, [plan]))
        seconds = time.perf_counter() - before + score * (method in SCORED)
    weights = model.weights.nbytes - unread_weights(model)
    own = step_bytes(model, plan.layout, STEPS) - weights
    size, full, took = 1, False, 0.0
    point: Point | None = None
    while not full and size <= args.most and time.perf_counter() - begin + 2 * took < args.limit:
        before = time.perf_counter()
        full = not grow(model, plan, readings, size)
        n = len(readings)
        if point is not None and point.batch == n:
            yield replace(point, full=True)
            return
        (step, change), passes = step_seconds(model, readings), -(-n // model.backend.max_batch)
        point = Point(context, method, n, full, seconds, step, change, n / step,
                      n * args.tokens / (n * seconds + (args.tokens - 1) * step),
                      n * rate / (passes * weights + n * own), n * int(readings[0].caches[0].arena.nbytes))
        yield point
        size, took = 2 * size, time.perf_counter() - before


def grow(model: Model, plan: Plan, readings: list[Reading], size: int) -> bool:
    """Copies of the first sequence until there are `size`; False where memory is full before."""
    first, layout = readings[0], plan.layout
    try:
        room = cupy.empty(prefill_bytes(model.config, layout.prompt_tokens, model.backend.prefill_tile), np.uint8)
        while len(readings) < size:
            cos, sin = (table.copy() for table in first.rope)
            cache = Cache(model.backend, model.config, layout, format_data(model.backend, model.config, layout,
                                                                           (cos, sin)))
            cache.arena[:] = first.caches[0].arena
            cache.assign(plan)
            readings.append(Reading(model, first.prompt, (cache,), (cos, sin), first.first_logits))
        del room
    except (MemoryError, OutOfMemory, BackendError) as error:  # the first one could be bound: it is memory
        progress(f"{len(readings)} sequences fit: {' '.join(str(error).split())[:100]}")
        cupy.get_default_memory_pool().free_all_blocks()
        return False
    return True


def step_seconds(model: Model, readings: Sequence[Reading]) -> tuple[float, float]:
    """Median step of all sequences, and what the first two take more than two of those. Raises RuntimeError where they
    do not all draw the same ids."""
    decoder, seconds = Decoder(model), []
    members = [Member(reading, SamplingParams()) for reading in readings]
    for i in range(WARM_STEPS + STEPS):
        begin = time.perf_counter()
        drawn = decoder.step(members)
        seconds.append(time.perf_counter() - begin)
        for one in drawn:
            if isinstance(one, Exception):
                raise one
        if len(set(drawn)) > 1:
            raise RuntimeError(f"{len(drawn)} equal sequences drew {len(set(drawn))} different ids in step {i}")
    step = float(np.median(seconds[WARM_STEPS:]))
    return step, sum(seconds[:2]) - 2 * step


def report(shape: str, context: int, points: Sequence[Point]) -> None:
    """Table and goals of one context."""
    print_table(("method", "sequences", "read s", "step ms", "change ms", "decode tokens/s", "floor", "x floor",
                 "end to end", "caches GiB"),
                [(point.method, f"{point.batch}{' (full)' * point.full}", f"{point.read:.3f}",
                  f"{1e3 * point.step:.2f}", f"{1e3 * point.change:.1f}", f"{point.decode:.0f}", f"{point.floor:.0f}",
                  f"{point.decode / point.floor:.2f}", f"{point.end_to_end:.1f}", f"{point.cache_bytes / 2**30:.2f}")
                 for point in points])  # fmt: skip
    largest = {point.method: point for point in points}  # the last of each
    exact = largest.get(EXACT)
    for method, point in largest.items():
        if exact is None or method == EXACT:
            continue
        fits, rate = point.batch / exact.batch, point.decode / exact.decode
        goals = ("", "")
        if method == MIX and (shape, context) == (GOAL_SHAPE, GOAL_TOKENS) and exact.full and point.full:
            goals = f", {verdict(fits, GOAL_FITS)}", f", {verdict(rate, GOAL_RATE)}"
        print(f"{method} over {EXACT}, each at its largest: {fits:.2f} times the sequences{goals[0]}, {rate:.2f} times "
              f"the tokens per second of decode{goals[1]}, {point.end_to_end / exact.end_to_end:.2f} end to end")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, required=True, help="sizes of a known model, random weights")
    add("--backend", choices=["cuda"], default="cuda")
    add("--context-tokens", type=lambda text: [int(part) for part in text.split(",")], default=[*CONTEXTS],
        metavar="LIST", help="4096,32768")
    add("--tokens", type=int, default=64, help="generated by every sequence (default: %(default)s)")
    add("--methods", type=some_of(METHODS), default=[*DEFAULT], metavar="LIST", help=f"of {', '.join(METHODS)}")
    add("--most", type=int, default=256, help="sequences at most, where memory has room for more")
    add("--scorer", choices=["", *SCORERS], default="minilm", help="'' for none (default: %(default)s)")
    add("--limit", type=float, default=540.0, help="seconds after which no new size begins (default: %(default)g)")
    add("--show", metavar="FILE", help="measure nothing: table and plot of what --json wrote")
    add("--plot", metavar="FILE", help="a PNG for each context, named FILE-CONTEXT")
    add("--json", metavar="FILE", help="also write the closing JSON line here")
    args = parser.parse_args(arguments)
    if args.tokens <= WARM_STEPS + STEPS:
        parser.error(f"--tokens is {args.tokens}; expected more than the {WARM_STEPS + STEPS} steps that are taken")
    return args
