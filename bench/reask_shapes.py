"""How soon a later question about a kept document is answered on the GPU, with sizes of known models.

    python -m bench.reask --shape llama-2-7b [--context-tokens 32768] [--questions 4] [--scorer bm25]

Weights and ids are random. The first question reads the document and keeps its K and V in page-locked host memory;
every later one, each with a plan and a suffix of its own, brings them in layer by layer, attends to them exactly and
packs them. A short document, read and asked before, has the kernels compiled.

    TTFT   from the call of read() to the first id; chunks are scored behind the first layer
    copy   all that is kept from page-locked memory to the device and nothing else, in this run: the floor
    off    root mean square of the first id's logits minus those of a fresh reading, over the latter's own: few rows are
           multiplied by other kernels than many
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cupy
import numpy as np

from bench.gpu import SHAPES, SUFFIX, random_model, release, shape_of
from bench.report import describe_run, emit, print_table, progress, verdict
from bench.scoring import QUERY, SCORERS, check_scorers, chunk_texts, make_scorer
from bench.shapes import CARD, MIX_OPTIONS
from cocktail.policies import load_policy
from kernels_cu.backend import CudaBackend
from runtime.engine import PendingPlan, Reading, Timing, read
from runtime.master import SharedMaster
from runtime.model import Model
from runtime.sampler import SamplingParams

GOAL_SHAPE, GOAL_TOKENS, GOAL = "llama-2-7b", 32768, 0.45  # seconds to the second question's first token
TOLERANCE = 0.05  # of `off`: a wrong layer or chunk is far beyond
ANSWER = 8


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    check_scorers([args.scorer])
    backend = CudaBackend()
    model = random_model(args.shape, args.context_tokens + 1024, backend)
    release()
    with tempfile.TemporaryDirectory() as folder:
        ask(model, 2 * backend.prefill_tile, 2, args.scorer, Path(folder))
        seconds, timings, kept, off = ask(model, args.context_tokens, args.questions, args.scorer, Path(folder))
    rate = copy_rate(backend)
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{args.shape}, {args.context_tokens} context tokens, scorer {args.scorer}, {device}; kept "
          f"{kept / 2**30:.2f} GiB; copies to the device {rate / 1e9:.1f} GB/s, all of it {kept / rate:.3f} s")
    print_table(("question", "TTFT s", "x copy", "pack s", "scores waited for s"),
                [(i + 1, f"{ttft:.3f}", f"{ttft * rate / kept:.2f}" if i else "", f"{timing.pack:.3f}",
                  f"{timing.wait:.3f}") for i, (ttft, timing) in
                 enumerate(zip(seconds, timings, strict=True))])  # fmt: skip
    goal = (args.shape, args.context_tokens) == (GOAL_SHAPE, GOAL_TOKENS) and CARD in device
    met = f", {verdict(seconds[1], GOAL, at_most=True)}" if goal else ""
    print(f"TTFT: first question {seconds[0]:.3f} s, second {seconds[1]:.3f} s: {seconds[1] / seconds[0]:.1%}{met}; "
          f"later ones {np.median(seconds[1:]):.3f} s (median); off {off:.2e}")
    emit({"bench": "reask", "run": describe_run(), "device": device, "shape": args.shape, "scorer": args.scorer,
          "context_tokens": args.context_tokens, "kept_bytes": kept, "copy_rate": rate, "ttft": seconds, "off": off,
          "pack": [timing.pack for timing in timings], "wait": [timing.wait for timing in timings]}, args.json)


def ask(model: Model, context_tokens: int, questions: int, scorer: str,
        folder: Path) -> tuple[list[float], list[Timing], int, float]:
    """Seconds to the first id and the timing of each question, bytes kept, and `off` of the second."""
    shape, policy = shape_of(model.config, context_tokens, ANSWER), load_policy("budget", **MIX_OPTIONS)
    layout, texts = policy.layout(shape), chunk_texts(shape.n_chunks)
    by = make_scorer(scorer, texts, folder)
    pending = PendingPlan(layout, lambda: policy.assign(layout, by.score(texts, QUERY), by.name))
    rng = np.random.default_rng(1)
    document = [int(i) for i in rng.integers(3, model.config.vocab_size, shape.prompt_tokens - SUFFIX)]
    master = SharedMaster(model.backend, model.config, document, "memory")
    seconds, timings, off = [], [], 0.0
    for question in range(questions):
        prompt = [*document, *(int(i) for i in rng.integers(3, model.config.vocab_size, SUFFIX))]
        release()
        begin = time.perf_counter()
        reading = read(model, prompt, [pending], master=master)
        answer = reading.generate(SamplingParams(), ANSWER, ())
        next(answer)
        seconds.append(time.perf_counter() - begin)
        answer.close()
        timings.append(reading.timing)
        reused = reading.reused
        progress(f"{context_tokens} tokens, question {question + 1}: {seconds[-1]:.3f} s")
        if question == 1:
            off = difference(reading, read(model, prompt, [pending]))
        del reading, answer
    kept = master.full
    if kept is None or reused != len(document):
        raise RuntimeError(f"{reused} of {len(document)} tokens came from what was kept")
    return seconds, timings, kept.nbytes, off


def difference(reading: Reading, fresh: Reading) -> float:
    """`off`; RuntimeError where it is more than roundings."""
    found, expected = (np.asarray(each.first_logits, np.float64) for each in (reading, fresh))
    off = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not off < TOLERANCE:
        raise RuntimeError(f"the second question's logits are off by {off:.3g} of a fresh reading's")
    return off


def copy_rate(backend: CudaBackend, nbytes: int = 1 << 30) -> float:
    """Bytes per second from page-locked memory to the device; the best of five copies."""
    source, target = backend.host((nbytes,), np.uint8), cupy.empty(nbytes, np.uint8)
    source[:] = 1
    best = np.inf
    for _ in range(5):
        begin = backend.mark()
        backend.copy(source, target)
        best = min(best, backend.seconds(begin, backend.mark()))
    return nbytes / best


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.reask", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True, help="sizes of a known model, random weights")
    parser.add_argument("--context-tokens", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=4, choices=range(2, 17), metavar="N")
    parser.add_argument("--scorer", choices=SCORERS, default="bm25")
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
