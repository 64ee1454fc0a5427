"""LongBench under each policy, as the Cocktail paper's Table II. `python -m bench.longbench MODEL --data FOLDER`

FOLDER holds LongBench's .jsonl files and its dataset2prompt.json; nothing is downloaded. Per sample, as the benchmark's
own pred.py does it:

    1. the prompt is the dataset's format filled in; beyond --max-length tokens (3500 for 4K models, 31500 for 32K) its
       first and last half are kept
    2. all but few-shot and code prompts become one user turn of the chat format: the model's own, or --chat TEXT with
       {prompt} in it ("[INST]{prompt}[/INST]" is LongBench's for Llama 2, "{prompt}" is none)
    3. greedy decoding; SAMSum also ends at a newline

What was put for {context} is the document, which policies compress; the format's text before it and all that follows it
stay exact. It is tokenized apart from both, so a token that would span a border is two here. Chunks are scored against
the sample's own question. One exact prefill fills the caches of all policies.

A method is a policy with its options: fp16, budget:kv_bits=3.4, cocktail:alpha=0.5:scorer=random. bits: per context
value, all metadata counted, from the allocation; the mean over samples. --pred writes the answers in files that
LongBench's own eval.py reads.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import cocktail
from bench.longbench_data import DATASETS, DataError, Dataset, Sample, differences, read_formats, read_samples
from bench.report import describe_run, emit, print_table, progress, some_of
from cocktail.policies import Policy, load_policy
from cocktail.scorers import Scorer, Scores, load_scorer
from runtime.chat import ChatTemplate
from runtime.engine import read
from runtime.errors import CocktailError, PlanError, PromptError

DOCUMENT = "\ue000document\ue001"  # stands for the document while a chat format is filled in


@dataclass(frozen=True)
class Method:
    """One row of the table. label: as the user wrote it. scorer: its name, "none" where the policy asks none."""

    label: str
    policy: Policy
    scorer: str


@dataclass(frozen=True)
class Prompt:
    """A sample's prompt without the chat format: before + context + after."""

    before: str
    context: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """One sample under one method. score: 0 to 1; bits: per context value."""

    prediction: str
    score: float
    bits: float


class Tokenizer(Protocol):
    """What truncation needs of runtime.tokenizer.Tokenizer."""

    bos_id: int | None
    adds_bos: bool

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        _run(args)
    except CocktailError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def build_prompt(tokenizer: Tokenizer, prompt_format: str, sample: Sample, max_length: int) -> Prompt:
    """The filled-in format, cut to max_length tokens (BOS counted): its first and its last half, decoded and joined."""
    before, after = prompt_format.split("{context}")
    after = after.replace("{input}", sample.input)
    ids = tokenizer.encode(before + sample.context + after)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if len(ids) <= max_length:
        return Prompt(before, sample.context, after)
    head, tail = tokenizer.decode(ids[: max_length // 2]), tokenizer.decode(ids[-(max_length // 2) :])
    # What is left of the format and the question; a long question may have lost its beginning.
    begin = _shared(before, head)
    end = len(tail) - _shared(after[::-1], tail[::-1])
    return Prompt(head[:begin], head[begin:] + tail[:end], tail[end:])


def build_document(model: cocktail.Model, prompt: Prompt, chat: str | None, chunk: int = 32) -> cocktail.Document:
    """The prompt's context as a document whose prefix and suffix are the rest of the prompt in the chat format.

    chat: with {prompt} in it, "{prompt}" for no format, None for the model's own. Ask "": the suffix has the question.
    """
    text = prompt.before + DOCUMENT + prompt.after
    if chat is not None:
        text = chat.replace("{prompt}", text)
    elif model.template is not None:
        text = model.template.render([{"role": "user", "content": text}])
    if text.count(DOCUMENT) != 1:
        raise DataError("the chat format drops or repeats the prompt; give another with --chat")
    before, after = text.split(DOCUMENT)
    frame = ChatTemplate("{{ before }}{{ messages[0]['content'] }}{{ after }}", {"before": before, "after": after})
    return cocktail.Model(model.engine, model.tokenizer, frame).read(prompt.context, chunk=chunk)


def run_sample(model: cocktail.Model, dataset: Dataset, prompt_format: str, sample: Sample, methods: Sequence[Method],
               scorers: Mapping[str, Scorer], max_length: int, chat: str | None = None) -> list[Outcome]:
    """Every method's answer to one sample, from one prefill."""
    prompt = build_prompt(model.tokenizer, prompt_format, sample, max_length)
    if not prompt.context:
        raise PromptError(f"{dataset.name}: the prompt's format and question alone exceed {max_length} tokens; "
                          "a larger --max-length leaves room for the document")
    doc = build_document(model, prompt, chat if dataset.chat else "{prompt}")
    asked = {name: Asked(scorer, sample.input.strip() or dataset.task) for name, scorer in scorers.items()}
    plans = [doc.plan("", policy=method.policy, scorer=asked[method.scorer], max_tokens=dataset.max_new)
             for method in methods]
    reading = read(model.engine, doc.prompt(""), plans)
    ends = {*model.tokenizer.eos_ids, *model.config.eos_ids}
    if dataset.stop:
        ends.add(model.tokenizer.encode(dataset.stop)[-1])
        reading.first_logits[0, sorted(ends)] = -np.inf  # pred.py asks for one token at least where it sets a stop
    outcomes = []
    for i in range(len(methods)):
        ids = list(reading.generate(cocktail.SamplingParams(), dataset.max_new, ends, i))
        prediction = model.tokenizer.decode(ids)
        outcomes.append(Outcome(prediction, dataset.score(prediction, sample),
                                reading.caches[i].sizes.context_bits_per_value))
    return outcomes


class Asked:
    """A scorer that is asked one question about one document, whatever follows it in the prompt, and asked only once.

    question "": the one that it is given, which is the document's end where nothing better is known.
    """

    def __init__(self, scorer: Scorer, question: str):
        self.name = scorer.name
        self._scorer, self._question = scorer, question
        self._scores: Scores | None = None

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        if self._scores is None:
            self._scores = self._scorer.score(chunks, self._question or query)
        return self._scores


def parse_method(text: str, scorer: str) -> Method:
    """POLICY[:option=value]...; values are JSON or text; the option `scorer` overrides the common one.

    Raises PlanError for a policy, an option or a value that does not exist.
    """
    policy, *parts = re.split(r":(?=\w+=)", text)  # other colons belong to a value, as in scorer=hybrid:FOLDER
    options = {name: _value(value) for name, _, value in (part.partition("=") for part in parts)}
    scorer = str(options.pop("scorer", scorer))
    try:
        chosen = load_policy(policy, **options)
    except TypeError as error:
        raise PlanError(f"method {text!r}: an option has a value of the wrong kind: {error}") from error
    return Method(text, chosen, scorer if chosen.uses_scores else "none")


def summarize(method: Method, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """One row: each dataset's score (100 x mean, two decimals, as eval.py rounds), their mean, and the true bits."""
    scores = {name: round(100 * sum(o.score for o in found) / len(found), 2) for name, found in outcomes.items()}
    bits = {name: float(np.mean([o.bits for o in found])) for name, found in outcomes.items()}
    return {"method": method.label, "policy": method.policy.name, "scorer": method.scorer,
            "bits": float(np.mean([o.bits for found in outcomes.values() for o in found])),
            "dataset_bits": bits, "scores": scores, "average": round(float(np.mean(list(scores.values()))), 2)}


def _run(args: argparse.Namespace) -> None:
    formats = read_formats(args.data, args.datasets)
    samples = {name: read_samples(args.data, name, args.limit) for name in args.datasets}
    methods = [parse_method(text, args.scorer) for text in args.policies]
    device = "cpu" if args.backend == "cpu" else None
    scorers = {method.scorer: load_scorer(method.scorer, device=device, threads=args.threads) for method in methods}
    run, begin = describe_run(), time.perf_counter()
    model = cocktail.load(args.model, backend=args.backend, threads=args.threads)
    outcomes: dict[str, dict[str, list[Outcome]]] = {method.label: {} for method in methods}
    for name, of_dataset in samples.items():
        dataset = DATASETS[name] if args.max_new is None else replace(DATASETS[name], max_new=args.max_new)
        for i, sample in enumerate(of_dataset):
            found = run_sample(model, dataset, formats[name], sample, methods, scorers, args.max_length, args.chat)
            for method, outcome in zip(methods, found, strict=True):
                outcomes[method.label].setdefault(name, []).append(outcome)
            progress(f"{name} {i + 1}/{len(of_dataset)} {time.perf_counter() - begin:.0f}s "
                     + " ".join(f"{100 * outcome.score:.0f}" for outcome in found))
        for label in outcomes if args.pred else ():
            _write_predictions(args.pred / re.sub(r"[^\w.=-]+", "_", label), name, of_dataset, outcomes[label][name])
    rows = [summarize(method, outcomes[method.label]) for method in methods]
    differs = differences(samples)
    _print(rows, list(samples), differs)
    emit({"bench": "longbench", **run, "model": str(args.model), "backend": model.backend.name,
          "max_length": args.max_length, "max_new": args.max_new, "chat": args.chat,
          "samples": {name: len(found) for name, found in samples.items()}, "not_longbench": differs,
          "seconds": round(time.perf_counter() - begin), "rows": rows}, args.json)


def _print(rows: Sequence[Mapping[str, Any]], names: Sequence[str], differs: Sequence[str]) -> None:
    print_table(["method", "bits", *(DATASETS[name].title for name in names), "Average"],
                [[row["method"], f"{row['bits']:.2f}", *(f"{row['scores'][name]:.2f}" for name in names),
                  f"{row['average']:.2f}"] for row in rows])
    print("\nscorers: " + ", ".join(f"{row['method']} {row['scorer']}" for row in rows))
    if differs:
        print("These are NOT LongBench scores, only its metrics on other samples: " + "; ".join(differs))


def _write_predictions(folder: Path, name: str, samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"pred": outcome.prediction, "answers": sample.answers,
                         "all_classes": sample.all_classes or None, "length": sample.length}, ensure_ascii=False)
             for sample, outcome in zip(samples, outcomes, strict=True)]
    (folder / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _shared(a: str, b: str) -> int:
    """Length of the beginning that both have."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least {low}")
        return int(text)
    return parse


def _chat(text: str) -> str:
    if text.count("{prompt}") != 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected {{prompt}} in it, once")
    return text.replace("\\n", "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.longbench", description=(__doc__ or "").split("`")[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER",
                        help="where LongBench's .jsonl files and dataset2prompt.json lie")
    parser.add_argument("--datasets", type=some_of(DATASETS), default=list(DATASETS), metavar="A,B,...",
                        help="default: all of the paper's Table I")
    parser.add_argument("--policies", type=some_of(), default=["fp16", "budget", "cocktail"], metavar="A,B:x=1,...")
    parser.add_argument("--scorer", default="bm25")
    parser.add_argument("--limit", type=_at_least(1), metavar="N", help="only the first N samples of each dataset")
    parser.add_argument("--max-length", type=_at_least(2), default=3500, help="prompt tokens kept")
    parser.add_argument("--max-new", type=_at_least(1), metavar="N",
                        help="tokens to generate; default: each dataset's own (the Cocktail paper: 128)")
    parser.add_argument("--chat", type=_chat, metavar="TEXT", help="chat format with {prompt} in it")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pred", type=Path, metavar="FOLDER", help="also write the answers, for LongBench's eval.py")
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    return parser


if __name__ == "__main__":
    main()
