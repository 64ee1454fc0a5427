"""A 7B model's whole job on the GPU against its floors and transformers. `python -m bench.shapes --shape llama-2-7b`

`bench.prefill`, `bench.decode` and `bench.memory` with --shape, or with --backend cuda for a checkpoint, show a part of
it. Weights are random where a shape is named and made once; a short prompt first has the kernels compiled.

    TTFT    from the call of read() to the first id: buffers, prefill, packing, sampling; the median of the rounds.
            floor: multiply-adds of the prompt over the rate of an FP16 matrix product in this run
    pack    device time around packing, within those prefills
    score   each scorer by itself, and its TTFT where chunks are scored behind the first layer: `wait` is the time for
            which the device stood still then. Scorers and encoders: bench.scoring. `attention` is the model's own, in
            every layer: its kernels count as waited for
    TPOT    median decode step, as the caller sees it.
            floor: weights and cache once, over the best read rate of this run: of a copy, a sum, a matrix-vector kernel
    memory  what the driver gave since before the weights: pool, cuBLAS and graphs count, the context does not.
            floor: weights, packed cache, one layer's FP16 K and V, the hidden states and one tile's activations
    --peers transformers with the same sizes in the same run, once our weights are gone (bench.peer_transformers)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from bench.gpu import (
    POLICIES,
    PREFIX,
    SHAPES,
    SUFFIX,
    WARM_STEPS,
    Case,
    loaded_model,
    measure_rates,
    plan_of,
    prompt_of,
    random_model,
    read_rate,
    release,
    run_case,
    shape_of,
)
from bench.report import DEFAULT_MODEL, describe_run, emit, print_table, progress, some_of, verdict
from bench.scoring import LIBRARY, QUERY, SCORERS, check_scorers, chunk_texts, make_scorer, score_seconds
from cocktail.policies import load_policy
from cocktail.scorers.attention import AttentionScorer, query_rows
from kernels_cu.backend import CudaBackend
from runtime.engine import PendingPlan
from runtime.model import Model

if TYPE_CHECKING:
    from bench.peer_transformers import Figures

FIGURES = ("TTFT", "TPOT", "memory")
ATTENTION = AttentionScorer.name
ROUNDS, STEPS = 2, 48
PEER_STEPS = 8
MIX_OPTIONS: dict[str, Any] = {"tiers": "K3V2,K4V4,FP16", "shares": (0.15, 0.05)}  # the mix as a policy

TPOT_FACTOR = {"fp16": 1.08, "mix": 1.18}  # goal: at most so many times the floor
PACK_SHARE = 0.05  # goal: of TTFT, at most
# Goals of one card at 32K, and what llama.cpp reached on such a card, which is not run here.
CARD, CARD_TOKENS = "H100 80GB", 32768
GOALS = {
    ("llama-2-7b", "depth 0", "TPOT"): 5.3, ("llama-2-7b", "fp16", "TTFT"): 1.52, ("llama-2-7b", "mix", "TTFT"): 1.52,
    ("llama-2-7b", "mix", "memory"): 18.0, ("mistral-7b", "fp16", "TPOT"): 6.9, ("mistral-7b", "mix", "TPOT"): 6.2,
}  # ms, s, GiB
LLAMA_CPP = {
    ("llama-2-7b", "depth 0", "TPOT"): "5.6", ("llama-2-7b", "fp16", "TTFT"): "6.3",
    ("llama-2-7b", "fp16", "TPOT"): "11.4", ("llama-2-7b", "mix", "TPOT"): "10.7 (q4_0)",
    ("mistral-7b", "depth 0", "TPOT"): "5.8", ("mistral-7b", "fp16", "TTFT"): "2.4",
    ("mistral-7b", "fp16", "TPOT"): "8.0", ("mistral-7b", "mix", "TPOT"): "10.6 (q4_0)",
}
PEER_CACHES = {"fp16": ("FP16",), "mix": ("quanto 4-bit", "quanto 2-bit")}  # beside which of ours
Peers = dict[str, "Figures | str"]  # by cache; text says why there is no figure


def main(arguments: Sequence[str] | None = None, figures: Sequence[str] = FIGURES, command: str = "shapes") -> None:
    args = _arguments(arguments, figures, command)
    check_scorers(args.scorers)
    backend = CudaBackend()
    rates = measure_rates(backend)
    progress("; ".join(f"{name} {rate / 1e12:.3f} T/s" for name, rate in rates.items()))
    release()
    before = cupy.cuda.runtime.memGetInfo()[0]
    name, model = model_of(args, backend)
    config = model.config
    release()

    cases = run_cases(model, args, figures, before)
    scored = run_scorers(model, args.context_tokens, args.scorers, before)
    weights, kernels = model.weights.nbytes, backend.kernels()
    del model
    release()
    peers = run_peers(config, args.context_tokens) if args.peers else {}

    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    on_card = CARD in device and args.context_tokens == CARD_TOKENS
    print(f"{name}, {args.context_tokens} context tokens, {device}; weights {weights / 1e9:.2f} GB")
    print("measured: " + ", ".join(f"{key} {rate / 1e12:.3f} T{'FLOP' if key == 'matrix product' else 'B'}/s"
                                   for key, rate in rates.items()))
    print_table(("cache", "figure", "measured", "floor", "x floor", "goal", "transformers",
                 f"llama.cpp ({CARD}, another run)"),
                [row for case in cases for row in rows_of(case, name, figures, rates, peers, on_card)])
    if "memory" in figures:
        print_memory(cases)
    if scored:
        print_scorers(scored)
    emit({"bench": command, "run": describe_run(), "device": device, "model": name,
          "context_tokens": args.context_tokens, "rates": rates, "weights": weights, "kernels": kernels,
          "cases": [asdict(case) for case in cases], **record_of(scored, peers)}, args.json)


def model_of(args: argparse.Namespace, backend: CudaBackend) -> tuple[str, Model]:
    """What model_options asked for, with its name; sets the default of context_tokens."""
    args.context_tokens = args.context_tokens or (CARD_TOKENS if args.shape else 4096)
    if args.shape:
        return args.shape, random_model(args.shape, args.context_tokens + PREFIX + SUFFIX + 1024, backend)
    return Path(args.model).stem, loaded_model(args.model, backend)


def run_cases(model: Model, args: argparse.Namespace, figures: Sequence[str], before: int) -> list[Case]:
    """Depth 0 where decoding is asked for, then every policy at depth."""
    config, cases = model.config, []
    rounds, steps = args.rounds if "TTFT" in figures else 1, args.steps if "TPOT" in figures else 2
    depths = [("depth 0", "fp16", 0)] if "TPOT" in figures else []
    for name, policy, tokens in [*depths, *((policy, policy, args.context_tokens) for policy in args.policies)]:
        first = min(tokens, 2 * model.backend.prefill_tile)
        run_case(model, plan_of(shape_of(config, first, 8), policy), name, 1, 8, before)
        case = run_case(model, plan_of(shape_of(config, tokens, WARM_STEPS + steps + 1), policy), name, rounds, steps,
                        before)
        progress(f"{name}: TTFT {np.median(case.ttft):.3f} s, TPOT {1e3 * np.median(case.steps):.3f} ms")
        cases.append(case)
    return cases


def run_scorers(model: Model, context_tokens: int, names: Sequence[str],
                before: int) -> dict[str, tuple[float | None, Case]]:
    """Per scorer its seconds alone, where it can be alone, and the mix read with its plan pending."""
    policy, shape = load_policy("budget", **MIX_OPTIONS), shape_of(model.config, context_tokens, 4)
    layout, texts, found = policy.layout(shape), chunk_texts(shape.n_chunks), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name == ATTENTION:  # all of the suffix asks
                scorer, alone = None, None
                pending = AttentionScorer().plan(policy, layout, query_rows(shape.prompt_tokens, SUFFIX, range(SUFFIX)))
            else:
                scorer = make_scorer(name, texts, Path(folder))
                alone = score_seconds(scorer, texts)
                pending = PendingPlan(layout, lambda by=scorer: policy.assign(layout, by.score(texts, QUERY), by.name))
            found[name] = alone, run_case(model, pending, name, 2, 2, before)
            progress(f"{name}: {alone} s alone, TTFT {found[name][1].ttft}, "
                     f"{cupy.cuda.runtime.memGetInfo()[0] / 2**30:.1f} GiB free")
            del scorer, pending
    return found


def run_peers(config: Any, context_tokens: int) -> Peers:
    from bench.peer_transformers import CACHES, Peer, prepare_quanto

    peer, found = Peer(config), {}
    ids = prompt_of(config, context_tokens + PREFIX + SUFFIX)
    missing = prepare_quanto()
    for cache, bits in CACHES.items():
        found[cache] = missing if missing and bits < 16 else peer.measure(ids, cache, PEER_STEPS)
        progress(f"transformers {cache}: {found[cache]}")
    peer.close()
    return found


def rows_of(case: Case, model: str, shown: Sequence[str], rates: dict[str, float], peers: Peers,
            on_card: bool) -> list[tuple[str, ...]]:
    ttft, tpot, pack = (float(np.median(values)) for values in (case.ttft, case.steps, case.pack))
    figures = [("TPOT", "ms", 1e3 * tpot, 1e3 * case.step_bytes / read_rate(rates))]
    if case.name != "depth 0":
        figures = [("TTFT", "s", ttft, 2 * case.multiply_adds / rates["matrix product"]), *figures,
                   ("memory", "GiB", case.memory / 2**30, sum(case.parts.values()) / 2**30)]
    label = f"{case.name} {case.bits_per_value:.2f} bpv" if case.bits_per_value else case.name
    rows = []
    for figure, unit, value, floor in figures:
        if figure not in shown:
            continue
        goal = GOALS.get((model, case.name, figure)) if on_card else None
        note = verdict(value, goal, at_most=True) if goal else ""
        if figure == "TPOT" and case.name in TPOT_FACTOR:
            factor = f"x floor {verdict(value / floor, TPOT_FACTOR[case.name], at_most=True)}"
            note = f"{factor}; {note}" if note else factor
        measured = f"{value:.3f} {unit}" + (f" ({1 / tpot:.1f} tokens/s)" if figure == "TPOT" else "")
        other = LLAMA_CPP.get((model, case.name, figure), "") if on_card else ""
        rows.append((label, figure, measured, f"{floor:.3f}", f"{value / floor:.2f}", note,
                     _beside(case.name, figure, peers), other))
        if figure == "TTFT":
            rows.append((label, "pack", f"{pack:.3f} s, {pack / ttft:.1%} of TTFT", "", "",
                         verdict(pack / ttft, PACK_SHARE, at_most=True), "", ""))
    return rows


def print_memory(cases: Sequence[Case]) -> None:
    """Where the bytes are; `other`: workspaces of cuBLAS, conversions, tables, graphs and loaded kernels."""
    rows = []
    for case in cases:
        if case.name != "depth 0":
            expected = sum(case.parts.values())
            mib = [*case.parts.values(), expected, case.pool, case.memory, case.memory - expected]
            rows.append((case.name, *(f"{nbytes / 2**20:,.0f}" for nbytes in mib), f"{case.memory / expected:.3f}"))
    if rows:
        print_table(("MiB", *cases[-1].parts, "expected", "pool", "measured", "other", "x expected"), rows)


def print_scorers(scored: dict[str, tuple[float | None, Case]]) -> None:
    rows = []
    for name, (alone, case) in scored.items():
        # The first round warms up what the scorer and the prefill do to each other.
        ttft, score, wait = (float(np.median(values[1:])) for values in (case.ttft, case.plan, case.wait))
        by_itself = ("", "") if alone is None else (f"{1e3 * alone:.1f}", f"{alone / ttft:.1%}")
        rows.append((name, *by_itself, f"{1e3 * score:.1f}", f"{1e3 * wait:.1f}",
                     f"{wait / ttft:.1%}", f"{ttft:.3f}"))
    print_table(("scorer", "alone ms", "of TTFT", "behind layer 0: ms", "waited for, ms", "of TTFT", "TTFT s"), rows)


def record_of(scored: dict[str, tuple[float | None, Case]], peers: Peers) -> dict[str, Any]:
    """For the closing JSON."""
    return {"scorers": {name: {"alone": alone, **asdict(case)} for name, (alone, case) in scored.items()},
            "transformers": {name: found if isinstance(found, str) else asdict(found) for name, found in peers.items()}}


def _beside(case: str, figure: str, peers: Peers) -> str:
    parts = []
    for cache in PEER_CACHES.get(case, ()):
        found = peers.get(cache)
        if found is None:
            continue
        if isinstance(found, str):
            parts.append(f"{cache} {found}")
            continue
        value = {"TTFT": found.ttft, "TPOT": 1e3 * float(np.median(found.steps)), "memory": found.memory / 2**30}
        parts.append(f"{cache} {value[figure]:.2f}" if figure != "TPOT" else f"{cache} {value[figure]:.1f}")
    return ", ".join(parts)


def _arguments(arguments: Sequence[str] | None, figures: Sequence[str], command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{command}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser, (*SCORERS, ATTENTION) if "TTFT" in figures else ())
    parser.add_argument("--policies", type=some_of(POLICIES), default=[*POLICIES], help="of fp16,mix")
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps, no scorers")
    args = parser.parse_args(arguments)
    args.rounds, args.steps = (1, STEPS // 2) if args.quick else (ROUNDS, STEPS)
    if args.quick:
        args.scorers = []
    return args


def model_options(parser: argparse.ArgumentParser, scorers: Sequence[str]) -> None:
    """What every bench of a whole model takes. scorers: the default ones."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=SHAPES, help="sizes of a known model, random weights")
    what.add_argument("--model", default=DEFAULT_MODEL, help="a checkpoint instead")
    parser.add_argument("--backend", choices=["cuda"], default="cuda")
    parser.add_argument("--context-tokens", type=int, help=f"default: {CARD_TOKENS} for a shape, 4096 for a checkpoint")
    known = (*SCORERS, *LIBRARY, ATTENTION)
    parser.add_argument("--scorers", type=some_of(known, least=0), default=[*scorers],
                        help=f"of {','.join(known)}; default: {','.join(scorers) or 'none'}")
    parser.add_argument("--peers", action="store_true", help="transformers in the same run")
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")


if __name__ == "__main__":
    main()
