"""Does a model fit this machine: its weights, and the cache of a context at several widths, against free memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from shutil import disk_usage

from cocktail.policies import load_policy
from cocktail.summary import size
from runtime import model
from runtime.arena import ArenaLayout
from runtime.checkpoint import Checkpoint
from runtime.config import ModelConfig
from runtime.diagnosis import Finding
from runtime.errors import CocktailError
from runtime.master import is_keepable, scratch_folder, shape_of
from runtime.plan import DocumentShape
from runtime.tokenizer import Tokenizer

AREA = "model"
CONTEXTS = (4096, 32768)  # tokens; and the model's own limit
CHUNK, PREFIX, SUFFIX, MAX_NEW = 32, 32, 64, 256  # a chat header, a question, an answer of usual sizes
TILE = 2048  # tokens of a prefill step, at most
WIDTHS = {  # most bytes first
    "FP16": ("fp16", {}), "K8V8": ("uniform", {"tier": "K8V8"}), "K4V4": ("uniform", {"tier": "K4V4"}),
    "budget": ("budget", {}),
}


def fit(path: str | Path, context_tokens: int | None, machine: Sequence[Finding]) -> Iterator[Finding]:
    """machine: of runtime.diagnosis.diagnose, for what is free and how fast it is read, on the CPU and on a GPU.

    context_tokens: the one to look at; None for several.
    """
    try:
        with Checkpoint.open(path) as checkpoint:
            config, weights, read = checkpoint.config, checkpoint.nbytes, step_bytes(checkpoint)
            yield Finding(AREA, "checkpoint", "pass", f"{config.architecture}, {config.n_layers} layers, "
                          f"{config.n_heads} query and {config.n_kv_heads} KV heads of {config.head_dim}, "
                          f"{config.max_positions:,} positions, {size(weights)} of weights")
            tokenizer = Tokenizer.from_checkpoint(checkpoint)
            yield Finding(AREA, "tokenizer", "pass", f"{tokenizer.vocab_size:,} ids")
    except CocktailError as error:
        yield Finding(AREA, str(path), "fail", " ".join(str(error).split()), "see the message; `python -m converters` "
                      "converts GGUF, Mistral, Meta and torch checkpoints")
        return
    room = config.max_positions - PREFIX - SUFFIX - MAX_NEW
    if room < (wanted := context_tokens or CHUNK):
        yield Finding(AREA, f"{wanted:,} tokens", "fail", f"the model has {config.max_positions:,} positions; "
                      f"a question and {MAX_NEW} tokens of answer leave {max(room, 0):,}", "shorten the context, or "
                      "take a model with more positions")
        return
    contexts = [context_tokens] if context_tokens is not None else [n for n in CONTEXTS if n < room] + [room]
    for backend in ("cpu", "cuda"):
        values = {finding.subject: finding.value for finding in machine if finding.area == backend}
        free = values.get("memory")
        if free is not None:
            for context in contexts:
                yield _fit(backend, config, weights, read, context, free, values.get("memory rate"))


def cache_bytes(config: ModelConfig, context_tokens: int) -> dict[str, int]:
    """Bytes of the whole cache at each of WIDTHS, exactly as it would be allocated."""
    shape = DocumentShape(n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, chunk=CHUNK,
                          n_chunks=context_tokens // CHUNK, prefix=PREFIX, remainder=context_tokens % CHUNK,
                          suffix=SUFFIX, max_new=MAX_NEW, window=config.sliding_window)
    return {name: ArenaLayout(load_policy(policy, **options).layout(shape)).nbytes
            for name, (policy, options) in WIDTHS.items()}


def prefill_bytes(config: ModelConfig, prompt_tokens: int, max_new: int = MAX_NEW) -> int:
    """What reading a prompt takes besides weights and cache: what a prefill allocates, and RoPE's tables."""
    return model.prefill_bytes(config, prompt_tokens, TILE) + 4 * config.head_dim * (prompt_tokens + max_new)


def step_bytes(checkpoint: Checkpoint) -> int:
    """What of the weights every token has to read: all but an embedding that is not the head too."""
    config = checkpoint.config
    if config.tie_embeddings:
        return checkpoint.nbytes
    shape = config.vocab_size, config.hidden_size
    return checkpoint.nbytes - checkpoint.read("model.embed_tokens.weight", shape).data.nbytes


def kept_bytes(config: ModelConfig, context_tokens: int) -> int:
    """The exact K and V that a document keeps in a file for its second question."""
    return 2 * prod(shape_of(config, PREFIX + context_tokens))


def _fit(backend: str, config: ModelConfig, weights: int, read: int, context: int, free: float,
         rate: float | None) -> Finding:
    """weights: bytes of all; read: of those that a token reads."""
    caches, prefill = cache_bytes(config, context), prefill_bytes(config, PREFIX + context + SUFFIX)
    subject = f"{context:,} tokens, {backend}"
    found = (f"cache {', '.join(f'{size(nbytes)} {name}' for name, nbytes in caches.items())}; prefill "
             f"{size(prefill)}; {size(free)} free")
    if rate:
        unfilled = 4 * config.n_layers * config.n_kv_heads * config.head_dim * MAX_NEW
        floors = [1e3 * (read + caches[name] - unfilled) / rate for name in ("budget", "FP16")]
        found += f"; a token takes at least {floors[0]:.1f} ms ({floors[1]:.1f} FP16)"
    held = prefill + (weights if backend == "cuda" else 0)  # the CPU maps the weights: they need not stay in memory
    kept, disk = kept_bytes(config, context), scratch_folder()
    if backend == "cpu" and is_keepable(config):
        found += f"; a second question needs {size(kept)} in {disk}"
    if held + caches["budget"] > free:
        return Finding(AREA, subject, "fail", found, "it does not fit: take a shorter context or a smaller model, or "
                       "free memory")
    fitting = next(name for name, nbytes in caches.items() if held + nbytes <= free)
    if fitting != "FP16":
        return Finding(AREA, subject, "warn", found, f"FP16 does not fit; {fitting} does, and --policy budget too")
    if backend == "cpu" and weights + held + caches["FP16"] > free:
        return Finding(AREA, subject, "warn", found, "weights and an FP16 cache do not fit together: weights would be "
                       "read from the disk for every token; free memory, or take --policy budget")
    if backend == "cpu" and is_keepable(config) and kept > (room := _room(disk)):
        return Finding(AREA, subject, "warn", found, f"{disk} has {size(room)} left, so only single questions are "
                       "possible; name a folder with more room in TMPDIR")
    return Finding(AREA, subject, "pass", found)


def _room(folder: Path) -> int:
    try:
        return disk_usage(folder).free
    except OSError:  # TMPDIR names a folder that is not there
        return 0
