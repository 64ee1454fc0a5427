"""Samples of the quality bench, made up."""

from __future__ import annotations

from bench.quality_measure import Sample
from bench.quality_report import summarize
from bench.quality_settings import CURVE, FP16, Setting, budget, without_search
from bench.quality_settings import cocktail as thresholds


def sample(kl: list[float], correct: float = 1.0, kind: str = "literal", bpv: float = 3.3,
           recalled: float = 1.0) -> Sample:
    return Sample(kind, bpv, 10.0, tuple(kl), (True,) * len(kl), correct, recalled)


def run_of(**kls: float) -> tuple[dict[Setting, list[Sample]], list[dict]]:
    """Samples and rows of five prompts with the same KL each; FP16 answers all."""
    settings = {"low": budget(3.3, CURVE), "high": budget(3.8, CURVE), "kivi": Setting.of("kivi-4", "kivi", bits=4),
                "paper": thresholds("encoder"), "blind": without_search(thresholds("encoder"))}
    bits = {"low": 3.3, "high": 3.8, "kivi": 5.0, "paper": 3.55, "blind": 3.55}
    samples = {FP16: [sample([0.0] * 4, bpv=16) for _ in range(5)]}
    samples |= {settings[name]: [sample([kl] * 4, bpv=bits[name]) for _ in range(5)] for name, kl in kls.items()}
    return samples, [summarize(setting, found) for setting, found in samples.items()]
