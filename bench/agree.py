"""How far the CUDA backend's logits are from the CPU's, and why.

    python -m bench.agree --model PATH --record FILE     on a machine with the C kernels
    python -m bench.agree --model PATH --compare FILE    on a machine with a GPU (--record first where both are there)

The record holds one prompt's ids and plans, and of the CPU backend every layer's K and V, the logits along a forced
answer and 64 greedy ids. The comparison takes two ways to the same answer:

same K and V   the CPU's K and V packed and decoded on CUDA. Codes are equal bit for bit, so what differs is decoding:
               CUDA's attention rounds queries and probabilities to FP16. The CPU with query and output of attention
               rounded to FP16 moves as well (recorded, "FP16 attention"): CUDA may be off by ROUNDINGS times that.
end to end     CUDA's own prefill, whose activations are rounded to FP16 before each product, as tensor cores take
               them. K and V then differ a little, and near the edge between two codes a little is a whole code. Beside
               it what random noise of the same size per channel, added to the CPU's K and V, changes on CUDA ("noise"),
               and what the last bit of K and V changes on the CPU ("last bit"): that is the format's conditioning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import cocktail
from bench.report import DEFAULT_MODEL, describe_run, emit, print_table
from runtime.cache import Cache
from runtime.engine import Reading, read
from runtime.model import Model, prefill
from runtime.plan import Plan
from runtime.sampler import SamplingParams

DOCUMENT = Path(__file__).parents[1] / "examples/handbook.txt"
QUESTION = "Who keeps the keys of the boathouse?"
CONTEXT_TOKENS, NEW, STEPS = 512, 64, 12
POLICIES = ("fp16", "cocktail", "budget")
ROUNDINGS = 4  # the query, its rotated or scaled form, the probabilities, V's scales folded into them
FP16_PREFILL = 2.0**-8  # allowed rms of K's and V's difference over their rms; rounded inputs on the CPU gave a third

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Between two arrays of logits of the same steps."""

    most: float
    rms: float

    @classmethod
    def of(cls, a: F32, b: F32) -> Difference:
        off = a.astype(np.float64) - b
        return cls(float(np.abs(off).max()), float(np.sqrt(np.mean(off * off))))

    def __str__(self) -> str:
        return f"{self.most:.4f} ({self.rms:.5f})"


@dataclass(frozen=True)
class Recording:
    """Of one backend. k, v: (L, G, T, D); first: (1, V). Per policy: the plan, greedy ids, logits (STEPS, V) forced
    along `answer`, and how far those move when attention is rounded and when K's and V's last bits are others."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    plans: dict[str, Plan]
    greedy: dict[str, tuple[int, ...]]
    rounded: dict[str, Difference]
    last_bit: dict[str, Difference]
    k: F16
    v: F16
    first: F32
    logits: dict[str, F32]

    def save(self, path: Path) -> None:
        about = {"prompt": self.prompt, "answer": self.answer, "greedy": self.greedy,
                 "plans": {name: plan.to_json() for name, plan in self.plans.items()},
                 "rounded": {name: vars(d) for name, d in self.rounded.items()},
                 "last_bit": {name: vars(d) for name, d in self.last_bit.items()}}
        np.savez_compressed(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), k=self.k, v=self.v,
                            first=self.first, **{f"logits_{name}": rows for name, rows in self.logits.items()})

    @classmethod
    def load(cls, path: Path) -> Recording:
        with np.load(path) as file:
            about = json.loads(file["about"].tobytes())
            return cls(tuple(about["prompt"]), tuple(about["answer"]),
                       {name: Plan.from_json(text) for name, text in about["plans"].items()},
                       {name: tuple(ids) for name, ids in about["greedy"].items()},
                       {name: Difference(**d) for name, d in about["rounded"].items()},
                       {name: Difference(**d) for name, d in about["last_bit"].items()},
                       file["k"], file["v"], file["first"],
                       {name: file[f"logits_{name}"] for name in about["plans"]})


@dataclass(frozen=True)
class Agreement:
    """One policy. equal: greedy ids before the first that differs; margin: how much higher its own logit is there than
    that of the recorded id (None where all are equal)."""

    same: Difference
    allowed: float  # of same.rms
    end_to_end: Difference
    noise: Difference
    last_bit: Difference
    equal: int
    margin: float | None


def record(model: cocktail.Model) -> Recording:
    """What `compare` needs, from this model's backend (the CPU's)."""
    tokenizer, engine = model.tokenizer, model.engine
    context = tokenizer.decode(tokenizer.encode(DOCUMENT.read_text(encoding="utf-8"))[:CONTEXT_TOKENS])
    doc = model.read(context)
    plans = {name: doc.plan(QUESTION, policy=name, max_tokens=NEW) for name in POLICIES}
    prompt = doc.prompt(QUESTION)
    reading = read(engine, prompt, list(plans.values()))
    greedy = {name: tuple(reading.generate(SamplingParams(), NEW, (), i)) for i, name in enumerate(plans)}
    answer = greedy["fp16"][: STEPS + 1]
    logits = {name: reading.force(answer, i)[1:] for i, name in enumerate(plans)}
    k, v = keys_and_values(engine, prompt)
    recording = Recording(prompt, answer, plans, greedy, {}, {}, k, v, reading.first_logits, logits)

    rounding = Model(engine.config, engine.weights, _RoundsAttention(engine.backend))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    moved_k, moved_v = (_last_bit(x, rng) for x in (k, v))
    for name in plans:
        recording.rounded[name] = Difference.of(decode(rounding, recording, name, k, v), logits[name])
        recording.last_bit[name] = Difference.of(decode(engine, recording, name, moved_k, moved_v), logits[name])
    return recording


def compare(model: cocktail.Model, recorded: Recording) -> tuple[dict[str, Agreement], list[float]]:
    """How this model's backend agrees with the record, per policy; per layer, K's and V's difference, rms over rms."""
    engine = model.engine
    reading = read(engine, recorded.prompt, list(recorded.plans.values()))
    own_k, own_v = keys_and_values(engine, recorded.prompt)
    rng = np.random.default_rng(1)
    noisy_k, noisy_v = (_noise_like(x, own, rng) for x, own in ((recorded.k, own_k), (recorded.v, own_v)))
    agreements = {}
    for i, (name, expected) in enumerate(recorded.logits.items()):
        same = decode(engine, recorded, name, recorded.k, recorded.v)
        noisy = decode(engine, recorded, name, noisy_k, noisy_v)
        ids = tuple(reading.generate(SamplingParams(), NEW, (), i))
        equal = next((j for j, (a, b) in enumerate(zip(ids, recorded.greedy[name], strict=True)) if a != b), NEW)
        agreements[name] = Agreement(
            Difference.of(same, expected), ROUNDINGS * recorded.rounded[name].rms,
            Difference.of(reading.force(recorded.answer, i)[1:], expected), Difference.of(noisy, same),
            recorded.last_bit[name], equal,
            None if equal == NEW else _margin(reading, i, ids, recorded.greedy[name], equal))
    layers = [max(_relative(a[layer], b[layer]) for a, b in ((own_k, recorded.k), (own_v, recorded.v)))
              for layer in range(len(own_k))]
    return agreements, layers


def decode(engine: Model, recorded: Recording, policy: str, k: F16, v: F16) -> F32:
    """Logits (STEPS, V) along the recorded answer, from these K and V (L, G, T, D) packed by the policy's plan."""
    plan, backend, tokens = recorded.plans[policy], engine.backend, len(recorded.prompt)
    cache = Cache(backend, engine.config, plan.layout)
    cache.assign(plan)
    for layer, (k_layer, v_layer) in enumerate(zip(k, v, strict=True)):
        cache.pack(layer, backend.upload(k_layer), backend.upload(v_layer))
    rope = engine.rope(tokens, tokens + plan.layout.max_new)
    return Reading(engine, recorded.prompt, (cache,), rope, recorded.first).force(recorded.answer)[1:]


def keys_and_values(engine: Model, prompt: Sequence[int]) -> tuple[F16, F16]:
    """Every layer's K and V of a prompt, (L, G, T, D)."""
    keep = _Keep(engine)
    logits = engine.backend.empty((1, engine.config.vocab_size), np.float32)
    rope = engine.rope(len(prompt), len(prompt))
    for _ in prefill(engine, prompt, rope, [keep], logits, engine.backend.prefill_tile):  # type: ignore[list-item]
        pass
    return np.stack(keep.k), np.stack(keep.v)


class _Keep:
    """Stands in for a Cache: takes each layer's K and V to the host."""

    def __init__(self, engine: Model) -> None:
        self._backend = engine.backend
        self.k: list[F16] = []
        self.v: list[F16] = []

    def pack(self, layer: int, k: Any, v: Any) -> None:
        self.k.append(self._backend.download(k))
        self.v.append(self._backend.download(v))


class _RoundsAttention:
    """The CPU backend, but decode attention takes its query and leaves its output as FP16 would hold them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode_attention(self, q: Any, bound: Any, state: Any, out: Any) -> None:
        q[:] = q.astype(np.float16)
        self._backend.decode_attention(q, bound, state, out)
        out[:] = out.astype(np.float16)


def _last_bit(x: F16, rng: np.random.Generator) -> F16:
    """Every value moved to one of its two neighbours."""
    return np.nextafter(x, np.where(rng.random(x.shape) < 0.5, -np.inf, np.inf).astype(np.float16))


def _noise_like(x: F16, other: F16, rng: np.random.Generator) -> F16:
    """x plus normal noise as large as other - x is in each layer, KV head and channel."""
    size = np.sqrt(np.mean((other.astype(np.float32) - x) ** 2, axis=2, keepdims=True))
    return (x + size * rng.standard_normal(x.shape, np.float32)).astype(np.float16)


def _relative(a: F16, b: F16) -> float:
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    return float(np.sqrt(np.mean((a64 - b64) ** 2) / np.mean(b64**2)))


def _margin(reading: Reading, cache: int, ids: Sequence[int], recorded: Sequence[int], at: int) -> float:
    """By how much the reading's logits prefer its own id to the recorded one where the two answers part."""
    row = reading.force(ids[: at + 1], cache)[at]
    return float(row[ids[at]] - row[recorded[at]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.record:
        recording = record(cocktail.load(args.model, backend="cpu"))
        recording.save(args.record)
        print_table(["policy", "FP16 attention", "last bit"],
                    [[name, recording.rounded[name], recording.last_bit[name]] for name in recording.plans])
    if args.compare:
        agreements, layers = compare(cocktail.load(args.model, backend="cuda"), Recording.load(args.compare))
        report(agreements, layers)
        emit({"bench": "agree", **describe_run(), "kv_rms": layers,
              "policies": {name: {"same_most": a.same.most, "same_rms": a.same.rms, "same_allowed_rms": a.allowed,
                                  "end_to_end_most": a.end_to_end.most, "end_to_end_rms": a.end_to_end.rms,
                                  "noise_rms": a.noise.rms, "last_bit_rms": a.last_bit.rms, "greedy_equal": a.equal,
                                  "margin": a.margin} for name, a in agreements.items()}}, args.json)


def report(agreements: dict[str, Agreement], layers: Sequence[float]) -> None:
    """The table that the module's docstring explains; differences as largest (rms)."""
    print_table(["policy", "same K and V", "allowed rms", "end to end", "noise", "last bit on the CPU", "greedy equal"],
                [[name, a.same, f"{a.allowed:.5f}", a.end_to_end, a.noise, a.last_bit,
                  f"{a.equal} of {NEW}" + ("" if a.margin is None else f", then a margin of {a.margin:.3f}")]
                 for name, a in agreements.items()])
    print(f"K and V, rms of the difference over rms: {min(layers):.1e} in the best layer, {max(layers):.1e} in the "
          f"worst (allowed {FP16_PREFILL:.1e})")


if __name__ == "__main__":
    main()
