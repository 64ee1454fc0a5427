"""The paper's sweeps: chunk size (Table III), alpha and beta (Fig. 7), encoders (Table IV), ablations (Table V).

Each is a list of settings, measured as those of the main table are, and lines to plot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.quality_settings import FP16, Setting, budget, cocktail, without_reorder, without_search

CHUNKS = (8, 16, 32, 64, 128, 256)
ALPHAS, BETAS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8), (0.02, 0.05, 0.1, 0.2, 0.3)
ALPHA, BETA = 0.6, 0.1  # where the other one is varied: the paper's
SHARES = {"tiers": "K3V2,K4V4,K8V8", "shares": "0.1,0.03"}  # a budget of any chunk size: the sink grows with it
ENCODER_BITS = 3.3


@dataclass(frozen=True)
class Sweep:
    """lines: by name, what is plotted against x and the settings' names; empty where x is no number."""

    settings: tuple[Setting, ...]
    x: str = ""
    lines: tuple[tuple[str, tuple[tuple[float, str], ...]], ...] = ()
    log: bool = False


def sweep_of(name: str, scorers: Sequence[str]) -> Sweep:
    """The sweep of that name (SWEEPS); scorers: those that can be used, the paper's kind first ("encoder")."""
    return SWEEPS[name](scorers)


def _chunk(scorers: Sequence[str]) -> Sweep:
    def line(make: Callable[[int], Setting]) -> tuple[tuple[float, Setting], ...]:
        return tuple((chunk, make(chunk)) for chunk in CHUNKS)

    scorer = scorers[0]
    return _lines("tokens per chunk", True, {
        f"cocktail/{scorer}": line(lambda chunk: _named(f"cocktail/{scorer}, chunk {chunk}", cocktail(scorer), chunk)),
        f"budget/{scorer}, 10% K4V4, 3% K8V8, else K3V2": line(
            lambda chunk: Setting.of(f"budget/{scorer}, chunk {chunk}", "budget", scorer, chunk=chunk, **SHARES))})


def _thresholds(scorers: Sequence[str]) -> Sweep:
    scorer = scorers[0]

    def at(alpha: float, beta: float) -> Setting:
        name = f"cocktail/{scorer}, alpha {alpha:g}, beta {beta:g}"
        return Setting.of(name, "cocktail", scorer, alpha=alpha, beta=beta)

    return _lines("alpha or beta", False, {
        f"alpha, beta {BETA:g}": tuple((alpha, at(alpha, BETA)) for alpha in ALPHAS),
        f"beta, alpha {ALPHA:g}": tuple((beta, at(ALPHA, beta)) for beta in BETAS)})


def _encoders(scorers: Sequence[str]) -> Sweep:
    text = [scorer for scorer in scorers if scorer != "attention"]  # the thresholds need scores before the prefill
    return Sweep((FP16, *map(cocktail, [*text, "random"]),
                  *(budget(ENCODER_BITS, scorer) for scorer in [*scorers, "random"])))


def _ablations(scorers: Sequence[str]) -> Sweep:
    whole = [cocktail(scorers[0]), cocktail(scorers[0], "kivi")]
    return Sweep((FP16, *(variant for setting in whole
                          for variant in (setting, without_search(setting), without_reorder(setting)))))


SWEEPS: Mapping[str, Callable[[Sequence[str]], Sweep]] = {
    "chunk": _chunk, "thresholds": _thresholds, "encoders": _encoders, "ablations": _ablations}


def _lines(x: str, log: bool, lines: Mapping[str, Sequence[tuple[float, Setting]]]) -> Sweep:
    settings = dict.fromkeys([FP16, *(setting for line in lines.values() for _, setting in line)])
    return Sweep(tuple(settings), x, tuple((name, tuple((at, setting.name) for at, setting in line))
                                           for name, line in lines.items()), log)


def _named(name: str, setting: Setting, chunk: int) -> Setting:
    return Setting(name, setting.policy, setting.scorer, setting.options, chunk, setting.match)
