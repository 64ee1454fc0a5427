"""The search itself (KVTuner, step 4): NSGA-II over one pair per cluster of layers, most quality for fewest bits.

Quality is minus the mean KL of cocktail.tuning.calibration. Everything lives in a study file, a journal that optuna
appends to: every measurement, and so all that is needed to go on after an interruption. A combination over
the cap, or measured before, is turned down unmeasured and takes no place in the population.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cocktail.tuning.space import Space, pareto
from runtime.errors import TuneError
from runtime.plan import FP16, Tier

POPULATION = 24
BEGUN = 0.25  # of the trials, at least half a population: along the way that the effects of single layers suggest. In
# a space of few combinations less, so that evolution begins with enough unlike ones to reach all of it.
WIDTHS = (2, 3, 4)  # whose losses are measured
MEASURED = (*(Tier(bits, 16) for bits in WIDTHS), *(Tier(16, bits) for bits in WIDTHS))
FINER = 4.0**4  # how many times less 8 bits lose than 4, too little to be measured: the square of the levels' distance
PATIENCE = 40  # generations' worth of draws in a row that bring nothing new, after which the search ends


Losses = dict[int, tuple[float, ...]]  # by width: nats, one per layer


@dataclass(frozen=True)
class Found:
    """One measured combination. bits: mean per value, metadata in. kl: nats."""

    pairs: tuple[Tier, ...]  # one per layer
    bits: float
    kl: float


class Search:
    """A study file and what is in it.

    settings: what the measurements depend on (model, calibration, candidates); a file made under others is refused.
    Raises TuneError.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], seed: int = 0, population: int = POPULATION):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._population, self._states = population, optuna.trial.TrialState
        try:
            storage = JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(study_name="pairs", storage=storage, load_if_exists=True,
                                              directions=["maximize", "minimize"])
            if not self._study.user_attrs:
                self._study.set_user_attr("settings", settings)
        except OSError as error:
            raise TuneError(f"study file {path}: {error.strerror or error}") from error
        except Exception as error:  # a damaged journal fails wherever optuna happens to stumble
            raise TuneError(f"study file {path} cannot be read ({type(error).__name__}: {error}); remove it, or name "
                            "another") from error
        if (recorded := self._study.user_attrs.get("settings")) != settings:
            raise TuneError(f"study file {path} belongs to another search ({_difference(recorded, settings)}); "
                            "remove it, or name another")
        # Another seed after an interruption: the same one would draw the same combinations again.
        self._study.sampler = optuna.samplers.NSGAIISampler(population_size=population,
                                                            seed=seed + len(self._study.trials))

    def found(self) -> list[Found]:
        """Everything measured so far, in order."""
        return [*self._even(), *self._searched()]

    def losses(self, layers: int, measure: Callable[[Sequence[Tier]], float],
               progress: Callable[[int, int], None] | None = None) -> tuple[Losses, Losses]:
        """K's and V's: what each layer costs at each width where all else is exact. progress(done, in all)."""
        found: list[float] = list(self._study.user_attrs.get("losses", ()))
        wanted = [(layer, tier) for tier in MEASURED for layer in range(layers)]
        for layer, tier in wanted[len(found) :]:
            if progress is not None:
                progress(len(found), len(wanted))
            found.append(measure([tier if other == layer else FP16 for other in range(layers)]))
            self._study.set_user_attr("losses", found)
        rows = [tuple(max(loss, 0.0) for loss in found[i : i + layers]) for i in range(0, len(found), layers)]
        k, v = (dict(zip(WIDTHS, rows[half], strict=True)) for half in (slice(0, 3), slice(3, 6)))
        for side in (k, v):
            side[8] = tuple(loss / FINER for loss in side[4])
        return k, v

    def profile(self, measure: Callable[[], npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        """What `measure` gives, errors (L, candidates); measured once."""
        recorded = self._study.user_attrs.get("profile")
        if recorded is not None:
            return np.array(recorded, np.float64)
        errors = measure()
        self._study.set_user_attr("profile", errors.tolist())
        return errors

    def even(self, space: Space, measure: Callable[[Sequence[Tier]], float],
             progress: Callable[[int, int], None] | None = None) -> list[Found]:
        """Every candidate in all layers alike: what the search has to beat. progress(done, in all)."""
        found = self._even()
        for tier in space.candidates[len(found) :]:
            if progress is not None:
                progress(len(found), len(space.candidates))
            pairs = (tier,) * len(space.errors)
            found.append(Found(pairs, space.mean_bits(pairs), measure(pairs)))
            self._study.set_user_attr("even", [_record(each) for each in found])
        return found

    def run(self, space: Space, measure: Callable[[Sequence[Tier]], float], trials: int, max_bits: float,
            progress: Callable[[int, int], None] | None = None) -> None:
        """Measure until the study holds `trials` combinations, or no new ones come up. progress(done, in all)."""
        cheapest = space.mean_bits(space.pairs([choices[0] for choices in space.choices]))
        if cheapest > max_bits:
            raise TuneError(f"the cap is {max_bits:g} bits; expected at least {cheapest:.3f}, which is the cheapest "
                            "pair of every layer")
        if not self._study.get_trials(deepcopy=False):
            suggested = max(self._population // 2, int(BEGUN * min(trials, space.size // 16)))
            for beginning in space.beginnings(suggested, max_bits):
                self._study.enqueue_trial({_name(i): str(tier) for i, tier in enumerate(beginning)})
        known = {each.pairs: each for each in self._even()}
        tried = {each.pairs for each in self._searched()}
        barren = 0
        while len(tried) < min(trials, space.size) and barren < PATIENCE * self._population:
            if progress is not None and not barren:
                progress(len(tried), trials)
            trial = self._study.ask()
            pairs = space.pairs([Tier.parse(trial.suggest_categorical(_name(i), list(map(str, choices))))
                                 for i, choices in enumerate(space.choices)])
            bits = space.mean_bits(pairs)
            if pairs in tried or bits > max_bits:
                self._study.tell(trial, state=self._states.PRUNED)
                barren += 1
                continue
            try:
                each = known.get(pairs) or Found(pairs, bits, measure(pairs))
            except BaseException:  # an interruption too: the next run begins with this combination
                self._study.tell(trial, state=self._states.FAIL)
                self._study.enqueue_trial(trial.params)
                raise
            trial.set_user_attr("found", _record(each))
            self._study.tell(trial, [-each.kl, each.bits])
            tried.add(pairs)
            barren = 0

    def _even(self) -> list[Found]:
        return [_found(data) for data in self._study.user_attrs.get("even", ())]

    def _searched(self) -> list[Found]:
        trials = self._study.get_trials(deepcopy=False, states=[self._states.COMPLETE])
        return [_found(trial.user_attrs["found"]) for trial in trials]


def front(found: Sequence[Found], max_bits: float) -> list[Found]:
    """The trade-offs under the cap: no other has less KL for as many bits. Fewest bits first."""
    under = [each for each in found if each.bits <= max_bits]
    return [under[i] for i in pareto([each.bits for each in under], [each.kl for each in under])]


def _name(cluster: int) -> str:
    return f"cluster {cluster}"


def _record(found: Found) -> dict[str, Any]:
    return {"pairs": [str(pair) for pair in found.pairs], "bits": found.bits, "kl": found.kl}


def _found(data: dict[str, Any]) -> Found:
    return Found(tuple(map(Tier.parse, data["pairs"])), data["bits"], data["kl"])


def _difference(recorded: Any, settings: dict[str, Any]) -> str:
    if not isinstance(recorded, dict):
        return "it records no settings"
    wrong = [f"{name} was {recorded.get(name)!r}, is {settings.get(name)!r}"
             for name in sorted(recorded.keys() | settings.keys()) if recorded.get(name) != settings.get(name)]
    return "; ".join(wrong)
