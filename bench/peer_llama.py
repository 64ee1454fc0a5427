"""llama.cpp as a peer: the same weights as an F16 GGUF, token ids in, greedy ids and timings out.

Driven through llama_decode directly, so that nothing but the model runs in the timed region. The GGUF carries no
vocabulary ("no_vocab"): both sides are fed the ids of our tokenizer.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import old_glibc
from runtime.checkpoint import Checkpoint
from runtime.config import ModelConfig

BATCH = 512  # tokens per llama_decode call in prefill; llama.cpp's own default


@dataclass(frozen=True)
class Timing:
    """prefill_s for the prompt; step_s one entry per decoded token; ids the greedy continuation, step_s one shorter."""

    prefill_s: float
    step_s: tuple[float, ...]
    ids: tuple[int, ...]


class Peer:
    """One llama.cpp context with an F16 KV cache; `flash` chooses its flash-attention kernel."""

    def __init__(self, gguf: str | Path, *, threads: int, n_ctx: int, flash: bool) -> None:
        self.threads, self.flash = threads, flash
        self._ffi, self._lib = _library()
        self._quiet = self._ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
        self._lib.llama_log_set(self._quiet, self._ffi.NULL)
        self._lib.llama_backend_init()
        self._model = self._lib.llama_load_model_from_file(str(gguf).encode(), self._model_params())
        if self._model == self._ffi.NULL:
            raise RuntimeError(f"{gguf}: llama.cpp cannot load it")
        self._context = self._lib.llama_init_from_model(self._model, self._context_params(n_ctx))
        if self._context == self._ffi.NULL:
            raise RuntimeError(f"{gguf}: llama.cpp makes no context of {n_ctx} tokens")
        self._memory = self._lib.llama_get_memory(self._context)
        self.vocab_size: int = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def greedy(self, prompt_ids: Sequence[int], n_tokens: int, *, depth: int = 0) -> Timing:
        """Continue `prompt_ids` greedily by `n_tokens`; the first `depth` positions must already be in the cache.

        What lies in the cache beyond `depth` is dropped first, so one prefill serves many repetitions.
        """
        self._lib.llama_memory_seq_rm(self._memory, 0, depth, -1)
        start = time.perf_counter()
        for at in range(depth, len(prompt_ids), BATCH):
            self._decode(prompt_ids[at : at + BATCH])
        token = self._best()
        ids, steps, prefill_s = [token], [], time.perf_counter() - start
        for _ in range(n_tokens - 1):
            start = time.perf_counter()
            self._decode([token])
            token = self._best()
            steps.append(time.perf_counter() - start)
            ids.append(token)
        return Timing(prefill_s, tuple(steps), tuple(ids))

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _model_params(self) -> Any:
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        return params

    def _context_params(self, n_ctx: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, BATCH, BATCH, 1
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = int(self.flash)
        return params

    def _decode(self, ids: Sequence[int]) -> None:
        """Positions follow on from the cache; only the last token's logits are computed (llama_batch_get_one)."""
        tokens = self._ffi.new("llama_token[]", list(ids))
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status} on {len(ids)} tokens")

    def _best(self) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.frombuffer(self._ffi.buffer(logits, 4 * self.vocab_size), np.float32).argmax())


@functools.cache
def _library() -> tuple[Any, Any]:
    """The wheel's cffi declarations and its libllama, made loadable where the system's glibc is too old for it."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi

    spec = importlib.util.find_spec("llama_cpp_py_sync")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    if old_glibc.needed():
        copies = Path(tempfile.mkdtemp(prefix="llama-cpp-"))
        atexit.register(shutil.rmtree, copies)
        old_glibc.copy_loadable(folder, copies)
        folder = copies
    ffi = get_ffi()
    return ffi, ffi.dlopen(str(folder / "libllama.so"))


def write_f16_gguf(model: str | Path, out: str | Path) -> None:
    """Write our checkpoint's weights as an F16 GGUF (norms in F32), Q and K rows in llama.cpp's rotary order."""
    import gguf

    with Checkpoint.open(model) as checkpoint:
        config = checkpoint.config
        if config.rope.kind != "default" or config.attention_bias or config.mlp_bias:
            raise ValueError(f"{model}: the GGUF writer of this bench knows plain RoPE without biases only")
        writer = gguf.GGUFWriter(str(out), "llama")
        _write_header(writer, config)
        for name, shape, heads in _tensors(config):
            tensor = checkpoint.read(_HF[name.split(".")[-1]].format(_layer(name)), shape)
            data = tensor.data
            if tensor.dtype == "BF16":
                data = (data.astype(np.uint32) << 16).view(np.float32)
            data = data.astype(np.float32 if len(shape) == 1 else np.float16)
            writer.add_tensor(f"{name}.weight", _interleave(data, heads) if heads else data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


_HF = {  # last part of the GGUF name -> Hugging Face name
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "attn_q": "model.layers.{}.self_attn.q_proj.weight",
    "attn_k": "model.layers.{}.self_attn.k_proj.weight",
    "attn_v": "model.layers.{}.self_attn.v_proj.weight",
    "attn_output": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "ffn_gate": "model.layers.{}.mlp.gate_proj.weight",
    "ffn_up": "model.layers.{}.mlp.up_proj.weight",
    "ffn_down": "model.layers.{}.mlp.down_proj.weight",
}


def _tensors(config: ModelConfig) -> list[tuple[str, tuple[int, ...], int]]:
    """(GGUF name without ".weight", shape, rotary heads of Q and K or 0) of every tensor."""
    E, I, V = config.hidden_size, config.intermediate_size, config.vocab_size  # noqa: E741
    H, G, D = config.n_heads, config.n_kv_heads, config.head_dim
    found: list[tuple[str, tuple[int, ...], int]] = [("token_embd", (V, E), 0), ("output_norm", (E,), 0)]
    if not config.tie_embeddings:
        found.append(("output", (V, E), 0))
    for layer in range(config.n_layers):
        found += [
            (f"blk.{layer}.attn_norm", (E,), 0), (f"blk.{layer}.ffn_norm", (E,), 0),
            (f"blk.{layer}.attn_q", (H * D, E), H), (f"blk.{layer}.attn_k", (G * D, E), G),
            (f"blk.{layer}.attn_v", (G * D, E), 0), (f"blk.{layer}.attn_output", (E, H * D), 0),
            (f"blk.{layer}.ffn_gate", (I, E), 0), (f"blk.{layer}.ffn_up", (I, E), 0),
            (f"blk.{layer}.ffn_down", (E, I), 0),
        ]
    return found


def _layer(name: str) -> str:
    return name.split(".")[1] if name.startswith("blk.") else ""


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from Hugging Face's two halves to llama.cpp's interleaved pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _write_header(writer: Any, config: ModelConfig) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)  # mostly F16
