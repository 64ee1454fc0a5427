"""What every policy takes on the GPU, in bytes and in time per token, with the sizes of the papers' models.

`python -m bench.policies [--shapes llama-2-7b,...] [--contexts 4096,32768] [--budgets 3.3,kivi-4=3.1,...]`

Weights are random and made once for shapes of equal sizes. Nothing is read: each layer's arena is packed by the
project's own kernels from one random K and V, which is all that a step's time depends on. Steps run as in the product,
with the captured graph and whatever a policy packs while decoding.

    cache   bytes of the arena, as allocated; bpv: of the context in it, all metadata counted
    total   what the driver gave for weights, arena and all that a step needs, since before the weights
    TPOT    median step. floor: weights and the visible cache once, over the best read rate of this run
    saved   share of the FP16 cache's figure that is not taken

kvtuner has one K4V4 layer in four and K4V2 else: 3.25 bits of codes, as in its paper. cocktail has scores that are
normally distributed: the thresholds then take the bits that they take with an encoder on real text. A budget given as
NAME=BITS is what reaches the quality of policy NAME (bench.quality prints such bits), and is held against it.

--pairs: budgets go by the losses of a file that cocktail.tune made, in use that of the model itself. No file is known
for these shapes, so that another model's stands in: layer l of n takes what is said of its layer round(l * (m - 1) /
(n - 1)) of m. The file's own pairs, spread in the same way, are one more policy, kvtuner-file.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import cupy
import numpy as np

from bench.gpu import (
    SHAPES,
    SUFFIX,
    WARM_STEPS,
    check_reading,
    measure_rates,
    prompt_of,
    random_model,
    read_rate,
    release,
    shape_of,
    timed_steps,
    unread_weights,
)
from bench.report import describe_run, emit, print_table, progress, some_of, verdict
from cocktail.policies import load_policy
from cocktail.policies.pairs import LayerLosses, LayerPairs, fingerprint
from kernels_cu.backend import CudaBackend
from runtime.arena import ArenaLayout
from runtime.cache import Cache
from runtime.config import ModelConfig
from runtime.engine import Reading
from runtime.errors import CocktailError
from runtime.format_data import format_data
from runtime.formats import block_bytes
from runtime.model import Model
from runtime.plan import DocumentShape, Layout, Plan, Tier
from runtime.sampler import SamplingParams

T = TypeVar("T")
CONTEXTS, STEPS = (4096, 32768), 32
BUDGETS = ("3.3", "3.8")
EXACT, EIGHT_BITS, PAIRS, PAPERS, IN_PLACE = "fp16", "K8V8", "kvtuner", "cocktail", "cocktail-in-place"
FROM_FILE = "kvtuner-file"
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    EXACT: ("fp16", {}),
    EIGHT_BITS: ("uniform", {"tier": "K8V8"}),
    "K4V4": ("uniform", {"tier": "K4V4"}),
    "kivi-4": ("kivi", {"bits": 4}),
    "kivi-2": ("kivi", {"bits": 2}),
    "atom": ("atom", {}),
    "kvquant-4": ("kvquant", {"bits": 4, "calibration": True}),
    PAIRS: ("kvtuner", {"pairs": True}),
    FROM_FILE: ("kvtuner", {}),
    PAPERS: ("cocktail", {}),
    IN_PLACE: ("cocktail", {"no_reorder": True}),
}
PAIR_CYCLE = (Tier(4, 4), Tier(4, 2), Tier(4, 2), Tier(4, 2))
# The papers' own: shares of FP16's memory and TPOT that Cocktail saves (section IV-B), what it costs not to reorder
# (Table V: TPOT and memory over Cocktail's), throughput of KVTuner's pairs over 8 bits everywhere.
PAPER_SAVED = {"total": ("memory", "12-42%"), "tpot": ("TPOT", "32-52%")}
PAPER_NO_REORDER = 29653 / 15201, 20.6 / 13.7
PAPER_PAIRS = 0.21


@dataclass(frozen=True)
class PairsFile:
    """What --pairs names."""

    pairs: LayerPairs
    losses: LayerLosses


@dataclass(frozen=True)
class Figure:
    """One policy at one shape and context; bytes and seconds. error: why there is nothing else."""

    shape: str
    context: int
    policy: str
    error: str = ""
    bpv: float = 0.0
    cache: int = 0
    total: int = 0
    tpot: float = 0.0
    floor: float = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    backend = CudaBackend()
    rates = measure_rates(backend)
    release()
    before, figures = cupy.cuda.runtime.memGetInfo()[0], []
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{device}; read rate {read_rate(rates) / 1e12:.3f} TB/s; one sequence, random FP16 weights")
    model: Model | None = None
    for name in sorted(args.shapes, key=lambda name: (str(_sizes(name)), name)):  # equal sizes behind one another
        if model is None or _sizes(name) != _sizes_of(model.config):
            del model
            release()
            model = random_model(name, max(args.contexts) + 1024, backend)
            release()
        model = replace(model, config=ModelConfig.from_json(
            {**SHAPES[name], "max_position_embeddings": max(args.contexts) + 1024}))
        for context in args.contexts:
            found = measure(model, name, context, args.policies, args.budgets, read_rate(rates), before, args.pairs)
            report(name, context, found, args.budgets)
            figures += found
    emit({"bench": "policies", "run": describe_run(), "device": device, "rates": rates, "budgets": args.budgets,
          "pairs": args.pairs and args.pairs.pairs.source, "figures": [asdict(figure) for figure in figures]},
         args.json)


def measure(model: Model, name: str, context: int, policies: Sequence[str], budgets: dict[str, float], rate: float,
            before: int, file: PairsFile | None = None) -> list[Figure]:
    """One figure per policy and budget, in that order. file: of a model with any number of layers."""
    shape, figures = shape_of(model.config, context, WARM_STEPS + STEPS + 1), []
    given = {} if file is None else {FROM_FILE: {"pairs": spread_pairs(file.pairs, shape.n_layers)},
                                     "budget": {"pairs": spread_losses(file.losses, shape.n_layers)}}
    wanted = [(policy, kind, options | given.get(policy, {})) for policy in policies
              for kind, options in [POLICIES[policy]]]
    wanted += [(f"budget {label}", "budget", {"kv_bits": bits} | given.get("budget", {}))
               for label, bits in budgets.items()]
    with tempfile.TemporaryDirectory() as folder:
        for label, policy, options in wanted:
            figure = Figure(name, context, label)
            try:
                plan = plan_of(model, shape, policy, options, Path(folder))
                figure = measured(model, plan, figure, rate, before)
            except CocktailError as error:
                figure = replace(figure, error=" ".join(str(error).split()))
            release()
            progress(f"{name} {context} {label}: {figure.error or f'{1e3 * figure.tpot:.3f} ms'}")
            figures.append(figure)
    return figures


def plan_of(model: Model, shape: DocumentShape, policy: str, options: dict[str, Any], folder: Path) -> Plan:
    """The policy's Plan for scores that are normally distributed."""
    given = dict(options)
    if given.get("pairs") is True:
        cycle = tuple(PAIR_CYCLE[layer % len(PAIR_CYCLE)] for layer in range(shape.n_layers))
        given["pairs"] = LayerPairs(cycle, {}, "3.25 bits")
    if "calibration" in given:
        given["calibration"] = calibration_file(model, folder / "levels.safetensors")
    chosen = load_policy(policy, **given)
    quantiles = [NormalDist().inv_cdf((i + 0.5) / shape.n_chunks) for i in range(shape.n_chunks)]
    scores = np.random.default_rng(0).permutation(quantiles).astype(np.float32)
    return chosen.plan(shape, scores if chosen.uses_scores else None)


def spread_pairs(found: LayerPairs, n_layers: int) -> LayerPairs:
    """For any model of n_layers."""
    return LayerPairs(spread(found.pairs, n_layers), {}, f"{found.source} over {n_layers} layers")


def spread_losses(found: LayerLosses, n_layers: int) -> LayerLosses:
    """For any model of n_layers."""
    k, v = ({width: spread(row, n_layers) for width, row in side.items()} for side in (found.k, found.v))
    return LayerLosses(k, v, {}, f"{found.source} over {n_layers} layers")


def spread(rows: Sequence[T], n: int) -> tuple[T, ...]:
    """n of them, from the first to the last, evenly."""
    return tuple(rows[round(i * (len(rows) - 1) / max(n - 1, 1))] for i in range(n))


def calibration_file(model: Model, path: Path) -> Path:
    """What cocktail.calibrate would find in K and V that are normally distributed, but for the levels' places."""
    from safetensors.numpy import save_file

    config, tensors = model.config, {}
    channels = config.n_kv_heads, config.head_dim
    for layer in range(config.n_layers):
        tensors[f"layers.{layer}.k_centre"] = np.zeros(channels, np.float32)
        tensors[f"layers.{layer}.k_half"] = np.full(channels, 2.5758, np.float32)  # 1% of a normal distribution beyond
        for bits in (2, 3, 4):
            for kind in "kv":
                tensors[f"layers.{layer}.{kind}_levels.{bits}"] = np.linspace(-0.9, 0.9, 2**bits, dtype=np.float32)
    save_file(tensors, path, {"version": "1", "fingerprint": fingerprint(model), "weighting": "none", "tokens": "0"})
    return path


def measured(model: Model, plan: Plan, figure: Figure, rate: float, before: int) -> Figure:
    """Packs the arena, decodes, and looks at what the driver has given by then."""
    reading = packed(model, plan)
    cache, layout = reading.caches[0], plan.layout
    answer = reading.generate(SamplingParams(temperature=0.0), layout.max_new, ())
    next(answer)
    seconds = timed_steps(answer)[WARM_STEPS:]
    check_reading(reading)
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    total = before - cupy.cuda.runtime.memGetInfo()[0]
    return replace(figure, bpv=cache.sizes.context_bits_per_value, cache=int(cache.arena.nbytes), total=total,
                   tpot=float(np.median(seconds)), floor=step_bytes(model, layout, len(seconds)) / rate)


def packed(model: Model, plan: Plan) -> Reading:
    """As if a prompt of that layout had been read: one random K and V in every layer, random logits."""
    config, backend, layout = model.config, model.backend, plan.layout
    rope = model.rope(layout.prompt_tokens, layout.prompt_tokens + layout.max_new)
    cache = Cache(backend, config, layout, format_data(backend, config, layout, rope))
    cache.assign(plan)
    rng = cupy.random.default_rng(0)
    rows = config.n_kv_heads, layout.prompt_tokens, config.head_dim
    k, v = (rng.standard_normal(rows, dtype=np.float32).astype(np.float16) for _ in "kv")
    for layer in range(config.n_layers):
        cache.pack(layer, k, v)
    logits = np.random.default_rng(0).standard_normal((1, config.vocab_size)).astype(np.float32)
    return Reading(model, tuple(prompt_of(config, layout.prompt_tokens)), (cache,), rope, logits)


def step_bytes(model: Model, layout: Layout, steps: int) -> int:
    """What a step in the middle of the timed ones must read: weights, the context, and of the tail what is visible."""
    sizes, config = ArenaLayout(layout), model.config
    generated = layout.max_new - 1 - steps // 2
    flushed = layout.flushed(generated)
    token = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim  # K and V at FP16
    tail = layout.prefix + layout.remainder + layout.suffix + generated - flushed * layout.chunk
    return (model.weights.nbytes - unread_weights(model) + sizes.context_bytes + tail * token
            + flushed * chunk_bytes(layout, layout.lowest))


def chunk_bytes(layout: Layout, tier: Tier) -> int:
    """Of one chunk of that tier in all layers."""
    k, v = (block_bytes(kind, bits, layout.chunk, layout.head_dim, layout.formats)
            for kind, bits in (("K", tier.k_bits), ("V", tier.v_bits)))
    return layout.n_layers * (layout.n_kv_heads * (k.codes + k.meta + v.codes + v.meta) + k.shared + v.shared)


def report(name: str, context: int, figures: Sequence[Figure], budgets: dict[str, float]) -> None:
    """The table of one shape and context, and what follows from it."""
    known = {figure.policy: figure for figure in figures if not figure.error}
    exact, eight = known.get(EXACT), known.get(EIGHT_BITS)
    rows = []
    for figure in figures:
        if figure.error:
            rows.append((figure.policy, figure.error, *[""] * 9))
            continue
        rows.append((figure.policy, f"{figure.bpv:.2f}", f"{figure.cache / 2**30:.3f}", saved("cache", figure, exact),
                     f"{figure.total / 2**30:.2f}", saved("total", figure, exact), f"{1e3 * figure.tpot:.3f}",
                     f"{1e3 * figure.floor:.3f}", f"{figure.tpot / figure.floor:.2f}", saved("tpot", figure, exact),
                     f"{eight.tpot / figure.tpot - 1:+.1%}" if eight else ""))
    print(f"\n{name}, {context} context tokens and {SUFFIX} of question")
    print_table(("policy", "bpv", "cache GiB", "saved", "total GiB", "saved", "TPOT ms", "floor ms", "x floor", "saved",
                 "tokens/s over K8V8"), rows)  # fmt: skip
    for line in conclusions(known, budgets):
        print(line)


def conclusions(known: dict[str, Figure], budgets: dict[str, float]) -> list[str]:
    """Beside the papers' own figures; each matched budget beside its baseline."""
    lines, exact = [], known.get(EXACT)
    shown = [figure for policy, figure in known.items() if policy == PAPERS or policy.startswith("budget")]
    if exact and shown:
        for attribute, (label, paper) in PAPER_SAVED.items():
            each = ", ".join(f"{figure.policy} {saved(attribute, figure, exact)}" for figure in shown)
            lines.append(f"{label} saved of FP16's: {each}; the paper: {paper}")
    if (mixed := known.get(IN_PLACE)) and (ordered := known.get(PAPERS)):
        lines.append(f"not reordered over reordered: TPOT x {mixed.tpot / ordered.tpot:.2f}, total memory x "
                     f"{mixed.total / ordered.total:.2f}, cache x {mixed.cache / ordered.cache:.2f}; the paper: x "
                     f"{PAPER_NO_REORDER[0]:.2f} and x {PAPER_NO_REORDER[1]:.2f}")
    if (pairs := known.get(PAIRS)) and (eight := known.get(EIGHT_BITS)):
        lines.append(f"{PAIRS}'s tokens/s over {EIGHT_BITS}: {eight.tpot / pairs.tpot - 1:+.1%} for one sequence, "
                     f"where weights count most; the paper, in batches: {PAPER_PAIRS:+.0%}")
    for label in budgets:
        budget, baseline = known.get(f"budget {label}"), known.get(label.partition(" = ")[0])
        if budget and baseline:
            lines.append(f"budget {label}: cache {budget.cache / baseline.cache:.3f} of {baseline.policy}'s, "
                         f"{verdict(budget.cache, baseline.cache, at_most=True).split()[0]}; TPOT "
                         f"{1e3 * budget.tpot:.3f} against {1e3 * baseline.tpot:.3f} ms, "
                         f"{verdict(budget.tpot, baseline.tpot, at_most=True).split()[0]}")
    return lines


def saved(attribute: str, figure: Figure, exact: Figure | None) -> str:
    return f"{1 - getattr(figure, attribute) / getattr(exact, attribute):.1%}" if exact else ""


def _sizes(name: str) -> tuple[int, ...]:
    return _sizes_of(ModelConfig.from_json({**SHAPES[name], "max_position_embeddings": 4096}))


def _sizes_of(config: ModelConfig) -> tuple[int, ...]:
    return (config.hidden_size, config.intermediate_size, config.n_layers, config.n_heads, config.n_kv_heads,
            config.head_dim, config.vocab_size)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.policies", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=some_of(SHAPES), default=[*SHAPES], metavar="LIST",
                        help=f"of {', '.join(SHAPES)} (all)")
    parser.add_argument("--contexts", type=lambda text: [int(part) for part in text.split(",")],
                        default=[*CONTEXTS], metavar="LIST", help="context tokens (4096,32768)")
    parser.add_argument("--policies", type=some_of(POLICIES), metavar="LIST",
                        help=f"of {', '.join(POLICIES)} (all; {FROM_FILE} with --pairs only)")
    parser.add_argument("--budgets", type=_budgets, default=_budgets(",".join(BUDGETS)), metavar="LIST",
                        help="bits per value, or POLICY=BITS for those that match a policy's quality (3.3,3.8)")
    parser.add_argument("--pairs", type=_pairs_file, metavar="FILE",
                        help="each layer's losses for the budgets, and pairs, of another model (python -m cocktail."
                        "tune), spread over the layers: they stand in for the shape's own")
    parser.add_argument("--json", metavar="FILE", help="also write the closing JSON line here")
    args = parser.parse_args(arguments)
    if args.policies is None:
        args.policies = [policy for policy in POLICIES if args.pairs or policy != FROM_FILE]
    elif FROM_FILE in args.policies and not args.pairs:
        parser.error(f"{FROM_FILE} reads a file: give --pairs FILE")
    return args


def _pairs_file(path: str) -> PairsFile:
    try:
        return PairsFile(LayerPairs.load(path), LayerLosses.load(path))
    except CocktailError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _budgets(text: str) -> dict[str, float]:
    """"3.3" or "3.3 = kivi-4" -> bits."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, bits = part.rpartition("=")
        if name and name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r}; expected one of {', '.join(POLICIES)}")
        try:
            found[f"{name} = {bits}" if name else bits] = float(bits)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r}; expected BITS or POLICY=BITS") from None
    return found


if __name__ == "__main__":
    main()
