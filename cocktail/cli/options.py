"""The options of `python -m cocktail.run`, and which of them go together."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from cocktail.cli.arguments import Completion, Parser, at_least, number
from runtime.errors import BackendError, PlanError, PromptError

# Passed on only when given: the API's own defaults rule, and it refuses those that do not go together.
POLICY_OPTIONS = ("kv_bits", "kv_budget", "tiers", "shares", "alpha", "beta", "sink", "tier", "pairs", "pairs_bits",
                  "no_search", "no_reorder", "bits", "residual", "formats", "calibration")
CACHE_OPTIONS = ("policy", "scorer", "pin", *POLICY_OPTIONS)
DOCUMENT_OPTIONS = (*CACHE_OPTIONS, "chunk", "plan_in", "plan_out", "show_plan", "report", "verify")
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

# For --help and completion, which import nothing heavy; the tests hold them to what exists.
POLICIES = ("budget", "cocktail", "uniform", "kvtuner", "kivi", "atom", "kvquant", "fp16")
SCORERS = ("bm25", "attention", "hybrid", "llm-embedder", "endpoint", "library", "random", "none")
FORMATS = ("rotated", "kivi", "kvquant", "atom")


def parser(kind: type[Parser] = Parser) -> argparse.ArgumentParser:
    """Every option; None is what was not given. kind: what becomes of errors."""
    command = "cocktail" if Path(sys.argv[0]).name == "cocktail" else "python -m cocktail.run"
    p = kind(
        prog=command,
        usage=f"{command} MODEL [--context FILE] [--query TEXT ...] [options]",
        description="Answer from a long document whose KV cache keeps each chunk at the precision its relevance earns.",
        epilog="Without --context, --query is completed (in the model's chat template where it has one). Without "
               "--query, a terminal gets a loop: /help lists its commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    p.add_argument("model", metavar="MODEL", help=".safetensors file, .index.json of a sharded one, or folder")

    prompt = p.add_argument_group("prompt")
    prompt.add_argument("--context", metavar="FILE", help="UTF-8 document; - for stdin "
                        "(default: none: complete or chat)")
    prompt.add_argument("--document", metavar="FILE", help="document that --save-document wrote, instead of --context")
    prompt.add_argument("--save-document", metavar="FILE", help="keep the document as it was read, for --document; "
                        "needs no --query")
    prompt.add_argument("--query", "--prompt", metavar="TEXT", action="append", help="question or prompt; - for stdin; "
                        "repeatable: answers as JSON lines (default: a loop on a terminal)")
    prompt.add_argument("--queries", metavar="FILE", help="questions, one a line; - for stdin; answers as JSON lines")
    prompt.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's own)")
    prompt.add_argument("--raw", action="store_true", help="plain completion of --query, no chat template")
    prompt.add_argument("--no-history", action="store_true", help="forget what was typed in the loop when it ends")

    cache = p.add_argument_group("cache (with --context)")
    cache.add_argument("--policy", metavar="NAME", help=f"{', '.join(POLICIES)} (default: budget)")
    cache.add_argument("--scorer", metavar="NAME",
                       help="bm25, attention (the model's own, per layer; budget only), an encoder's folder, "
                       "hybrid:FOLDER, llm-embedder:FOLDER, endpoint:MODEL, library:FOLDER, random, none "
                       "(default: bm25)")
    cache.add_argument("--kv-bits", metavar="BITS", type=number,
                       help="budget: mean bits per context value (default: 3.3)")
    cache.add_argument("--kv-budget", metavar="SIZE", help="budget: bytes of the whole cache, e.g. 200MiB or 1.5GB")
    cache.add_argument("--tiers", metavar="LIST", help="budget: K and V bits, low to high, e.g. K3V2,K4V4,K8V8 "
                       "(default: K2V2 to FP16)")
    cache.add_argument("--shares", metavar="LIST", help="budget: fixed shares of the upper tiers, e.g. 0.1,0.03")
    cache.add_argument("--alpha", metavar="A", type=number,
                       help="cocktail: Eq. 2's share of low precision (default: 0.6)")
    cache.add_argument("--beta", metavar="B", type=number, help="cocktail: Eq. 3's share of FP16 (default: 0.1)")
    cache.add_argument("--no-search", action="store_true", help="cocktail: as many chunks of each width, at random")
    cache.add_argument("--no-reorder", action="store_true", help="cocktail: mixed widths in place, in document order")
    cache.add_argument("--tier", metavar="TIER", help="uniform: K and V bits of every chunk, e.g. K4V2")
    cache.add_argument("--bits", metavar="B", type=at_least(1), help="kivi, kvquant: bits of every code (default: 4)")
    cache.add_argument("--residual", metavar="TOKENS", type=at_least(0), help="kivi: last tokens that stay FP16 "
                       "(default: 128)")
    cache.add_argument("--formats", metavar="NAME", help="cocktail, uniform: what widths below 16 are: rotated, "
                       "kivi (plain min-max), kvquant; uniform also atom (default: rotated)")
    cache.add_argument("--calibration", metavar="FILE", help="kvquant: levels and ranges of this model")
    cache.add_argument("--pairs", metavar="FILE", help="kvtuner: K and V bits of every layer; cocktail: the least of "
                       "every layer; budget: what each layer loses")
    cache.add_argument("--pairs-bits", metavar="BITS", type=number, help="kvtuner, cocktail: the file's best "
                       "trade-off up to so many (default: the file's choice)")
    cache.add_argument("--sink", metavar="N", type=at_least(0),
                       help="first chunks that stay FP16 (default: 0 behind a chat header, else 1)")
    cache.add_argument("--pin", metavar="TEXT", action="append",
                       help="budget, cocktail: chunks that hold this text get the top tier; repeatable")
    cache.add_argument("--chunk", metavar="TOKENS", type=at_least(1), help="tokens per chunk, a multiple of 8 "
                       "(default: 32)")
    cache.add_argument("--plan-in", metavar="FILE", help="use this plan instead of scoring; - for stdin")
    cache.add_argument("--plan-out", metavar="FILE", help="write the plan as JSON")
    cache.add_argument("--show-plan", action="store_true", help="print the plan and a strip of its chunks")

    answer = p.add_argument_group("answer")
    answer.add_argument("--max-tokens", metavar="N", type=at_least(1), help="most tokens to generate (default: 256)")
    answer.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    answer.add_argument("--temperature", metavar="T", type=number, help="0 is greedy (default: 0)")
    answer.add_argument("--top-k", metavar="N", type=at_least(0), help="keep the N best; 0 is off (default: off)")
    answer.add_argument("--top-p", metavar="P", type=number, help="keep the best of mass P; 1 is off (default: off)")
    answer.add_argument("--min-p", metavar="P", type=number, help="keep those above P times the best; 0 is off "
                        "(default: off)")
    answer.add_argument("--repetition-penalty", metavar="R", type=number, help="over prompt and answer; 1 is off "
                        "(default: off)")
    answer.add_argument("--seed", metavar="N", type=at_least(0),
                        help="of sampling, --scorer random and --no-search (default: 0)")
    answer.add_argument("--model-sampling", action="store_true",
                        help="start from the checkpoint's generation_config.json instead of greedy")

    machine = p.add_argument_group("machine")
    machine.add_argument("--backend", choices=("auto", "cpu", "cuda"), default="auto",
                         help="auto is cuda where it can run (default: auto)")
    machine.add_argument("--threads", metavar="N", type=at_least(1), help="CPU threads (default: measured)")
    machine.add_argument("--dry-run", action="store_true",
                         help="with --context and --query: print plan, bytes and least time of a token, run nothing")
    machine.add_argument("--no-graph", action="store_true", help="CUDA: launch every kernel of a step by itself")

    report = p.add_argument_group("report (stderr)")
    report.add_argument("--stats", choices=("table", "json", "none"),
                        help="summary after the answer; json is one line, the last of stderr (default: table; in the "
                        "loop a line)")
    report.add_argument("--verify", nargs="?", const="once", choices=("once", "promote"),
                        help="with --context and --query: compare the answer with the FP16 cache, token by token; "
                        "promote: raise the budget and answer again until the bound holds (default: off)")
    report.add_argument("--verify-kl", metavar="NATS", type=number,
                        help="promote: bound on the mean KL to the FP16 cache (default: 0.01)")
    report.add_argument("--report", metavar="FILE",
                        help="with --context: write an HTML page of what each chunk keeps; all questions of a loop")
    conventions = p.add_conventions(quiet="no progress bar and no table")
    conventions.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), action=Completion,
                             command="cocktail", words={"policy": POLICIES, "scorer": SCORERS, "formats": FORMATS},
                             help="print what that shell needs to complete `cocktail`, and exit")
    return p


def check(options: argparse.Namespace) -> None:
    """Refuses what would otherwise be ignored silently."""
    several = options.queries is not None or len(options.query or ()) > 1
    query = None if several or options.query is None else options.query[0]
    asked = several or query is not None
    _check_document(options, several)
    if options.plan_in is not None and (deciding := given(options, CACHE_OPTIONS)):
        raise PlanError(f"--plan-in already decides what {flag(next(iter(deciding)))} would; give one of them")
    if options.raw and (options.context is not None or options.document is not None or options.system is not None
                        or query is None):
        raise PromptError("--raw completes --query alone; it does not go with a document, --system, several questions "
                          "or the chat loop")
    if [options.context, *(options.query or ()), options.queries, options.plan_in].count("-") > 1:
        raise PromptError("stdin can be read once; only one of --context, --query, --queries and --plan-in can be -")
    if not asked and options.save_document is None and not on_terminal():
        raise PromptError("there is no --query, and without a terminal there is no loop to ask for one")
    if asked and options.no_history:
        raise PromptError("--no-history is about what is typed in the loop; with --query there is none")
    _check_verify(options, asked)
    if options.dry_run and (options.context is None or query is None):
        raise PromptError("--dry-run is about one question to a document; give --context and one --query")
    if query is not None and options.context is None and options.document is None and not query.strip():
        raise PromptError("--query is empty and there is no --context; give one of them")
    if several and options.plan_out is not None:
        raise PlanError("--plan-out writes one plan; with several questions every answer has its own")
    if several and options.stats == "json":
        raise PromptError("--stats json: with several questions every line on stdout has its statistics already")
    if "" in options.stop:
        raise PromptError("--stop is empty; expected the text to stop before")
    if options.backend == "cpu" and options.no_graph:
        raise BackendError("--no-graph is about CUDA graphs; it does not go with --backend cpu")
    for name in ("plan_out", "report", "save_document"):
        if (path := getattr(options, name)) is not None:
            check_output(path, flag(name))


def _check_verify(options: argparse.Namespace, asked: bool) -> None:
    if options.verify_kl is not None and options.verify != "promote":
        raise PlanError("--verify-kl is the bound of --verify promote; give that too")
    if options.verify == "promote" and options.plan_in is not None:
        raise PlanError("--verify promote raises a budget, and --plan-in has none; leave one of them out")
    if options.verify and options.dry_run:
        raise PromptError("--dry-run makes no answer, so there is nothing to --verify; leave one of them out")
    if options.verify and not asked:
        raise PromptError("--verify looks at answers to --query or --queries; give one of them")


def _check_document(options: argparse.Namespace, several: bool) -> None:
    if options.document is not None:
        for name in ("context", "system", "chunk", "save_document"):
            if getattr(options, name) is not None:
                raise PromptError(f"{flag(name)} does not go with --document, whose file holds the document as it was "
                                  "read; give one of them")
    elif options.context is None:
        if shaping := given(options, DOCUMENT_OPTIONS):
            raise PlanError(f"{flag(next(iter(shaping)))} is about a document and its cache; give one with --context")
        if several or options.save_document is not None:
            raise PromptError(f"{'several questions are' if several else '--save-document is'} about a document; give "
                              "one with --context")


def on_terminal() -> bool:
    """Whether there is somebody to type questions and to read answers."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def check_output(path: str, option: str) -> None:
    """Refuses what no file can be written to before any work is done."""
    target = Path(path)
    if not path or target.is_dir():
        raise PlanError(f"{option} {path or 'is empty'}: expected the name of a file, not a folder's")
    if not target.resolve().parent.is_dir():
        raise PlanError(f"{option} {path}: its folder does not exist; make it first")
    if not os.access(target if target.exists() else target.resolve().parent, os.W_OK):
        raise PlanError(f"{option} {path}: may not be written; choose another place")


def given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the names that were given, with their values."""
    values = ((name, getattr(options, name)) for name in names)
    return {name: value for name, value in values if value is not None and value is not False}  # 0 is given


def flag(name: str) -> str:
    """An option's name as the user writes it."""
    return "--" + name.replace("_", "-")
