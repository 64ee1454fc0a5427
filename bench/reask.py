"""A document read once against fresh readings: the same answers, and how soon they begin.

    python -m bench.reask [--model PATH] [--context-tokens 3500] [--questions 10] [--scorer bm25] [--backend cpu]
    python -m bench.reask --shape llama-2-7b    on a GPU: see bench.reask_shapes

Facts are planted in real text and each is asked for, in one document that keeps its K and V and in fresh readings of
the same prompt that keep nothing. Where the ids differ, the two best logits of the fresh reading at the first
difference must be nearer than the tolerance: twice the largest difference between both sides' logits along the same
answers.

The floor beside the time to the first token of a later question: the bytes that it has to move (kept K and V, weights,
its own cache) over the read rate of the same run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cocktail
from bench.prompts import build_text
from bench.prompts_tasks import FACTS, NIAH_QUERY
from bench.report import (
    DEFAULT_MODEL,
    describe_run,
    emit,
    names_shape,
    print_table,
    progress,
    read_buffer,
    read_rate,
    verdict,
)

GOAL = 0.2  # of the first question's time to the first token


@dataclass(frozen=True)
class Side:
    """One answer and what it cost. reused: tokens that were not computed again."""

    text: str
    ids: tuple[int, ...]
    ttft_s: float
    pack_s: float
    reused: int
    cache_bytes: int


@dataclass(frozen=True)
class Pair:
    """One question. right: whether the planted year is in the answer. off: the largest difference of the logits along
    the fresh answer. differ: index of the first id that does, None; margin: of the fresh reading's two best there."""

    question: str
    fresh: Side
    kept: Side
    right: bool
    off: float
    differ: int | None
    margin: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    if names_shape(arguments):
        from bench import reask_shapes  # needs CuPy

        reask_shapes.main(arguments)
        return
    parser = argparse.ArgumentParser(prog="python -m bench.reask", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--context-tokens", type=int, default=3500)
    parser.add_argument("--questions", type=int, default=10, choices=range(2, len(FACTS) + 1), metavar="N")
    parser.add_argument("--scorer", default="bm25")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    args = parser.parse_args(arguments)

    run = describe_run()
    model = cocktail.load(args.model, backend=args.backend, threads=args.threads)
    text, facts = planted(args.context_tokens, args.questions, lambda text: len(model.tokenizer.encode(text)))
    options = {"scorer": args.scorer, "max_tokens": args.max_tokens}
    fresh, kept = model.read(text, keep=False), model.read(text, keep=True)
    pairs = []
    for query, year in facts:
        pairs.append(compare(fresh, kept, query, year, options))
        progress(f"{len(pairs)} of {len(facts)} questions")
    opened = time_opened(kept, model, facts[0][0], options)
    rate = read_rate(read_buffer(), 1)
    report(pairs, opened, kept, (kept.nbytes + model.weights_bytes + pairs[1].kept.cache_bytes) / rate, run, args)


def planted(tokens: int, n: int, count: Any) -> tuple[str, list[tuple[str, str]]]:
    """About `tokens` tokens of documentation with n facts between its paragraphs, and (question, year) of each."""
    paragraphs = build_text(tokens - 12 * n, count).split("\n\n")
    facts = [(fact, str(1803 + 19 * i)) for i, fact in enumerate(FACTS[:n])]
    for i, (fact, year) in reversed(list(enumerate(facts))):
        paragraphs.insert((2 * i + 1) * len(paragraphs) // (2 * n), fact.sentence.format(year=year))
    return "\n\n".join(paragraphs), [(NIAH_QUERY.format(question=fact.literal[0].lower() + fact.literal[1:]), year)
                                     for fact, year in facts]


def compare(fresh: cocktail.Document, kept: cocktail.Document, query: str, year: str, options: dict[str, Any]) -> Pair:
    theirs, ours = (side(document.ask(query, **options)) for document in (fresh, kept))
    expected, found = (document.logits(query, theirs.ids, scorer=options["scorer"]) for document in (fresh, kept))
    differ = next((i for i, (a, b) in enumerate(zip(theirs.ids, ours.ids, strict=False)) if a != b), None)
    margin = None if differ is None else float(np.subtract(*np.sort(expected[differ])[[-1, -2]]))
    return Pair(query, theirs, ours, year in ours.text, float(np.abs(found - expected).max()), differ, margin)


def side(answer: cocktail.Answer) -> Side:
    stats = answer.stats
    return Side(answer.text, answer.ids, stats.ttft_s, stats.pack_s, stats.reused_tokens, stats.cache_bytes)


def time_opened(document: cocktail.Document, model: cocktail.Model, query: str, options: dict[str, Any]) -> Side:
    """The first question of a document that was saved and opened: its checksums are computed on the way."""
    with tempfile.TemporaryDirectory() as folder:
        document.save(Path(folder) / "document.kv")
        return side(cocktail.open_document(Path(folder) / "document.kv", model).ask(query, **options))


def report(pairs: Sequence[Pair], opened: Side, kept: cocktail.Document, floor: float, run: dict[str, Any],
           args: argparse.Namespace) -> None:
    tolerance = 2 * max(pair.off for pair in pairs)
    same = [pair.differ is None and len(pair.fresh.ids) == len(pair.kept.ids) for pair in pairs]
    near = [pair.margin is not None and pair.margin < tolerance for pair in pairs]
    first, second = pairs[0].kept.ttft_s, pairs[1].kept.ttft_s
    later = float(np.median([pair.kept.ttft_s for pair in pairs[1:]]))
    print_table(("question", "fresh answer", "read once", "right", "ids", "fresh TTFT, s", "TTFT, s", "reused"), [
        (pair.question.partition(", ")[2].partition("?")[0], _line(pair.fresh.text), _line(pair.kept.text),
         "yes" if pair.right else "no", "equal" if alike else f"differ at {pair.differ}: margin {pair.margin}",
         f"{pair.fresh.ttft_s:.2f}", f"{pair.kept.ttft_s:.2f}", pair.kept.reused)
        for pair, alike in zip(pairs, same, strict=True)])
    print(f"\n{len(kept.context_ids)} context tokens, {kept.nbytes / 2**20:.1f} MiB kept, {kept.model.backend.name}")
    print(f"ids: {sum(same)} of {len(pairs)} equal to a fresh reading's; the largest difference of logits is "
          f"{tolerance / 2:.2g}, so the tolerance {tolerance:.2g}; unexplained: "
          f"{sum(not a and not b for a, b in zip(same, near, strict=True))}")
    print(f"TTFT: first question {first:.2f} s, second {second:.3f} s: {second / first:.1%}, "
          f"{verdict(second / first, GOAL, at_most=True)}; later ones {later:.3f} s (median), packing "
          f"{pairs[1].kept.pack_s:.3f} of the second; floor {floor:.3f} s")
    print(f"saved and opened: first question {opened.ttft_s:.3f} s, its ids "
          f"{'equal' if opened.ids == pairs[0].fresh.ids else 'DIFFERENT'}")
    emit({"bench": "reask", "run": run, "context_tokens": len(kept.context_ids), "kept_bytes": kept.nbytes,
          "scorer": args.scorer, "equal": sum(same), "tolerance": tolerance, "first_ttft_s": first,
          "second_ttft_s": second, "ratio": second / first, "later_ttft_s": later, "floor_s": floor,
          "opened_ttft_s": opened.ttft_s, "pairs": [asdict(pair) for pair in pairs]}, args.json)


def _line(text: str) -> str:
    return " ".join(text.split())[:40]


if __name__ == "__main__":
    main()
