"""What bench.quality runs: every row of its tables as a Setting, in groups that can be chosen or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cocktail.chunks import DEFAULT_CHUNK

PAIRS = ("K8V8", "K8V4", "K4V4", "K4V3", "K4V2", "K3V3", "K3V2", "K2V2")
BITS = (2.4, 2.6, 2.8, 3.0, 3.3, 3.55, 3.8, 4.2, 4.7, 5.2)  # of the budget's curves; 2.39 is the demo model's least
COMPARED_BITS = (3.3, 3.8)  # where every scorer is run
PAIRS_BITS = (2.9, 3.2, 3.7)  # of trade-offs in the pairs file, beside its own choice
RELEVANCE = ("bm25", "encoder", "hybrid", "attention")  # what knows the question
CURVE = "hybrid"  # the scorer of the budget's curve that goals are held against
OWN_CURVE = "attention"  # of a second one, where a pairs file is there: no encoder, each layer ranks anew
CONTROLS = ("random", "oracle", "anti-oracle")
BUDGETS = ("budget", "budget+pairs")  # how names begin, without and with a file
GROUPS = ("uniform", "kivi", "atom", "kvquant", "kvtuner", "cocktail", "cocktail-kivi", "budget", "matched")


@dataclass(frozen=True)
class Setting:
    """One row. name: unique; options: of the policy; chunk: tokens.

    match: the name of another setting: a budget of exactly its bits per value, prompt by prompt. Where its chunks are
        of another size, and so its FP16 tail too, which those bits leave out: of the bytes of its whole cache.
    """

    name: str
    policy: str
    scorer: str = "none"
    options: tuple[tuple[str, Any], ...] = ()
    chunk: int = DEFAULT_CHUNK
    match: str | None = None

    @classmethod
    def of(cls, name: str, policy: str, scorer: str = "none", *, chunk: int = DEFAULT_CHUNK,
           match: str | None = None, **options: Any) -> Setting:
        return cls(name, policy, scorer, tuple(options.items()), chunk, match)

    @property
    def kv_bits(self) -> float | None:
        """Of a budget that is given in bits."""
        return dict(self.options).get("kv_bits")


FP16 = Setting.of("fp16", "fp16")


@dataclass(frozen=True)
class Choice:
    """What the command line says of the settings. scorers: those that are there; pairs, calibration: files. With pairs,
    which hold each layer's losses, the budget goes by them wherever it is compared."""

    groups: tuple[str, ...] = GROUPS
    scorers: tuple[str, ...] = (*RELEVANCE, *CONTROLS)
    bits: tuple[float, ...] = BITS
    pairs: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        for group, file, option, command in (
                ("kvtuner", self.pairs, "--pairs", "python -m cocktail.tune"),
                ("kvquant", self.calibration, "--calibration", "python -m cocktail.calibrate kvquant")):
            if group in self.groups and file is None:
                raise SystemExit(f"{group} reads a file: give {option} FILE, made by {command}, or --without {group}")


def main_settings(choice: Choice) -> list[Setting]:
    """The rows of the main table, FP16 first; those of a group are left out with it."""
    chosen = [setting for group in choice.groups if group != "matched" for setting in _GROUPS[group](choice)]
    if "matched" in choice.groups:
        chosen += [matched for setting in chosen if _is_baseline(setting) for matched in _matched(setting, choice)]
    return [FP16, *(setting for setting in chosen if setting.scorer in ("none", *choice.scorers))]


def without_search(setting: Setting) -> Setting:
    """The same proportions on random chunks (paper, Table V, without module I)."""
    return replace(setting, name=f"{setting.name}, no search", options=(*setting.options, ("no_search", True)))


def without_reorder(setting: Setting) -> Setting:
    """Widths mixed in place (paper, Table V, without module II)."""
    return replace(setting, name=f"{setting.name}, no reorder", options=(*setting.options, ("no_reorder", True)))


def cocktail(scorer: str, formats: str = "rotated", **options: Any) -> Setting:
    """The paper's thresholds; formats "kivi" is plain min-max."""
    if formats == "rotated":
        return Setting.of(f"cocktail/{scorer}", "cocktail", scorer, **options)
    return Setting.of(f"cocktail-{formats}/{scorer}", "cocktail", scorer, formats=formats, **options)


def budget(kv_bits: float, scorer: str, pairs: str | None = None) -> Setting:
    options = {"kv_bits": kv_bits} | ({} if pairs is None else {"pairs": pairs})
    return Setting.of(f"{BUDGETS[pairs is not None]}@{kv_bits:g}/{scorer}", "budget", scorer, **options)


def _uniform(choice: Choice) -> Iterator[Setting]:
    for pair in PAIRS:
        yield Setting.of(f"uniform {pair}", "uniform", tier=pair)


def _kivi(choice: Choice) -> Iterator[Setting]:
    for bits in (4, 2):
        yield Setting.of(f"kivi-{bits}", "kivi", bits=bits)


def _atom(choice: Choice) -> Iterator[Setting]:
    yield Setting.of("atom", "atom")


def _kvquant(choice: Choice) -> Iterator[Setting]:
    for bits in (4, 3, 2):
        yield Setting.of(f"kvquant-{bits}", "kvquant", bits=bits, calibration=choice.calibration)


def _kvtuner(choice: Choice) -> Iterator[Setting]:
    yield Setting.of("kvtuner", "kvtuner", pairs=choice.pairs)
    for bits in PAIRS_BITS:
        yield Setting.of(f"kvtuner@{bits:g}", "kvtuner", pairs=choice.pairs, pairs_bits=bits)


def _cocktail(choice: Choice) -> Iterator[Setting]:
    for scorer in ("bm25", "encoder", "hybrid"):
        yield cocktail(scorer)
    yield without_search(cocktail("encoder"))
    yield without_search(cocktail("hybrid"))


def _cocktail_kivi(choice: Choice) -> Iterator[Setting]:
    yield cocktail("encoder", "kivi")
    yield without_search(cocktail("encoder", "kivi"))


def _budget(choice: Choice) -> Iterator[Setting]:
    curves = [(CURVE, None)] + [(scorer, choice.pairs) for scorer in (CURVE, OWN_CURVE) if choice.pairs]
    for scorer, pairs in curves:
        for bits in choice.bits:
            yield budget(bits, scorer, pairs)
    for bits in COMPARED_BITS:
        for scorer in (*RELEVANCE, *CONTROLS):
            if (scorer, choice.pairs) not in curves and bits in choice.bits:
                yield budget(bits, scorer, choice.pairs)


def _is_baseline(setting: Setting) -> bool:
    return setting.policy in ("kivi", "atom", "kvquant", "kvtuner") or (
        setting.policy == "cocktail" and "no_search" not in dict(setting.options))


def _matched(setting: Setting, choice: Choice) -> Iterator[Setting]:
    """The budget at that setting's bytes, with its scorer where it has one; beside kvtuner also without pairs."""
    scorer = CURVE if setting.scorer == "none" else setting.scorer
    for pairs in dict.fromkeys((None, choice.pairs) if setting.policy == "kvtuner" else (choice.pairs,)):
        options = {} if pairs is None else {"pairs": pairs}
        yield Setting.of(f"{BUDGETS[pairs is not None]}/{scorer} = {setting.name}", "budget", scorer,
                         match=setting.name, **options)


_GROUPS: dict[str, Callable[[Choice], Iterator[Setting]]] = {
    "uniform": _uniform, "kivi": _kivi, "atom": _atom, "kvquant": _kvquant, "kvtuner": _kvtuner,
    "cocktail": _cocktail, "cocktail-kivi": _cocktail_kivi, "budget": _budget}


def names(settings: Sequence[Setting]) -> list[str]:
    return [setting.name for setting in settings]
