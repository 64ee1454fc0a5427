"""A model's whole job on the GPU, measured: what bench.shapes and the commands that show a part of it have in common.

Models have the sizes of known ones and random FP16 weights, made on the device, or come from a checkpoint; the prompt
is random ids, the plan an all-FP16 cache or the project's default mix with its chunks in shuffled order, and everything
runs through runtime.engine as in the product (captured graph).
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy as np

from bench.attention import CHUNK, MIX, copy_rate, median_ms
from kernels_cu.arrays import Matrix
from kernels_cu.backend import CudaBackend
from runtime.arena import ArenaLayout
from runtime.checkpoint import Checkpoint
from runtime.config import ModelConfig
from runtime.engine import Planned, Reading, read
from runtime.model import Model
from runtime.plan import FP16, DocumentShape, Layout, Plan, Tier
from runtime.sampler import SamplingParams
from runtime.weights import LayerWeights, Weights, load_weights

LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32000, hidden_size=4096,
             intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
             rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA,
    "llama-2-13b": {**LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                    "num_attention_heads": 40, "num_key_value_heads": 40},
    "longchat-7b": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "mistral-7b": {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
                   "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None},
}
POLICIES: dict[str, Sequence[tuple[Tier, float]]] = {"fp16": ((FP16, 1.0),), "mix": MIX}
PREFIX, SUFFIX = 4, 28  # tokens around the context: a chat header, a question
WARM_STEPS = 8  # decode steps before the timed ones: the second captures the graph
SCRATCH = cupy.cuda.MemoryPool()


@dataclass
class Case:
    """What was measured under one plan; seconds and bytes, one entry per round (steps: per step)."""

    name: str
    bits_per_value: float
    step_bytes: int  # that an average timed step must read
    multiply_adds: int  # of the prefill
    parts: dict[str, int]  # bytes that the prefill needs, by what for
    ttft: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    pack: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)  # scoring and choosing
    wait: list[float] = field(default_factory=list)  # of plan, what prefill did not cover
    steps: list[float] = field(default_factory=list)
    memory: int = 0  # peak: what the driver gave since before the weights
    pool: int = 0  # of memory, in CuPy's pool


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


def read_rate(rates: dict[str, float]) -> float:
    """The best bytes per second that any of our means of reading reached in this run."""
    return max(rates["copy"], rates["sum"], rates["matrix-vector"])


def random_model(shape: str, positions: int, backend: CudaBackend) -> Model:
    """FP16 weights whose products keep the size of their inputs, made where they are used."""
    config = ModelConfig.from_json({**SHAPES[shape], "max_position_embeddings": positions})
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


def loaded_model(path: str, backend: CudaBackend) -> Model:
    """A checkpoint's model; no tokenizer."""
    with Checkpoint.open(path) as checkpoint:
        return Model(checkpoint.config, load_weights(checkpoint, backend), backend)


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


def shape_of(config: ModelConfig, context_tokens: int, max_new: int) -> DocumentShape:
    return DocumentShape(n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, chunk=CHUNK,
                         n_chunks=context_tokens // CHUNK, prefix=PREFIX, remainder=context_tokens % CHUNK,
                         suffix=SUFFIX, max_new=max_new, window=config.sliding_window)


def plan_of(shape: DocumentShape, policy: str) -> Plan:
    """Shares of the chunks to the policy's tiers, in shuffled order; what a window hides is stored too."""
    tiers, n = POLICIES[policy], shape.n_chunks
    counts = [round(share * n) for _, share in tiers]
    counts[0] = n - sum(counts[1:])
    assignment = np.random.default_rng(0).permutation(np.repeat(np.arange(len(tiers)), counts))
    return Plan(shape.layout([tier for tier, _ in tiers], counts),
                (tuple(int(tier) for tier in assignment),) * shape.n_layers, "bench", "none")


def prompt_of(config: ModelConfig, tokens: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(3, config.vocab_size, tokens)]


def run_case(model: Model, plan: Planned, name: str, rounds: int, steps: int, before: int) -> Case:
    """Answers of WARM_STEPS + steps + 1 ids at most, as the layout has room. before: bytes that were free on the device
    before the weights."""
    layout = plan.layout
    steps = min(steps, layout.max_new - 1)
    warm = layout.max_new - 1 - steps
    case = Case(name, ArenaLayout(layout).context_bits_per_value if layout.n_chunks else 0.0,
                _step_bytes(model, layout, steps), multiply_adds(model.config, layout.prompt_tokens),
                _parts(model, layout))
    ids = prompt_of(model.config, layout.prompt_tokens)
    release()
    for _ in range(rounds):
        begin = time.perf_counter()
        reading = read(model, ids, [plan])
        answer = reading.generate(SamplingParams(temperature=0.0), layout.max_new, ())
        next(answer)
        case.ttft.append(time.perf_counter() - begin)
        timing = reading.timing
        for values, value in ((case.prefill, timing.prefill), (case.pack, timing.pack), (case.plan, timing.plan),
                              (case.wait, timing.wait)):
            values.append(value)
        case.steps += [round(seconds, 7) for seconds in timed_steps(answer)[warm:]]
        check_reading(reading)
        del reading, answer
        gc.collect()
    # The pool gives nothing back before release(): what is missing now is the peak.
    case.memory, case.pool = before - cupy.cuda.runtime.memGetInfo()[0], cupy.get_default_memory_pool().total_bytes()
    release()
    return case


def unread_weights(model: Model) -> int:
    """Bytes of an embedding that is no head: a step reads one row of it."""
    return 0 if model.config.tie_embeddings else int(model.weights.embed.array.nbytes)


def multiply_adds(config: ModelConfig, tokens: int) -> int:
    """Of a prefill: all matrices for every token, but of the last layer only K, V and q, and no logits: the one row of
    them is left out. Causal attention counts each visible pair once."""
    E, I, L = config.hidden_size, config.intermediate_size, config.n_layers  # noqa: E741
    heads = config.n_heads * config.head_dim
    qkv = E * (heads + 2 * config.n_kv_heads * config.head_dim)
    rest = E * heads + 3 * E * I
    seen = min(tokens, config.sliding_window or tokens)
    pairs = seen * (seen + 1) // 2 + (tokens - seen) * seen
    return tokens * (L * qkv + (L - 1) * rest) + (L - 1) * 2 * heads * pairs


def release() -> None:
    """Give free blocks of the pools back to the driver, torch's too where an encoder or a peer has loaded it."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
    cupy.cuda.Device().synchronize()
    SCRATCH.free_all_blocks()
    cupy.get_default_memory_pool().free_all_blocks()


def timed_steps(answer: Iterator[int]) -> list[float]:
    seconds = []
    while True:
        begin = time.perf_counter()
        if next(answer, None) is None:
            return seconds
        seconds.append(time.perf_counter() - begin)


def check_reading(reading: Reading) -> None:
    """A fast step that computes nothing must not pass for a fast step."""
    logits = reading.force([5, 6, 7])
    if not np.isfinite(logits).all() or not logits.std(axis=1).min() > 0 or np.array_equal(logits[1], logits[2]):
        raise RuntimeError("logits are not finite, all equal or do not change; the figures would mean nothing")


def _step_bytes(model: Model, layout: Layout, steps: int) -> int:
    """Every weight but an embedding that is no head (one row of it), and the arena without the tail slots that are
    still empty."""
    config = model.config
    token = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim  # K and V at FP16
    return model.weights.nbytes - unread_weights(model) + ArenaLayout(layout).nbytes - token * steps // 2


def _parts(model: Model, layout: Layout) -> dict[str, int]:
    config, backend, layers, tokens = model.config, model.backend, model.weights.layers, layout.prompt_tokens
    heads, rows = config.n_heads * config.head_dim, min(tokens, backend.prefill_tile)
    attended = backend.activation_type(rows, [layer.wo for layer in layers]).itemsize
    hidden = backend.activation_type(rows, [layer.down for layer in layers]).itemsize
    # Of one tile: q, what attention gives, what the MLP has in the middle.
    tile = rows * ((4 + attended) * heads + hidden * config.intermediate_size)
    return {"weights": model.weights.nbytes, "packed cache": ArenaLayout(layout).nbytes,
            "one layer's K and V": 2 * 2 * config.n_kv_heads * config.head_dim * tokens,
            "activations": 4 * tokens * config.hidden_size + tile}
