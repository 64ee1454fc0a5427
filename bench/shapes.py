"""A 7B model's whole job on the GPU against its floors. `python -m bench.shapes --model llama-2-7b [--quick]`

Random FP16 weights of the model's shape, made on the device, and a random prompt through runtime.engine as the product
runs it (captured graph): an all-FP16 cache, and the project's default mix with its chunks in shuffled order. A short
prompt first has the kernels compiled.

    TTFT    from the call of read() to the first id: buffers, prefill, packing, sampling; the median of the rounds.
            floor: multiply-adds of the prompt over the rate of an FP16 matrix product in this run
    pack    device time around packing, within those prefills
    TPOT    median decode step, as the caller sees it.
            floor: weights and cache once, over the best read rate of this run: of a copy, a sum, a matrix-vector kernel
    memory  what the driver gave since before the weights: pool, cuBLAS and graphs count, the context does not.
            floor: weights, arena, one layer's K and V, the hidden states, one tile's activations
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import cupy
import numpy as np

from bench.attention import CHUNK, MIX, copy_rate, median_ms
from bench.report import describe_run, emit, print_table, progress, verdict
from kernels_cu.arrays import Matrix
from kernels_cu.backend import CudaBackend
from runtime.arena import ArenaLayout
from runtime.config import ModelConfig
from runtime.engine import Reading, read
from runtime.model import Model
from runtime.plan import FP16, DocumentShape, Plan
from runtime.sampler import SamplingParams
from runtime.weights import LayerWeights, Weights

LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32000, hidden_size=4096,
             intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
             rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
MODELS = {
    "llama-2-7b": LLAMA,
    "mistral-7b": {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
                   "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None},
}
POLICIES = {"fp16": ((FP16, 1.0),), "mix": MIX}
PREFIX, SUFFIX = 4, 28  # tokens around the context: a chat header, a question
SCRATCH = cupy.cuda.MemoryPool()
WARM_STEPS = 8  # decode steps before the timed ones: the second captures the graph

TPOT_FACTOR = {"fp16": 1.08, "mix": 1.18}  # goal: at most so many times the floor
PACK_SHARE = 0.05  # goal: of TTFT, at most
# Goals of one card at 32K, and what others reached on such a card in earlier runs, which are not repeated here.
CARD, CARD_TOKENS = "H100 80GB", 32768
GOALS = {
    ("llama-2-7b", "depth 0", "TPOT"): 5.3, ("llama-2-7b", "fp16", "TTFT"): 1.52, ("llama-2-7b", "mix", "TTFT"): 1.52,
    ("llama-2-7b", "mix", "memory"): 18.0, ("mistral-7b", "fp16", "TPOT"): 6.9, ("mistral-7b", "mix", "TPOT"): 6.2,
}  # ms, s, GiB
OTHERS = {
    ("llama-2-7b", "depth 0", "TPOT"): "llama.cpp 5.6",
    ("llama-2-7b", "fp16", "TTFT"): "transformers 1.52, llama.cpp 6.3",
    ("llama-2-7b", "fp16", "TPOT"): "llama.cpp 11.4, transformers 96",
    ("llama-2-7b", "fp16", "memory"): "transformers 31.6",
    ("llama-2-7b", "mix", "TTFT"): "transformers quanto 2-bit 1.61",
    ("llama-2-7b", "mix", "TPOT"): "llama.cpp q4_0 10.7, transformers quanto 2-bit 92",
    ("llama-2-7b", "mix", "memory"): "transformers quanto 2-bit 18.1",
    ("mistral-7b", "depth 0", "TPOT"): "llama.cpp 5.8",
    ("mistral-7b", "fp16", "TTFT"): "transformers 1.51, llama.cpp 2.4",
    ("mistral-7b", "fp16", "TPOT"): "llama.cpp 8.0, transformers 118",
    ("mistral-7b", "fp16", "memory"): "transformers 21.2",
    ("mistral-7b", "mix", "TTFT"): "transformers quanto 4-bit 1.54",
    ("mistral-7b", "mix", "TPOT"): "llama.cpp q4_0 10.6, transformers quanto 4-bit 67",
    ("mistral-7b", "mix", "memory"): "transformers quanto 4-bit 18.3",
}


@dataclass
class Case:
    """What was measured under one plan; seconds and bytes."""

    name: str
    bits_per_value: float
    step_bytes: int  # that an average timed step must read
    multiply_adds: int  # of the prefill
    memory_floor: int
    ttft: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    pack: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    memory: int = 0
    pool: int = 0  # of memory, in CuPy's pool


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--context-tokens", type=int, default=CARD_TOKENS)
    parser.add_argument("--policies", default="fp16,mix", help="of fp16 and mix, with commas between")
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps")
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args(arguments)
    unknown = set(args.policies.split(",")) - set(POLICIES)
    if unknown:
        parser.error(f"unknown policies {', '.join(sorted(unknown))}; expected {', '.join(POLICIES)}")
    rounds, steps = (1, 32) if args.quick else (3, 64)

    backend = TimedBackend()
    rates = measure_rates(backend)
    progress("; ".join(f"{name} {rate / 1e12:.3f} T/s" for name, rate in rates.items()))
    release()
    before = cupy.cuda.runtime.memGetInfo()[0]
    config = ModelConfig.from_json({**MODELS[args.model], "max_position_embeddings": args.context_tokens + 4096})
    model = random_model(config, backend)
    release()

    cases = []
    for name, tokens in [("depth 0", 0), *((policy, args.context_tokens) for policy in args.policies.split(","))]:
        tiers = POLICIES["fp16" if name == "depth 0" else name]
        run_case(model, plan_of(config, tiers, 2 * backend.prefill_tile if tokens else 0, 8), name, 1, 8, before)
        case = run_case(model, plan_of(config, tiers, tokens, WARM_STEPS + steps + 1), name, rounds, steps, before)
        progress(f"{name}: TTFT {np.median(case.ttft):.3f} s, TPOT {1e3 * np.median(case.steps):.3f} ms")
        cases.append(case)

    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{args.model}, {args.context_tokens} context tokens, {device}; weights {model.weights.nbytes / 1e9:.2f} GB")
    print("measured: " + ", ".join(f"{name} {rate / 1e12:.3f} T{'FLOP' if name == 'matrix product' else 'B'}/s"
                                   for name, rate in rates.items()))
    on_card = CARD in device and args.context_tokens == CARD_TOKENS
    print_table(("cache", "figure", "measured", "floor", "x floor", "goal", f"others ({CARD}, earlier runs)"),
                [row for case in cases for row in rows_of(case, args.model, rates, on_card)])
    emit({"bench": "shapes", "run": describe_run(), "device": device, "model": args.model,
          "context_tokens": args.context_tokens, "rates": rates, "weights": model.weights.nbytes,
          "kernels": backend.kernels(), "cases": [asdict(case) for case in cases]}, args.json)


class TimedBackend(CudaBackend):
    """The CUDA backend with device events around what packing does."""

    def __init__(self) -> None:
        super().__init__()
        self._packs: list[tuple[Any, Any]] = []

    def pack(self, *arguments: Any) -> None:
        with self._timed():
            super().pack(*arguments)

    def copy_tail(self, *arguments: Any) -> None:
        with self._timed():
            super().copy_tail(*arguments)

    def pack_seconds(self) -> float:
        """Since the last call."""
        packs, self._packs = self._packs, []
        return sum(cupy.cuda.get_elapsed_time(begin, end) for begin, end in packs) / 1e3

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        yield
        end.record()
        self._packs.append((begin, end))


def measure_rates(backend: CudaBackend) -> dict[str, float]:
    """Bytes per second of three ways to read 2 GiB (a copy also writes them), and FLOP/s of a large matrix product."""
    rates = {"copy": copy_rate()}
    rng = cupy.random.default_rng(0)
    values = rng.standard_normal(1 << 29, dtype=np.float32)
    rates["sum"] = values.nbytes / median_ms(values.sum, 12) * 1e3
    del values
    rows, columns = 1 << 18, 4096
    matrix, x = random_matrix(rng, rows, columns), rng.standard_normal((1, columns), dtype=np.float32)
    norm, out = cupy.ones(columns, np.float32), cupy.empty((1, rows), np.float32)
    ms = median_ms(lambda: backend.logits(x, norm, 1e-5, matrix, out), 12)
    rates["matrix-vector"] = matrix.array.nbytes / ms * 1e3
    a, b = (random_matrix(rng, 8192, 8192).array for _ in "ab")
    rates["matrix product"] = 2 * 8192**3 / median_ms(lambda: cupy.matmul(a, b), 12) * 1e3
    return rates


def random_model(config: ModelConfig, backend: CudaBackend) -> Model:
    """FP16 weights whose products keep the size of their inputs, made where they are used."""
    E, I = config.hidden_size, config.intermediate_size  # noqa: E741
    q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rng = cupy.random.default_rng(0)
    nbytes = 0

    def matrix(rows: int, columns: int) -> Matrix:
        nonlocal nbytes
        nbytes += 2 * rows * columns
        return random_matrix(rng, rows, columns)

    def norm() -> Any:
        nonlocal nbytes
        nbytes += 4 * E
        return cupy.ones(E, np.float32)

    def layer() -> LayerWeights:
        return LayerWeights(attn_norm=norm(), wq=matrix(q_size, E), wk=matrix(kv_size, E), wv=matrix(kv_size, E),
                            wo=matrix(E, q_size), bq=None, bk=None, bv=None, bo=None, mlp_norm=norm(),
                            gate=matrix(I, E), up=matrix(I, E), down=matrix(E, I), gate_bias=None, up_bias=None,
                            down_bias=None)

    embed, layers = matrix(config.vocab_size, E), tuple(layer() for _ in range(config.n_layers))
    return Model(config, Weights(embed, layers, norm(), matrix(config.vocab_size, E), nbytes), backend)


def random_matrix(rng: Any, rows: int, columns: int) -> Matrix:
    """Normal values of variance 1 / columns. Scratch comes from a pool of its own: in the matrices' pool it would leave
    holes that count as memory."""
    array = cupy.empty((rows, columns), np.float16)
    step = max(1, (1 << 26) // columns)
    with cupy.cuda.using_allocator(SCRATCH.malloc):
        for start in range(0, rows, step):
            part = array[start : start + step]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32) * np.float32(columns**-0.5)
    return Matrix.on_device(array, "F16")


def plan_of(config: ModelConfig, tiers: Any, context_tokens: int, max_new: int) -> Plan:
    """Shares of the chunks to tiers, in shuffled order."""
    n = context_tokens // CHUNK
    counts = [round(share * n) for _, share in tiers]
    counts[0] = n - sum(counts[1:])
    shape = DocumentShape(n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, chunk=CHUNK,
                          n_chunks=n, prefix=PREFIX, remainder=context_tokens % CHUNK, suffix=SUFFIX, max_new=max_new,
                          window=config.sliding_window)
    assignment = np.random.default_rng(0).permutation(np.repeat(np.arange(len(tiers)), counts))
    layout = shape.layout([tier for tier, _ in tiers], counts)
    return Plan(layout, (tuple(int(tier) for tier in assignment),) * config.n_layers, "bench", "none")


def run_case(model: Model, plan: Plan, name: str, rounds: int, steps: int, before: int) -> Case:
    """before: bytes that were free on the device before the weights."""
    backend, layout = model.backend, plan.layout
    steps = min(steps, layout.max_new - 1)
    warm = layout.max_new - 1 - steps
    case = Case(name, ArenaLayout(layout).context_bits_per_value if layout.n_chunks else 0.0,
                _step_bytes(model, plan, steps), multiply_adds(model.config, layout.prompt_tokens),
                _memory_floor(model, plan))
    ids = [int(i) for i in np.random.default_rng(1).integers(3, model.config.vocab_size, layout.prompt_tokens)]
    release()
    for _ in range(rounds):
        backend.pack_seconds()
        begin = time.perf_counter()
        reading = read(model, ids, [plan])
        answer = reading.generate(SamplingParams(temperature=0.0), layout.max_new, ())
        next(answer)
        case.ttft.append(time.perf_counter() - begin)
        case.prefill.append(reading.timing.prefill)
        case.pack.append(backend.pack_seconds())
        case.steps += [round(seconds, 7) for seconds in _timed_steps(answer)[warm:]]
        _check(reading)
        del reading, answer
        gc.collect()
    # The pool gives nothing back before release(): what is missing now is the peak.
    case.memory, case.pool = before - cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().total_bytes()
    release()
    return case


def multiply_adds(config: ModelConfig, tokens: int) -> int:
    """Of a prefill: all matrices for every token, but of the last layer only K, V and q, and no logits: the one row of
    them is left out. Causal attention counts each visible pair once."""
    E, I, L = config.hidden_size, config.intermediate_size, config.n_layers  # noqa: E741
    heads = config.n_heads * config.head_dim
    qkv = E * (heads + 2 * config.n_kv_heads * config.head_dim)
    rest = E * heads + 3 * E * I
    pairs = tokens * (tokens + 1) // 2
    return tokens * (L * qkv + (L - 1) * rest) + (L - 1) * 2 * heads * pairs


def rows_of(case: Case, model: str, rates: dict[str, float], on_card: bool) -> list[tuple[str, ...]]:
    best = max(rates["copy"], rates["sum"], rates["matrix-vector"])
    ttft, tpot, pack = (float(np.median(values)) for values in (case.ttft, case.steps, case.pack))
    figures = [("TPOT", "ms", 1e3 * tpot, 1e3 * case.step_bytes / best)]
    if case.name != "depth 0":
        figures = [("TTFT", "s", ttft, 2 * case.multiply_adds / rates["matrix product"]), *figures,
                   ("memory", "GiB", case.memory / 2**30, case.memory_floor / 2**30)]
    label = f"{case.name} {case.bits_per_value:.2f} bpv" if case.bits_per_value else case.name
    rows = []
    for figure, unit, value, floor in figures:
        goal = GOALS.get((model, case.name, figure)) if on_card else None
        note = verdict(value, goal, at_most=True) if goal else ""
        if figure == "TPOT" and case.name in TPOT_FACTOR:
            factor = f"x floor {verdict(value / floor, TPOT_FACTOR[case.name], at_most=True)}"
            note = f"{factor}; {note}" if note else factor
        shown = f"{value:.3f} {unit}" + (f" ({1 / tpot:.1f} tokens/s)" if figure == "TPOT" else "")
        rows.append((label, figure, shown, f"{floor:.3f}", f"{value / floor:.2f}", note,
                     OTHERS.get((model, case.name, figure), "") if on_card else ""))
        if figure == "TTFT":
            rows.append((label, "pack", f"{pack:.3f} s, {pack / ttft:.1%} of TTFT", "", "",
                         verdict(pack / ttft, PACK_SHARE, at_most=True), ""))
    return rows


def release() -> None:
    """Give free blocks of the pools back to the driver."""
    gc.collect()
    cupy.cuda.Device().synchronize()
    SCRATCH.free_all_blocks()
    cupy.get_default_memory_pool().free_all_blocks()


def _timed_steps(answer: Iterator[int]) -> list[float]:
    seconds = []
    while True:
        begin = time.perf_counter()
        if next(answer, None) is None:
            return seconds
        seconds.append(time.perf_counter() - begin)


def _check(reading: Reading) -> None:
    """A fast step that computes nothing must not pass for a fast step."""
    logits = reading.force([5, 6, 7])
    if not np.isfinite(logits).all() or not logits.std(axis=1).min() > 0 or np.array_equal(logits[1], logits[2]):
        raise RuntimeError("logits are not finite, all equal or do not change; the figures would mean nothing")


def _step_bytes(model: Model, plan: Plan, steps: int) -> int:
    """Every weight but the embedding (one row of it), and the arena without the tail slots that are still empty."""
    weights, config = model.weights, model.config
    token = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim  # K and V at FP16
    return weights.nbytes - weights.embed.array.nbytes + ArenaLayout(plan.layout).nbytes - token * steps // 2


def _memory_floor(model: Model, plan: Plan) -> int:
    config, tokens = model.config, plan.layout.prompt_tokens
    layer = 2 * 2 * config.n_kv_heads * config.head_dim * tokens
    tile_row = config.hidden_size + 2 * config.n_heads * config.head_dim + config.intermediate_size
    activations = 4 * (tokens * config.hidden_size + min(tokens, model.backend.prefill_tile) * tile_row)
    return model.weights.nbytes + ArenaLayout(plan.layout).nbytes + layer + activations


if __name__ == "__main__":
    main()
