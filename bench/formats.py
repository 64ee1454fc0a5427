"""What each storage format costs in quality. `python -m bench.formats --model PATH [--documents 8]`

Every candidate replaces K only, V only, or both, in all chunks but the sink; the caches hold its decoded values in FP16
regions, so that formats compare without kernels of their own. KL to the FP16 cache along its own greedy answer.

hch: per rotated channel over the chunk's tokens (runtime.formats' K). mid: per token, symmetric mid-rise levels
(runtime.formats' V). plain: per token and head, min-max with an FP16 scale and zero, not rotated.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

import cocktail
from cocktail.verify import divergence, log_softmax
from runtime import formats
from runtime.cache import Cache
from runtime.engine import Reading
from runtime.model import prefill
from runtime.plan import FP16
from runtime.sampler import SamplingParams

Half = npt.NDArray[np.float16]
RoundTrip = Callable[[Half], npt.NDArray[np.float32]]  # (n, G, C, D) -> what attention sees

QUESTION = "Explain in detail what this text says."


def exact(x: Half) -> npt.NDArray[np.float32]:
    return x.astype(np.float32)


def hch(bits: int) -> RoundTrip:
    return lambda x: formats.decode_k(formats.encode_k(x, bits))


def mid(bits: int) -> RoundTrip:
    return lambda x: formats.decode_v(formats.encode_v(x, bits))


def plain(bits: int) -> RoundTrip:
    def run(x: Half) -> npt.NDArray[np.float32]:
        y = x.astype(np.float32)
        low, high = y.min(axis=-1, keepdims=True), y.max(axis=-1, keepdims=True)
        scale = np.maximum((high - low) / (2**bits - 1), 1e-8).astype(np.float16).astype(np.float32)
        low = low.astype(np.float16).astype(np.float32)
        return np.clip(np.rint((y - low) / scale), 0, 2**bits - 1) * scale + low
    return run


def bits_of(name: str, bits: int, chunk: int, dim: int) -> float:
    """Bits per value with all metadata."""
    if name == "exact":
        return 16.0
    if name == "plain":
        return bits + 32 / dim
    codes, meta, _ = formats.block_bytes("K" if name == "hch" else "V", bits, chunk, dim)
    return 8 * (codes + meta) / (chunk * dim)


FORMATS: dict[str, Callable[[int], RoundTrip]] = {"hch": hch, "mid": mid, "plain": plain, "exact": lambda bits: exact}
CANDIDATES = [  # (K format, K bits, V format, V bits)
    *((k, b, "exact", 16) for k in ("hch", "mid", "plain") for b in (2, 3, 4)),
    *(("exact", 16, v, b) for v in ("mid", "hch", "plain") for b in (2, 4)),
    ("hch", 3, "mid", 2), ("hch", 3, "hch", 2), ("mid", 3, "mid", 2), ("hch", 4, "mid", 4), ("mid", 4, "mid", 4),
    ("hch", 8, "mid", 8),
]


class _Decoded:
    """A backend whose pack stores what a format would give back. All else is the real one's."""

    def __init__(self, backend, k: RoundTrip, v: RoundTrip):
        self._backend, self._k, self._v = backend, k, v

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def pack(self, k, v, arena, span, starts, chunk):
        # The sink stays exact; its chunk is the first one.
        rows = starts[1:, None] + np.arange(chunk)
        k, v = self._backend.upload(k), self._backend.upload(v)
        for x, through in ((k, self._k), (v, self._v)):
            decoded = through(np.array(x[:, rows]).swapaxes(0, 1))
            x[:, rows] = decoded.swapaxes(0, 1).astype(np.float16)
        self._backend.pack(k, v, arena, span, starts, chunk)


def measure(model: cocktail.Model, context: str, answer_tokens: int) -> npt.NDArray[np.float64]:
    """(candidates, answer tokens) KL to FP16 in nats; the first token, which comes from the exact prefill, is left out.
    """
    doc = model.read(context)
    plan = doc.plan(QUESTION, policy="fp16", max_tokens=answer_tokens)
    assert plan.layout.tiers == (FP16,)
    engine, prompt = model.engine, doc.prompt(QUESTION)
    wraps = [engine.backend] + [_Decoded(engine.backend, FORMATS[k](kb), FORMATS[v](vb)) for k, kb, v, vb in CANDIDATES]
    caches = tuple(Cache(wrap, engine.config, plan.layout) for wrap in wraps)
    for cache in caches:
        cache.assign(plan)
    rope = engine.rope(len(prompt), len(prompt) + answer_tokens)
    logits = engine.backend.empty((1, engine.config.vocab_size), np.float32)
    for _ in prefill(engine, prompt, rope, caches, logits, engine.backend.prefill_tile):
        pass
    reading = Reading(engine, tuple(prompt), caches, rope, engine.backend.download(logits).copy())
    answer = list(reading.generate(SamplingParams(), answer_tokens, ()))
    logs = [log_softmax(reading.force(answer, i)[1:]) for i in range(len(caches))]
    return np.array([divergence(logs[0], other) for other in logs[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--context-tokens", type=int, default=2048)
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    model = cocktail.load(args.model, threads=args.threads)
    ids = model.tokenizer.encode("\n\n".join(pydoc_data.topics.topics.values()))
    size = args.context_tokens
    if len(ids) < size * args.documents:
        raise SystemExit(f"the text has {len(ids)} tokens; {args.documents} documents of {size} need more")
    runs = [measure(model, model.tokenizer.decode(ids[i * size : (i + 1) * size]), args.answer_tokens)
            for i in range(args.documents)]
    kl = np.concatenate(runs, axis=1)
    dim, rows = model.config.head_dim, []
    print(f"{'K':>9} {'V':>9} {'bpv K':>7} {'bpv V':>7} {'KL mean':>9} {'KL p99':>9}   "
          f"{args.documents} documents of {size} tokens, {kl.shape[1]} answer tokens")
    for (k, kb, v, vb), values in zip(CANDIDATES, kl, strict=True):
        sizes = bits_of(k, kb, 32, dim), bits_of(v, vb, 32, dim)
        rows.append([k, kb, v, vb, *sizes, float(values.mean()), float(np.percentile(values, 99))])
        print(f"{k + str(kb):>9} {v + str(vb):>9} {sizes[0]:7.2f} {sizes[1]:7.2f} "
              f"{rows[-1][-2]:9.4f} {rows[-1][-1]:9.3f}")
    print(json.dumps({"bench": "formats", "rows": rows}))


if __name__ == "__main__":
    main()
