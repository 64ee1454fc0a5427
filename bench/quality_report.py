"""Samples of bench.quality -> rows, tables and verdicts. Intervals are 95% bootstrap over prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.prompts import KINDS
from bench.quality_measure import Sample
from bench.quality_settings import BUDGETS, COMPARED_BITS, CURVE, RELEVANCE, Setting
from bench.report import interval, print_table, verdict

GOAL_BPV, GOAL_KL = 3.3, 0.015
GOAL_KIVI = (3.8, "kivi-4", 1 / 3)  # at so many bits, this share of that method's KL
GOAL_SEARCH = 2.0
RIVAL = "uniform K4V4"  # whose KL a pairs file reaches with fewer bits
Samples = Mapping[Setting, Sequence[Sample]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Pooled:
    """KL of one setting by prompt: sums and numbers of tokens (n,). Its mean is over tokens."""

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Pooled:
        return cls(np.array([sum(s.kl) for s in samples]), np.array([len(s.kl) for s in samples], np.float64))

    def mean(self, draws: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
        """() or, for draws (R, n) of prompts, (R,)."""
        draws = np.arange(len(self.sums)) if draws is None else draws
        return np.asarray(self.sums[draws].sum(axis=-1) / self.counts[draws].sum(axis=-1))


def summarize(setting: Setting, samples: Sequence[Sample]) -> Row:
    """One row: means over prompts or, of KL and agreement, over tokens; by kind of prompt where that is asked for."""
    pooled = Pooled.of(samples)
    low, high = interval(len(samples), pooled.mean)
    kinds = {kind: [s for s in samples if s.kind == kind] for kind in KINDS}
    return {
        "setting": setting.name, "policy": setting.policy, "scorer": setting.scorer, "chunk": setting.chunk,
        "options": dict(setting.options), "match": setting.match, "prompts": len(samples),
        "bpv": _mean([s.bpv for s in samples]), "bpv_max": max(s.bpv for s in samples),
        "mib": _mean([s.mib for s in samples]),
        "kl": float(pooled.mean()), "kl_low": low, "kl_high": high,
        "kl_p99": float(np.percentile(np.concatenate([s.kl for s in samples]), 99)),
        "top1": float(np.concatenate([s.agree for s in samples]).mean()),
        "correct": {kind: _mean([s.correct for s in found]) for kind, found in kinds.items()},
        "kl_by_kind": {kind: float(Pooled.of(found).mean()) for kind, found in kinds.items() if found},
        "recall": {kind: _mean([s.recall for s in found]) for kind, found in kinds.items()},
    }


def ratio(worse: Sequence[Sample], better: Sequence[Sample]) -> tuple[float, float, float]:
    """How many times less KL the second has than the first, on the same prompts, with its interval."""
    a, b = Pooled.of(worse), Pooled.of(better)
    low, high = interval(len(worse), lambda draws: a.mean(draws) / b.mean(draws))
    return float(a.mean() / b.mean()), low, high


def at_bytes(curve: Sequence[tuple[float, float]], bpv: float) -> float | None:
    """KL of a curve of (bpv, KL) points at that many bits: log KL is linear between neighbours. Beyond the last point
    its KL, which takes fewer bits still; None before the first one."""
    points = sorted(curve)
    if not points or bpv < points[0][0]:
        return None
    x, y = np.array(points).T
    return float(np.exp(np.interp(bpv, x, np.log(y))))


def bits_at(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """The fewest bits at which a curve of (bpv, KL) points reaches that KL: the inverse of at_bytes. The first point's,
    which is no worse, where even that reaches it; None where the last one does not."""
    points = sorted(curve)
    if points and points[0][1] <= kl:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= kl:
            return float(x0 + (x1 - x0) * np.log(y0 / kl) / np.log(y0 / y1))
    return None


def best_at_most(rows: Sequence[Row], bpv: float) -> Row | None:
    """The row of the least KL among those that take no more bits; None where all take more."""
    return min((row for row in rows if row["bpv"] <= bpv), key=lambda row: row["kl"], default=None)


def print_main(rows: Sequence[Row]) -> None:
    print_table(
        ["setting", "bpv", "MiB", "KL (95%)", "KL p99", "top-1", *KINDS],
        [[r["setting"], f"{r['bpv']:.2f}", f"{r['mib']:.1f}",
          f"{r['kl']:.4f} ({r['kl_low']:.4f}-{r['kl_high']:.4f})", f"{r['kl_p99']:.3f}", f"{r['top1']:.3f}",
          *(_figure(r["correct"][kind], 2) for kind in KINDS)] for r in rows])


def print_prompts(samples: Samples) -> None:
    kinds = Counter(sample.kind for sample in next(iter(samples.values())))
    print("\nprompts: " + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind]) + ".")
    print("floor: fp16, KL 0 by definition; the accuracies of its row are the model's own. A model as small as the "
          "demo's (135M,\nweights of 4 bits, D = 64) overstates what low bits cost.")


def print_matched(samples: Samples, rows: Sequence[Row]) -> None:
    """Each method beside the budget at its bytes, prompt by prompt, and the best uniform pair that takes no more."""
    by_name = {row["setting"]: row for row in rows}
    named = {setting.name: found for setting, found in samples.items()}
    uniform = [row for row in rows if row["policy"] == "uniform"]
    lines = []
    for setting, found in samples.items():
        if setting.match is None or setting.match not in named or not found:
            continue
        method, own = by_name[setting.match], by_name.get(setting.name)
        by = setting.name.partition(" = ")[0]
        if own is None or len(found) < len(named[setting.match]):
            lines.append([setting.match, f"{method['bpv']:.2f}", f"{method['kl']:.4f}", by,
                          "below its least bytes", "", "", ""])
            continue
        times, low, high = ratio(named[setting.match], found)
        pair = best_at_most(uniform, method["bpv"])
        lines.append([setting.match, f"{method['bpv']:.2f}", f"{method['kl']:.4f}", by,
                      f"{own['kl']:.4f} at {own['bpv']:.2f}", f"{times:.2f} ({low:.2f}-{high:.2f})",
                      *(("none", "") if pair is None else
                        (f"{pair['setting']} at {pair['bpv']:.2f}", f"{pair['kl']:.4f}"))])
    if lines:
        print("\nAt equal bytes:\n")
        print_table(["method", "bpv", "KL", "beside", "its KL", "times closer (95%)", "best uniform pair",
                     "its KL"], lines)


def print_beside(prompts: Sequence[Mapping[str, Sample]], beside: Sequence[tuple[str, str]]) -> None:
    """Each setting beside the one it is held against, on the prompts that both have: fewer where no cache of its chunks
    is as small."""
    lines = []
    for name, other in beside:
        both = [(prompt[name], prompt[other]) for prompt in prompts if name in prompt and other in prompt]
        if not both:
            lines.append([name, "0", "", other, "", ""])
            continue
        own, its = zip(*both, strict=True)
        lines.append([name, str(len(both)), _bits_and_kl(own), other, _bits_and_kl(its),
                      "{:.2f} ({:.2f}-{:.2f})".format(*ratio(own, its))])
    if lines:
        print("\nBeside one another, prompt by prompt:\n")
        print_table(["setting", "prompts", "KL", "beside", "its KL", "times its KL (95%)"], lines)


def print_scorers(samples: Samples, rows: Sequence[Row]) -> None:
    """Every scorer at the same budget: KL beside random chunks', and recall of the needed chunks."""
    by_name = {setting.name: (setting, found) for setting, found in samples.items()}
    kinds = [kind for kind in KINDS if any(not np.isnan(row["recall"][kind]) for row in rows)]
    lines = []
    for row in rows:
        setting, found = by_name[row["setting"]]
        if setting.policy != "budget" or setting.kv_bits not in COMPARED_BITS:
            continue
        control = by_name.get(setting.name.replace(f"/{setting.scorer}", "/random"))
        times = "" if control is None or setting.scorer == "random" else "{:.2f} ({:.2f}-{:.2f})".format(
            *ratio(control[1], found))
        lines.append([row["setting"], f"{row['bpv']:.2f}", f"{row['kl']:.4f}", times,
                      *(_figure(row["recall"][kind], 2) for kind in kinds)])
    if lines:
        print("\nScorers at the same bytes; recall: share of the needed chunks above the lowest tier:\n")
        print_table(["setting", "bpv", "KL", "times closer than random", *(f"recall {kind}" for kind in kinds)],
                    sorted(lines, key=lambda line: (line[0].split("/")[0], float(line[2]))))


def print_bits(rows: Sequence[Row]) -> None:
    """The bits at which each of the budget's curves reaches each method's KL, rounded up; '<' where its first point is
    better already. They are what bench.policies --budgets METHOD=BITS takes."""
    curves = {name: curve for pairs in (False, True) for scorer in RELEVANCE
              if len(curve := _curve(rows, scorer, pairs)) > len(COMPARED_BITS)
              for name in [f"{BUDGETS[pairs]}/{scorer}"]}
    lines = []
    for row in rows:
        if row["policy"] in ("fp16", "budget"):
            continue
        found = [(min(curve)[0], bits_at(curve, row["kl"])) for curve in curves.values()]
        lines.append([row["setting"], f"{row['bpv']:.2f}", f"{row['kl']:.4f}", *(
            "" if bits is None else f"{'< ' if bits == first else ''}{np.ceil(100 * bits - 1e-9) / 100:.2f}"
            for first, bits in found)])
    if curves and lines:
        print("\nBits per value at which the budget has a method's KL:\n")
        print_table(["method", "bpv", "KL", *curves], lines)


def goals(samples: Samples, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Verdicts by name: {"text", "met"}; only of what was measured."""
    by_name = {row["setting"]: row for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for row in _budgets(rows, GOAL_BPV):
        found[row["setting"]] = _budget_goal(row, by_name["fp16"], samples)
    curve = _curve(rows, CURVE, True) or _curve(rows, CURVE, False)  # with a file, where there is one
    for row in rows:
        if curve and row["policy"] not in ("fp16", "budget"):
            found[f"curve below {row['setting']}"] = _curve_goal(curve, row)
    bits, name, share = GOAL_KIVI
    for row in _budgets(rows, bits) if name in by_name else ():
        part = row["kl"] / by_name[name]["kl"]
        found[f"{row['setting']} beside {name}"] = {
            "text": f"{part:.3f} of its KL ({by_name[name]['kl']:.4f} at {by_name[name]['bpv']:.2f} bpv), "
                    f"{verdict(part, share, at_most=True)}", "met": part <= share}
    found |= _pairs_goals(by_name)
    named = {setting.name: kept for setting, kept in samples.items()}
    for name in by_name:
        if (random := f"{name}, no search") in by_name:
            times, low, high = ratio(named[random], named[name])
            kinds = ", ".join(f"{kind} {by_name[random]['kl_by_kind'][kind] / kl:.1f}"
                              for kind, kl in by_name[name]["kl_by_kind"].items())
            text = f"{times:.2f} times ({low:.2f}-{high:.2f}; {kinds}) less KL than without search"
            if name.startswith("cocktail/"):
                found[f"{name}"] = {"text": f"{text}, {verdict(times, GOAL_SEARCH)}", "met": times >= GOAL_SEARCH}
            else:
                found[f"{name}"] = {"text": f"{text} (no goal)"}
    return found


def _curve(rows: Sequence[Row], scorer: str, pairs: bool) -> list[tuple[float, float]]:
    """(bpv, KL) of the budgets that are given in bits, with or without a pairs file."""
    return [(row["bpv"], row["kl"]) for row in rows if row["policy"] == "budget" and row["scorer"] == scorer
            and not row["match"] and ("pairs" in row["options"]) == pairs]


def _budgets(rows: Sequence[Row], bits: float) -> list[Row]:
    """The budgets of so many bits with a scorer that knows the question."""
    names = [f"{begin}@{bits:g}/{scorer}" for begin in BUDGETS for scorer in RELEVANCE]
    return sorted((row for row in rows if row["setting"] in names), key=lambda row: names.index(row["setting"]))


def _pairs_goals(by_name: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """A pairs file beside the even pair, and both together at the pairs' bytes beside each alone."""
    found: dict[str, dict[str, Any]] = {}
    rival, chosen = by_name.get(RIVAL), by_name.get("kvtuner")
    if rival and chosen:
        met = chosen["kl"] <= rival["kl"] and chosen["bpv"] < rival["bpv"]
        found[f"pairs beside {RIVAL}"] = {
            "text": f"KL {chosen['kl']:.4f} at {chosen['bpv']:.2f} bpv, {rival['kl']:.4f} at {rival['bpv']:.2f}: "
                    f"{'met' if met else 'MISSED'}", "met": met}
    for name, pairs in by_name.items():
        alone, both = (by_name.get(f"{begin}/{CURVE} = {name}") for begin in BUDGETS)
        if pairs["policy"] == "kvtuner" and alone and both:
            met = both["kl"] < min(alone["kl"], pairs["kl"])
            found[f"both beside each alone at {pairs['bpv']:.2f} bpv"] = {
                "text": f"KL {both['kl']:.4f}, budget {alone['kl']:.4f}, {name} {pairs['kl']:.4f}: "
                        f"{'met' if met else 'MISSED'}", "met": met}
    return found


def _budget_goal(row: Row, fp16: Row, samples: Samples) -> dict[str, Any]:
    """KL at the budget, and every task's score within one prompt of FP16's."""
    counts = Counter(sample.kind for sample in next(iter(samples.values())))
    short = {kind: (fp16["correct"][kind] - row["correct"][kind]) * counts[kind] for kind in KINDS if counts[kind]}
    worst = max(short, key=lambda kind: short[kind])
    met_kl, met_tasks = row["kl"] <= GOAL_KL, short[worst] <= 1 + 1e-9
    return {"kl": row["kl"], "prompts_short": short, "met": met_kl and met_tasks and row["bpv_max"] <= GOAL_BPV,
            "text": f"KL {row['kl']:.4f} at {row['bpv_max']:.2f} bpv or less, "
                    f"{verdict(row['kl'], GOAL_KL, at_most=True)}; at most {short[worst]:.2f} prompts below FP16 "
                    f"({worst}), {verdict(short[worst], 1, at_most=True)}"}


def _curve_goal(curve: Sequence[tuple[float, float]], row: Row) -> dict[str, Any]:
    at = at_bytes(curve, row["bpv"])
    if at is None:
        return {"text": f"{row['bpv']:.2f} bpv are fewer than the curve begins with ({min(curve)[0]:.2f})"}
    last, met = max(curve)[0], at < row["kl"]
    if row["bpv"] > last and not met:
        return {"text": f"{row['bpv']:.2f} bpv are more than the curve ends with ({last:.2f})"}
    beyond = " (the curve's last point, which takes fewer)" if row["bpv"] > last else ""
    return {"text": f"KL {at:.4f} at {row['bpv']:.2f} bpv{beyond}, {row['setting']} {row['kl']:.4f}: "
                    f"{row['kl'] / at:.2f} times, {'met' if met else 'MISSED'}", "times": row["kl"] / at, "met": met}


def _bits_and_kl(samples: Sequence[Sample]) -> str:
    return f"{Pooled.of(samples).mean():.4f} at {_mean([s.bpv for s in samples]):.2f}"


def _figure(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def _mean(values: Sequence[float]) -> float:
    """NaN-free mean; NaN where there is nothing to average."""
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")
