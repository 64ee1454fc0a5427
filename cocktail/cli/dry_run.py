"""`--dry-run`: the plan, the bytes and the least time of a token, without running the model or reading its weights."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from cocktail.cli.inputs import check_document
from cocktail.cli.output import write_plan
from runtime.errors import PlanError

if TYPE_CHECKING:
    from cocktail.estimate import Estimate


def dry_run(options: argparse.Namespace, context: str, query: str, cache: dict[str, Any]) -> int:
    """Prints to stdout and returns the exit code. cache: of Document.ask."""
    from cocktail.estimate import estimate, outline
    from cocktail.report import write
    from cocktail.strip import show_plan

    model = outline(options.model, options.backend, options.threads)
    chunk = {} if options.chunk is None else {"chunk": options.chunk}
    document = model.read(context, system=options.system, keep=False, **chunk)
    check_document(options, document)
    if options.max_tokens is not None and "plan" not in cache:
        cache = {**cache, "max_tokens": options.max_tokens}
    found = estimate(model, document, query, cache)
    if found.plan is None and (wanted := options.plan_out or options.report):
        raise PlanError(f"{wanted} cannot be written: which chunk gets what depends on the model's attention; leave "
                        "out --dry-run, or take a scorer of texts")
    if options.plan_out is not None and found.plan is not None:
        write_plan(options.plan_out, found.plan)
    if options.report is not None and found.plan is not None:
        write(options.report, document, {query: found.plan})
    if options.stats == "json":
        print(json.dumps(found.to_dict(), allow_nan=False))
        return 0
    if found.plan is not None:
        show_plan(found.plan, sys.stdout)
    else:
        print("which chunk gets which tier depends on the model's attention, known once the prompt is read")
    print(f"\n{table(found)}")
    return 0


def table(found: Estimate) -> str:
    """A few aligned lines: weights, cache, prefill, all of it, the least time of a token."""
    from cocktail.summary import seconds, size

    cache = f"exact, {found.context_bits_per_value:.2f} bits per context value; {size(found.cache_fp16_bytes)} at FP16"
    if found.free_bytes is None:
        fits = "the system does not say how much is free"
    elif found.total_bytes <= found.free_bytes:
        fits = f"fits: {size(found.free_bytes)} free"
    else:
        fits = (f"DOES NOT FIT: {size(found.free_bytes)} free; a lower --kv-bits, a shorter context or a smaller model "
                "needs less")
    rows = [("weights", found.weights_bytes, "as the file stores them"), ("cache", found.cache_bytes, cache),
            ("prefill", found.prefill_bytes, "besides, estimated from the sizes"), ("in all", found.total_bytes, fits)]
    lines = [f"{name:8} {size(nbytes):>10}  {about}" for name, nbytes, about in rows]
    if found.read_rate is not None and found.tpot_floor_s is not None:
        lines.append(f"{'a token':8} {seconds(found.tpot_floor_s):>10}  at least: {size(found.step_bytes)} to read, at "
                     f"{found.read_rate / 1e9:.1f} GB/s, which {found.backend} reaches now")
    return "\n".join(lines)
