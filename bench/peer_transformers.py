"""transformers as a peer: a model of the same sizes with random FP16 weights, its FP16 cache and its quantized ones.

The quantized caches need optimum-quanto. Of its CUDA extension, which takes minutes to compile, a cache uses one
function, which unpacks codes: torch operations stand in for it, two passes over the values where the extension makes
one. Attention is torch's SDPA, and only the last token's logits are computed, as generate does. Decode steps leave
cuDNN's attention out, which SDPA prefers on recent GPUs: it plans anew for every length, some 60 ms a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.config import ModelConfig

CACHES = {"FP16": 16, "quanto 4-bit": 4, "quanto 2-bit": 2}
DECODE_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Figures:
    """Seconds; memory in bytes: the most that torch had handed out."""

    ttft: float = 0.0
    steps: list[float] = field(default_factory=list)
    memory: int = 0


class Peer:
    """The model on the current GPU. Call `close` before others need the memory."""

    def __init__(self, config: ModelConfig):
        self._config = transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_positions, tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa")
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device("cuda"), _uninitialized():
                self._model: Any = transformers.LlamaForCausalLM(self._config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        for weight in self._model.parameters():
            weight.data.normal_(0, weight.shape[-1] ** -0.5) if weight.ndim == 2 else weight.data.fill_(1)

    @torch.inference_mode()
    def measure(self, ids: Sequence[int], cache: str, steps: int) -> Figures:
        """A prefill of ids into one of CACHES and `steps` greedy steps, after the same once with fewer steps."""
        prompt = torch.tensor([ids], device="cuda")
        self._answer(prompt, cache, 2)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        figures = self._answer(prompt, cache, steps)
        figures.memory = torch.cuda.max_memory_allocated()
        return figures

    def close(self) -> None:
        del self._model
        torch.cuda.empty_cache()

    def _answer(self, prompt: Any, cache: str, steps: int) -> Figures:
        bits = CACHES[cache]
        past = transformers.DynamicCache(config=self._config) if bits == 16 else transformers.QuantizedCache(
            backend="quanto", config=self._config, nbits=bits)
        figures, ids = Figures(), prompt
        torch.cuda.synchronize()
        for step in range(steps + 1):
            begin = time.perf_counter()
            with sdpa_kernel(DECODE_ATTENTION) if step else nullcontext():
                out = self._model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            ids.item()  # waits
            seconds = time.perf_counter() - begin
            if step:
                figures.steps.append(seconds)
            else:
                figures.ttft = seconds
        return figures


def prepare_quanto() -> str | None:
    """Make optimum-quanto's caches run on the GPU; None, or why they cannot."""
    try:
        from optimum.quanto.library.extensions import get_extension
    except ImportError as error:
        return f"not run ({error})"
    get_extension("quanto_cuda")._lib = SimpleNamespace(unpack=_unpack)
    return None


def _unpack(codes: Any, bits: int) -> Any:
    """uint8 (N, ...) with 8 / bits codes to a byte -> (8 / bits * N, ...), the lowest bits first."""
    parts = torch.empty((8 // bits, *codes.shape), dtype=torch.uint8, device=codes.device)
    for i, part in enumerate(parts):
        torch.bitwise_right_shift(codes, bits * i, out=part)
    return parts.bitwise_and_((1 << bits) - 1).flatten(0, 1)


def _uninitialized() -> Any:
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()
