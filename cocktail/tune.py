"""`python -m cocktail.tune MODEL --text FILE --out pairs.json`: KVTuner's offline search for the widths of each layer.

Reads calibration prompts, measures what each layer's K and V costs at each width by itself, keeps each layer's Pareto
front, clusters layers that are alike, and lets NSGA-II choose one pair per cluster: least mean KL to the FP16 cache for
fewest bits, under a cap. Writes the file that `--pairs` reads (the losses for policy budget, the pairs for the others),
a table and a plot.

The search goes on where it was interrupted: the same command with the same study file. Results go to stdout, progress
to stderr. Exit codes: 0; 2 after an error, which is one line; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from cocktail.cli.arguments import Parser
from cocktail.cli.entry import run_command
from runtime.errors import PromptError, TuneError

if TYPE_CHECKING:
    from cocktail.model import Model
    from cocktail.tuning.calibration import Prompt

RIVAL = "K4V4"  # the cap's default is its bits, and the file's choice takes fewer at no more KL


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; bad arguments exit with 2 at once."""
    return run_command(parser(), _run, arguments, interrupted="interrupted; the same command goes on from here")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m cocktail.tune", description="Find how many bits each layer's K and V need.")
    p.add_argument("model", metavar="MODEL", help=".safetensors file, .index.json of a sharded one, or folder")
    p.add_argument("--out", metavar="FILE", required=True, help="the pairs file to write")
    p.add_argument("--plot", metavar="FILE", help="PNG (default: beside --out)")
    p.add_argument("--study", metavar="FILE", help="what is measured is kept here (default: beside --out)")
    p.add_argument("--quick", action=_Quick, nargs=0, help="--count 3 --trials 24: enough for the losses")

    texts = p.add_argument_group("calibration")
    texts.add_argument("--prompts", metavar="FILE", help='JSON lines {"context", "query", optional "answer"}')
    texts.add_argument("--text", metavar="FILE", help="UTF-8 text to cut prompts from")
    texts.add_argument("--count", metavar="N", type=int, default=9, help="prompts cut from --text (default: 9)")
    texts.add_argument("--tokens", metavar="N", type=int, default=1024,
                       help="of a prompt cut from --text (default: 1024)")
    texts.add_argument("--answer-tokens", metavar="N", type=int, default=24,
                       help="compared per prompt, at most (default: 24)")
    texts.add_argument("--chunk", metavar="TOKENS", type=int, default=32, help="as at run time (default: 32)")
    texts.add_argument("--sink", metavar="N", type=int, help="first chunks that stay FP16 (default: as the policies)")
    texts.add_argument("--seed", metavar="N", type=int, default=0,
                       help="of the text's windows and of the search (default: 0)")

    search = p.add_argument_group("search")
    search.add_argument("--candidates", metavar="LIST", help="pairs to choose from, e.g. K2V2,K4V2,K4V4,K8V8 "
                        "(default: 13 of K2V2 to K8V8)")
    search.add_argument("--profile", choices=("losses", "output"), default="losses",
                        help="what fronts and clusters go by: what a layer alone does to the answer, or the error "
                        "of its attention output, as in KVTuner's paper (default: losses)")
    search.add_argument("--trials", metavar="N", type=int, default=200,
                        help="combinations to measure in all (default: 200)")
    search.add_argument("--population", metavar="N", type=int, help="of a generation (default: 24)")
    search.add_argument("--similar", metavar="FACTOR", type=float,
                        help="layers whose errors differ by less share a choice (default: 1.5)")
    search.add_argument("--max-bits", metavar="BITS", type=float,
                        help=f"cap on mean bits per value (default: those of {RIVAL})")
    search.add_argument("--choose", metavar="BITS", type=float, help="write the best trade-off of at most so many bits "
                        f"(default: the fewest with no more KL than {RIVAL} everywhere)")

    machine = p.add_argument_group("machine")
    machine.add_argument("--backend", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    machine.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: measured)")
    p.add_conventions(quiet="no progress")
    return p


class _Quick(argparse.Action):
    """Later options override it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        namespace.count, namespace.trials = 3, 24


def _run(options: argparse.Namespace) -> None:
    _check(options)
    import numpy as np

    import cocktail
    from cocktail.policies.pairs import LayerLosses, fingerprint
    from cocktail.summary import StageProgress
    from cocktail.tuning import report
    from cocktail.tuning.calibration import calibrate
    from cocktail.tuning.profile import profile
    from cocktail.tuning.search import POPULATION, Search, front
    from cocktail.tuning.space import CANDIDATES, SIMILAR, build_space, pair_bits, parse_candidates
    from runtime.plan import Tier

    candidates, similar = parse_candidates(options.candidates or CANDIDATES), options.similar or SIMILAR
    model = cocktail.load(options.model, backend=options.backend, threads=options.threads)
    config, prompts = model.config, _prompts(options, model)
    identity = {"n_layers": config.n_layers, "n_kv_heads": config.n_kv_heads, "head_dim": config.head_dim,
                "fingerprint": fingerprint(model.engine)}
    max_bits = options.max_bits or pair_bits(Tier.parse(RIVAL), options.chunk, config.head_dim)
    settings = {"model": identity, "prompts": sha256(repr(prompts).encode()).hexdigest()[:16],
                "answer_tokens": options.answer_tokens, "chunk": options.chunk, "sink": options.sink,
                "candidates": [str(tier) for tier in candidates], "similar": similar, "profile": options.profile}
    study = Search(options.study or _beside(options.out, ".study"), settings, options.seed,
                   options.population or POPULATION)

    progress = StageProgress(shown=not options.quiet)
    calibration = calibrate(model, prompts, chunk=options.chunk, answer_tokens=options.answer_tokens,
                            sink=options.sink, progress=progress.of("read"))
    losses = LayerLosses(*study.losses(config.n_layers, calibration.kl, progress.of("layers")), identity, options.out)
    if options.profile == "losses":
        errors = np.sqrt([losses.of(candidates, layer) for layer in range(config.n_layers)])
    else:
        errors = study.profile(lambda: profile(calibration, candidates, progress.of("profile")))
    space = build_space(candidates, errors, options.chunk, config.head_dim, similar)
    print(f"{len(space.clusters)} clusters of {config.n_layers} layers, {space.size:,} combinations; "
          f"cap {max_bits:.3f} bits", file=sys.stderr)
    even = study.even(space, calibration.kl, progress.of("even"))
    study.run(space, calibration.kl, options.trials, max_bits, progress.of("search"))
    progress.close()

    best = front(study.found(), max_bits)
    chosen = report.choose(best, even, options.choose, RIVAL)
    report.write_pairs(options.out, chosen, best, even, losses, calibration.described)
    report.draw(options.plot or _beside(options.out, ".png"), chosen, study.found(), best, even)
    report.print_table(chosen, best, even, space)
    print(f"chosen: {chosen.bits:.3f} bits, KL {chosen.kl:.5f}; written to {options.out}")


def _check(options: argparse.Namespace) -> None:
    """What can be refused before the model is loaded."""
    missing = [name for name in ("optuna", "sklearn", "matplotlib") if not _importable(name)]
    if missing:
        raise TuneError(f"{' and '.join(missing)} cannot be imported; run: pip install 'cocktail-kv[tune]'")
    if (options.prompts is None) == (options.text is None):
        raise PromptError("calibration needs prompts: give one of --prompts and --text")
    for name, low in (("count", 1), ("tokens", 1), ("answer_tokens", 2), ("trials", 1), ("sink", 0), ("seed", 0)):
        if getattr(options, name) is not None and getattr(options, name) < low:
            raise TuneError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least {low}")
    if options.population is not None and options.population < 2:
        raise TuneError(f"--population is {options.population}; expected at least 2")
    for name in ("max_bits", "choose"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise TuneError(f"--{name.replace('_', '-')} is {getattr(options, name):g}; expected bits per value")
    if options.similar is not None and options.similar <= 1:
        raise TuneError(f"--similar is {options.similar:g}; expected a factor above 1")
    for path in filter(None, (options.out, options.plot, options.study)):
        if not Path(path).resolve().parent.is_dir():
            raise TuneError(f"{path}: its folder does not exist")


def _prompts(options: argparse.Namespace, model: Model) -> list[Prompt]:
    from cocktail.tuning.calibration import prompts_of_text, read_prompts, read_text

    if options.prompts is not None:
        return read_prompts(options.prompts)
    return prompts_of_text(model, read_text(options.text), options.count, options.tokens, options.answer_tokens,
                           options.seed)


def _beside(path: str, suffix: str) -> str:
    return str(Path(path).with_suffix(suffix))


def _importable(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
