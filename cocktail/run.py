"""`python -m cocktail.run MODEL --context FILE --query TEXT`: ask about a document, complete a prompt, or chat.

The answer goes to stdout as it is generated, everything else to stderr. Exit codes: 0; 2 after an error, which is one
line `error: ...`; 130 after Ctrl-C, with what was generated until then; 141 when nobody reads stdout any more.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runtime.errors import CocktailError, PlanError, PromptError

# Heavy imports (numpy, cocktail.load, rich) wait until the arguments are known to be good: --help must be instant.
if TYPE_CHECKING:
    from cocktail import Answer, AnswerStream, Model
    from runtime.sampler import SamplingParams

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell reports them

# Passed on only when given: the API's own defaults rule, and it refuses those that do not go together.
POLICY_OPTIONS = ("kv_bits", "kv_budget", "tiers", "shares", "alpha", "beta", "sink", "tier", "pairs", "pairs_bits",
                  "no_search", "no_reorder", "bits", "residual", "formats", "calibration")
CACHE_OPTIONS = ("policy", "scorer", *POLICY_OPTIONS)
DOCUMENT_OPTIONS = (*CACHE_OPTIONS, "chunk", "plan_in", "plan_out", "show_plan")
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; bad arguments exit with 2 at once."""
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print("warning:", message, file=sys.stderr)
            code = _run(options)
        sys.stdout.flush()
    except CocktailError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `... | head -1`: quiet, also when the interpreter flushes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def parser() -> argparse.ArgumentParser:
    """Every option; None is what was not given."""
    p = _Parser(
        prog="python -m cocktail.run", allow_abbrev=False, add_help=False,
        usage="python -m cocktail.run MODEL [--context FILE] [--query TEXT] [options]",
        description="Answer from a long document whose KV cache keeps each chunk at the precision its relevance earns.",
        epilog="Without --context, --query is completed (in the model's chat template where it has one). Without "
               "--query, a terminal gets a loop: Ctrl-C stops an answer, Ctrl-D leaves.")
    p.add_argument("model", metavar="MODEL", help=".safetensors file, .index.json of a sharded one, or folder")

    prompt = p.add_argument_group("prompt")
    prompt.add_argument("--context", metavar="FILE", help="UTF-8 document; - for stdin")
    prompt.add_argument("--query", "--prompt", metavar="TEXT", help="question or prompt; - for stdin")
    prompt.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    prompt.add_argument("--raw", action="store_true", help="plain completion of --query, no chat template")

    cache = p.add_argument_group("cache (with --context)")
    cache.add_argument("--policy", metavar="NAME", help="budget (default), cocktail (the paper's thresholds), uniform, "
                       "kvtuner, kivi, atom, kvquant or fp16")
    cache.add_argument("--scorer", metavar="NAME",
                       help="bm25 (default), attention (the model's own, per layer; budget only), an encoder's folder, "
                       "hybrid:FOLDER, llm-embedder:FOLDER, endpoint:MODEL, library:FOLDER, random or none")
    cache.add_argument("--kv-bits", metavar="BITS", type=_number, help="budget: mean bits per context value (3.3)")
    cache.add_argument("--kv-budget", metavar="SIZE", help="budget: bytes of the whole cache, e.g. 200MiB or 1.5GB")
    cache.add_argument("--tiers", metavar="LIST", help="budget: K and V bits, low to high, e.g. K3V2,K4V4,K8V8")
    cache.add_argument("--shares", metavar="LIST", help="budget: fixed shares of the upper tiers, e.g. 0.1,0.03")
    cache.add_argument("--alpha", metavar="A", type=_number, help="cocktail: Eq. 2's share of low precision (0.6)")
    cache.add_argument("--beta", metavar="B", type=_number, help="cocktail: Eq. 3's share of FP16 (0.1)")
    cache.add_argument("--no-search", action="store_true", help="cocktail: as many chunks of each width, at random")
    cache.add_argument("--no-reorder", action="store_true", help="cocktail: mixed widths in place, in document order")
    cache.add_argument("--tier", metavar="TIER", help="uniform: K and V bits of every chunk, e.g. K4V2")
    cache.add_argument("--bits", metavar="B", type=_at_least(1), help="kivi, kvquant: bits of every code (4)")
    cache.add_argument("--residual", metavar="TOKENS", type=_at_least(0), help="kivi: last tokens that stay FP16 (128)")
    cache.add_argument("--formats", metavar="NAME", help="cocktail, uniform: what widths below 16 are: rotated "
                       "(default), kivi (plain min-max), kvquant; uniform also atom")
    cache.add_argument("--calibration", metavar="FILE", help="kvquant: levels and ranges of this model")
    cache.add_argument("--pairs", metavar="FILE", help="kvtuner: K and V bits of every layer; cocktail and budget: "
                       "the least of every layer")
    cache.add_argument("--pairs-bits", metavar="BITS", type=_number, help="the file's best trade-off up to so many")
    cache.add_argument("--sink", metavar="N", type=_at_least(0),
                       help="first chunks that stay FP16 (0 behind a chat header, else 1)")
    cache.add_argument("--chunk", metavar="TOKENS", type=_at_least(1), help="tokens per chunk, a multiple of 8 (32)")
    cache.add_argument("--plan-in", metavar="FILE", help="use this plan instead of scoring; - for stdin")
    cache.add_argument("--plan-out", metavar="FILE", help="write the plan as JSON")
    cache.add_argument("--show-plan", action="store_true", help="print the plan and a map of its chunks")

    answer = p.add_argument_group("answer")
    answer.add_argument("--max-tokens", metavar="N", type=_at_least(1), help="most tokens to generate (256)")
    answer.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    answer.add_argument("--temperature", metavar="T", type=_number, help="0 is greedy (default)")
    answer.add_argument("--top-k", metavar="N", type=_at_least(0), help="0 is off (default)")
    answer.add_argument("--top-p", metavar="P", type=_number, help="1 is off (default)")
    answer.add_argument("--min-p", metavar="P", type=_number, help="0 is off (default)")
    answer.add_argument("--repetition-penalty", metavar="R", type=_number, help="1 is off (default)")
    answer.add_argument("--seed", metavar="N", type=_at_least(0),
                        help="of sampling, --scorer random and --no-search (0)")
    answer.add_argument("--model-sampling", action="store_true",
                        help="start from the checkpoint's generation_config.json instead of greedy")

    machine = p.add_argument_group("machine")
    machine.add_argument("--backend", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    machine.add_argument("--threads", metavar="N", type=_at_least(1), help="CPU threads (default: measured choice)")

    machine.add_argument("--no-graph", action="store_true", help="CUDA: launch every kernel of a step by itself")

    report = p.add_argument_group("report (stderr)")
    report.add_argument("--stats", choices=("table", "json", "none"), default="table",
                        help="summary after the answer; json is one line, the last of stderr (default: table)")
    report.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    report.add_argument("--version", action=_Version, help="print the version and exit")
    report.add_argument("-h", "--help", action="help", help="print this and exit")
    return p


def _run(options: argparse.Namespace) -> int:
    _check(options)
    # Inputs are read before the model: a wrong path should not cost a load.
    context = _read(options.context, "--context") if options.context is not None else None
    query = _read("-", "--query") if options.query == "-" else options.query
    cache = _cache_options(options) if context is not None else {}

    import cocktail

    _survive_any_text()
    model = cocktail.load(options.model, backend=options.backend, threads=options.threads,
                          graph=not options.no_graph)
    common: dict[str, Any] = {"sampling": _sampling(options, model), "stop": tuple(options.stop), "stream": True}
    if options.max_tokens is not None:
        common["max_tokens"] = options.max_tokens

    if context is not None:
        chunk = {} if options.chunk is None else {"chunk": options.chunk}
        document = model.read(context, system=options.system, **chunk)

        def ask(text: str) -> int:
            return _report(_stream(lambda progress: document.ask(text, progress=progress, **cache, **common), options),
                           options)

        return _loop(ask) if query is None else ask(query)
    if query is None:
        return _loop(_chat(model, options, common))
    prompt: str | list[dict[str, str]] = query
    if options.system is not None:
        prompt = [*_system(options), {"role": "user", "content": query}]
    return _report(_stream(lambda progress: model.generate(prompt, raw=options.raw, progress=progress, **common),
                           options), options)


def _chat(model: Model, options: argparse.Namespace, common: dict[str, Any]) -> Callable[[str], int]:
    history = _system(options)

    def turn(text: str) -> int:
        messages = [*history, {"role": "user", "content": text}]
        answer = _stream(lambda progress: model.generate(messages, progress=progress, **common), options)
        history[:] = [*messages, {"role": "assistant", "content": answer.text}]  # a failed turn leaves no trace
        return _report(answer, options)

    return turn


def _loop(turn: Callable[[str], int]) -> int:
    """One turn per line of a terminal, until Ctrl-D. Errors and Ctrl-C end a turn, not the loop."""
    import readline  # noqa: F401  (gives input() its line editing and history)

    while True:
        try:
            line = input("> ")
            if line.strip():
                turn(line)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
        except CocktailError as error:
            print("error:", error, file=sys.stderr)


def _stream(start: Callable[[Any], AnswerStream], options: argparse.Namespace) -> Answer:
    """Prints the pieces of an answer as they come, under a progress bar until the first."""
    from cocktail.summary import ProgressBar

    last = ""
    with ProgressBar(shown=sys.stderr.isatty() and not options.quiet) as progress:
        stream = start(progress)
        try:
            for piece in stream:
                progress.close()  # before the first piece: both may share one terminal
                print(piece, end="", flush=True)
                last = piece or last
        except KeyboardInterrupt:
            if stream.plan is None:
                raise  # before all chunks were scored: there is nothing to report
            stream.close()  # it came between two pieces; the stream itself ends cleanly on one within a piece
    if last and not last.endswith("\n"):
        print(flush=True)
    return stream.answer


def _report(answer: Answer, options: argparse.Namespace) -> int:
    """Writes the plan and the summary that were asked for; returns the exit code."""
    from cocktail import summary

    if options.plan_out is not None:
        _write(options.plan_out, answer.plan.to_json() + "\n")
    if options.show_plan:
        print(f"\n{answer.plan.table()}\n{summary.plan_map(answer.plan)}", file=sys.stderr)
    if options.stats == "json":
        print(summary.json_line(answer), file=sys.stderr)
    elif options.stats == "table" and not options.quiet:
        print(f"\n{summary.table(answer)}", file=sys.stderr)
    return INTERRUPTED if answer.finish_reason == "interrupted" else 0


# Options -----------------------------------------------------------------------------------------------------------

def _check(options: argparse.Namespace) -> None:
    """Refuses what would otherwise be ignored silently."""
    if options.context is None and (given := _given(options, DOCUMENT_OPTIONS)):
        raise PlanError(f"{_flag(next(iter(given)))} shapes the cache of a document; give one with --context")
    if options.plan_in is not None and (given := _given(options, CACHE_OPTIONS)):
        raise PlanError(f"--plan-in already decides what {_flag(next(iter(given)))} would; give one of them")
    if options.raw and (options.context is not None or options.system is not None or options.query is None):
        raise PromptError("--raw completes --query alone; it does not go with --context, --system or the chat loop")
    if [options.context, options.query, options.plan_in].count("-") > 1:
        raise PromptError("stdin can be read once; only one of --context, --query and --plan-in can be -")
    if options.query is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise PromptError("there is no --query, and without a terminal there is no loop to ask for one")
    if options.query is not None and options.context is None and not options.query.strip():
        raise PromptError("--query is empty and there is no --context; give one of them")
    if "" in options.stop:
        raise PromptError("--stop is empty; expected the text to stop before")
    if options.plan_out is not None and not Path(options.plan_out).resolve().parent.is_dir():
        raise PlanError(f"--plan-out {options.plan_out}: its folder does not exist")


def _given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    values = ((name, getattr(options, name)) for name in names)
    return {name: value for name, value in values if value is not None and value is not False}  # 0 is given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _cache_options(options: argparse.Namespace) -> dict[str, Any]:
    """The policy and scorer, or the plan, made before the model is loaded: what is wrong with them shows at once."""
    if options.plan_in is not None:
        from runtime.plan import Plan

        return {"plan": Plan.from_json(_read(options.plan_in, "--plan-in"))}
    from cocktail.policies import DEFAULT_POLICY, load_policy
    from cocktail.scorers import load_scorer
    from cocktail.scorers.attention import AttentionScorer

    seeded = ("seed",) if options.no_search else ()
    policy = load_policy(options.policy or DEFAULT_POLICY, **_given(options, (*POLICY_OPTIONS, *seeded)))
    if options.scorer is None:
        return {"policy": policy}
    if not policy.uses_scores:
        raise PlanError(f"policy {policy.name} looks at no scores; leave --scorer out")
    seed = {"seed": options.seed} if options.scorer == "random" and options.seed is not None else {}
    scorer = load_scorer(options.scorer, **seed)
    if isinstance(scorer, AttentionScorer):
        scorer.checked(policy)
    return {"policy": policy, "scorer": scorer}


def _system(options: argparse.Namespace) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _sampling(options: argparse.Namespace, model: Model) -> SamplingParams:
    """Greedy unless asked: --model-sampling takes the checkpoint's defaults, single options override either."""
    from runtime.sampler import SamplingParams

    values: dict[str, Any] = {}
    if options.model_sampling:
        generation = model.config.generation
        values = {name: generation[name] for name in SAMPLING_OPTIONS if name in generation}
        # As in transformers: without do_sample the checkpoint is greedy, whatever temperature it names.
        values["temperature"] = values.get("temperature", 1.0) if generation.get("do_sample") else 0.0
    given = _given(options, SAMPLING_OPTIONS)
    params = SamplingParams(**values | given)
    if params.temperature == 0.0:
        for name in ("top_k", "top_p", "min_p"):
            if name in given:
                raise PromptError(f"{_flag(name)} changes nothing at temperature 0 (greedy); add --temperature")
    return params


# Text in and out ---------------------------------------------------------------------------------------------------

def _read(path: str, flag: str) -> str:
    """A file's UTF-8 text, "-" being stdin; a byte order mark is dropped."""
    name = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise PromptError(f"{flag} {name}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{flag} {name} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
                          "convert it, for example with iconv") from None
    if not text.strip():
        raise PromptError(f"{flag} {name} is empty")
    return text


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"--plan-out {path}: {error.strerror or error}") from error


def _survive_any_text() -> None:
    """A model may write what the terminal's encoding cannot show; that should not end the answer."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# Argument types ----------------------------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


class _Version(argparse.Action):
    """Looks the version up only when asked: importlib.metadata is slow to import."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("cocktail-kv")
        except PackageNotFoundError:
            number = "(not installed)"
        print("cocktail-kv", number)
        parser.exit()


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least {low}")
        return value

    return parse


def _number(text: str) -> float:
    """A finite number of at least 0; tighter bounds are the API's."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of at least 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
