"""What the options name, read and made: texts, a plan or the policy and scorer to make one, sampling."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail.cli.options import POLICY_OPTIONS, SAMPLING_OPTIONS, flag, given
from runtime.errors import PlanError, PromptError

if TYPE_CHECKING:
    from cocktail import Document, Model
    from runtime.sampler import SamplingParams


def read_text(path: str, option: str) -> str:
    """A file's UTF-8 text, "-" being stdin; a byte order mark is dropped."""
    if not path:
        raise PromptError(f"{option} is empty; expected a file's name, or - for stdin")
    name = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise PromptError(f"{option} {name}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{option} {name} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
                          "convert it, for example with iconv") from None
    if not text.strip():
        raise PromptError(f"{option} {name} is empty; expected text")
    if "\0" in text:
        raise PromptError(f"{option} {name} is no text: byte {data.index(0)} is 0; extract its text first, for example "
                          "with pdftotext")
    return text


def read_queries(options: argparse.Namespace) -> list[str] | None:
    """The questions or the prompt; None where there are none and the user is asked for them."""
    queries = [read_text("-", "--query") if query == "-" else query for query in options.query or ()]
    if options.queries is not None:
        lines = read_text(options.queries, "--queries").splitlines()
        queries += [line.strip() for line in lines if line.strip()]
    return queries or None


def read_document(options: argparse.Namespace, model: Model, context: str | None) -> Document | None:
    """The document that --context or --document names, saved where --save-document says; None without one."""
    if options.document is not None:
        from cocktail import open_document

        document = open_document(options.document, model)
    elif context is not None:
        chunk = {} if options.chunk is None else {"chunk": options.chunk}
        document = model.read(context, system=options.system, keep=_keep(options, model), **chunk)
    else:
        return None
    if options.query is None and options.queries is None:
        document.shape("")  # too long for any question: that should not wait for the first
    check_document(options, document)
    if options.save_document is not None:
        from cocktail.summary import ProgressBar

        with ProgressBar(shown=sys.stderr.isatty() and not options.quiet) as progress:
            document.save(options.save_document, progress)
    return document


def _keep(options: argparse.Namespace, model: Model) -> bool:
    """For one question that is not verified it would only cost a copy."""
    from runtime.master import is_keepable

    if options.save_document is not None:
        return True
    if options.verify:
        return is_keepable(model.config)
    once = options.queries is None and len(options.query or ()) == 1
    return not once and is_keepable(model.config)


def cache_options(options: argparse.Namespace) -> dict[str, Any]:
    """The policy and scorer, or the plan, made before the model is loaded: what is wrong with them shows at once."""
    if options.plan_in is not None:
        from runtime.plan import Plan

        text = read_text(options.plan_in, "--plan-in")
        try:
            return {"plan": Plan.from_json(text)}
        except PlanError as error:
            raise PlanError(f"--plan-in {options.plan_in}: {error}") from error
    from cocktail.policies import DEFAULT_POLICY, load_policy
    from cocktail.scorers import load_scorer
    from cocktail.scorers.attention import AttentionScorer

    seeded = ("seed",) if options.no_search else ()
    policy = load_policy(DEFAULT_POLICY if options.policy is None else options.policy,
                         **given(options, (*POLICY_OPTIONS, *seeded)))
    chosen: dict[str, Any] = {"policy": policy}
    if options.pin is not None:
        policy.pinned(())  # refuses where it cannot
        chosen["pin"] = options.pin
    if options.scorer is None:
        return chosen
    if not policy.uses_scores:
        raise PlanError(f"policy {policy.name} looks at no scores; leave --scorer out")
    seed = {"seed": options.seed} if options.scorer == "random" and options.seed is not None else {}
    device = "cpu" if options.backend == "cpu" else None
    scorer = load_scorer(options.scorer, device=device, threads=options.threads, **seed)
    if isinstance(scorer, AttentionScorer):
        scorer.checked(policy)
    return chosen | {"scorer": scorer}


def check_model(options: argparse.Namespace, model: Model) -> None:
    """Refuses what a model without a chat template has no place for."""
    if model.template is None and options.context is None and options.document is None and not options.raw:
        if options.system is not None:
            raise PromptError("--system: this model has no chat template to put it into; make it part of --query")
        if options.query is None:
            raise PromptError("this model has no chat template, so it cannot chat; give --query, which it completes, "
                              "or --context")


def check_document(options: argparse.Namespace, document: Document) -> None:
    """Refuses what the document is too short for."""
    if options.sink is not None and options.sink > document.n_chunks:
        raise PlanError(f"--sink is {options.sink}; the document has {document.n_chunks} whole chunks of "
                        f"{document.chunk} tokens")


def sampling_options(options: argparse.Namespace, model: Model) -> SamplingParams:
    """Greedy unless asked: --model-sampling takes the checkpoint's defaults, single options override either."""
    from runtime.sampler import SamplingParams

    values: dict[str, Any] = {}
    if options.model_sampling:
        generation = model.config.generation
        values = {name: generation[name] for name in SAMPLING_OPTIONS if name in generation}
        # As in transformers: without do_sample the checkpoint is greedy, whatever temperature it names.
        values["temperature"] = values.get("temperature", 1.0) if generation.get("do_sample") else 0.0
    chosen = given(options, SAMPLING_OPTIONS)
    params = SamplingParams(**values | chosen)
    if params.temperature == 0.0:
        for name in ("top_k", "top_p", "min_p"):
            if name in chosen:
                raise PromptError(f"{flag(name)} changes nothing at temperature 0 (greedy); add --temperature")
    return params
