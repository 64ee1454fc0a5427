"""The paper's sweeps: chunk size (Table III), alpha and beta (Fig. 7), encoders (Table IV), ablations (Table V).

Each is a list of settings, measured as those of the main table are, which of them are held against which, and lines to
plot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.quality_settings import DEFAULT_CHUNK, FP16, Setting, budget, cocktail, without_reorder, without_search

CHUNKS = (8, 16, 32, 64, 128, 256)
CHUNK_BITS = {3.3: CHUNKS[1:], 4.5: CHUNKS}  # with chunks of 32; beside them the sizes that can take as few bytes
ALPHAS, BETAS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8), (0.02, 0.05, 0.1, 0.2, 0.3)
ALPHA, BETA = 0.6, 0.1  # where the other one is varied: the paper's
ENCODER_BITS = 3.3
Points = tuple[tuple[float, Setting], ...]


@dataclass(frozen=True)
class Sweep:
    """beside: names of settings, each with that of the one it is held against. lines: by name, what is plotted against
    x and the settings' names; empty where x is no number."""

    settings: tuple[Setting, ...]
    beside: tuple[tuple[str, str], ...]
    x: str = ""
    lines: tuple[tuple[str, tuple[tuple[float, str], ...]], ...] = ()
    log: bool = False


def sweep_of(name: str, scorers: Sequence[str]) -> Sweep:
    """The sweep of that name (SWEEPS); scorers: those that can be used, the paper's kind first ("encoder")."""
    return SWEEPS[name](scorers)


def _chunk(scorers: Sequence[str]) -> Sweep:
    """The thresholds, whose bits depend on the size of chunks, and budgets of the same bytes at every size."""
    scorer = scorers[0]
    lines = {f"cocktail/{scorer}": (DEFAULT_CHUNK, tuple((n, _sized(cocktail(scorer), n)) for n in CHUNKS))}
    for bits, chunks in CHUNK_BITS.items():
        lines[f"budget/{scorer}, the bytes of {bits:g} bits with chunks of {DEFAULT_CHUNK}"] = (
            DEFAULT_CHUNK, tuple((n, _same_bytes(budget(bits, scorer), n)) for n in chunks))
    return _lines("tokens per chunk", True, lines)


def _thresholds(scorers: Sequence[str]) -> Sweep:
    scorer = scorers[0]

    def at(alpha: float, beta: float) -> Setting:
        name = f"cocktail/{scorer}, alpha {alpha:g}, beta {beta:g}"
        return Setting.of(name, "cocktail", scorer, alpha=alpha, beta=beta)

    return _lines("alpha or beta", False, {
        f"alpha, beta {BETA:g}": (ALPHA, tuple((alpha, at(alpha, BETA)) for alpha in ALPHAS)),
        f"beta, alpha {ALPHA:g}": (BETA, tuple((beta, at(ALPHA, beta)) for beta in BETAS))})


def _encoders(scorers: Sequence[str]) -> Sweep:
    text = [scorer for scorer in scorers if scorer != "attention"]  # the thresholds need scores before the prefill
    first, *others = map(cocktail, [*text, "random"])
    first_budget, *other_budgets = (budget(ENCODER_BITS, scorer) for scorer in [*scorers, "random"])
    return Sweep((FP16, first, *others, first_budget, *other_budgets),
                 (*((other.name, first.name) for other in others),
                  *((other.name, first_budget.name) for other in other_budgets)))


def _ablations(scorers: Sequence[str]) -> Sweep:
    whole = [cocktail(scorers[0]), cocktail(scorers[0], "kivi")]
    parts = [(part(setting), setting) for setting in whole for part in (without_search, without_reorder)]
    settings = dict.fromkeys(setting for pair in parts for setting in reversed(pair))
    return Sweep((FP16, *settings), tuple((part.name, setting.name) for part, setting in parts))


SWEEPS: Mapping[str, Callable[[Sequence[str]], Sweep]] = {
    "chunk": _chunk, "thresholds": _thresholds, "encoders": _encoders, "ablations": _ablations}


def _lines(x: str, log: bool, lines: Mapping[str, tuple[float, Points]]) -> Sweep:
    """lines: by name, where on x the setting is that the line's others are held against; and the points."""
    settings = dict.fromkeys([FP16, *(setting for _, points in lines.values() for _, setting in points)])
    beside = tuple((setting.name, dict(points)[own].name) for own, points in lines.values()
                   for at, setting in points if at != own)
    return Sweep(tuple(settings), beside, x, tuple((name, tuple((at, setting.name) for at, setting in points))
                                                   for name, (_, points) in lines.items()), log)


def _sized(setting: Setting, chunk: int) -> Setting:
    return replace(setting, name=f"{setting.name}, chunk {chunk}", chunk=chunk)


def _same_bytes(setting: Setting, chunk: int) -> Setting:
    like = _sized(setting, DEFAULT_CHUNK)
    return like if chunk == DEFAULT_CHUNK else replace(_sized(setting, chunk), options=(), match=like.name)
