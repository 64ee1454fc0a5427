"""Small checkpoints in every layout that the converters read, for tests."""

from __future__ import annotations

import argparse
import inspect
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from safetensors.numpy import save_file
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HF

from converters.model import tensor_shapes
from runtime.config import ModelConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 600, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ORIGINAL_NAMES = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
OUTER = {"model.embed_tokens": ("token_embd", "tok_embeddings"), "model.norm": ("output_norm", "norm"),
         "lm_head": ("output", "output")}  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
CORPUS = [*inspect.getsource(argparse).splitlines(),
          "naïve café — 12,345.67 日本語 🙂👍🏽 e\u0301 ОЧЕНЬ хорошо مرحبا १२३"] * 2  # fmt: skip


def weights(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(ModelConfig.from_json(config))
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def renamed(name: str, names: dict[str, str], layer: str, outer: int) -> str:
    base, _, kind = name.rpartition(".")
    if base in OUTER:
        return f"{OUTER[base][outer]}.{kind}"
    _, _, index, part = base.split(".", 3)
    return f"{layer}.{index}.{names[part]}.{kind}"


def interleaved(name: str, array: np.ndarray, config: dict[str, Any] = CONFIG) -> np.ndarray:
    """Q and K rows as llama.cpp's and Meta's files hold them."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for part, n in heads.items():
        if f".{part}." in name:
            return array.reshape(n, 2, config["head_dim"] // 2, -1).swapaxes(1, 2).reshape(array.shape)
    return array


def bpe(pre: Any = None) -> HF:
    """A byte-level BPE tokenizer of 600 tokens trained on CORPUS."""
    tokenizer = HF(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, **options))
    return tokenizer


def split(regex: str) -> Any:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), to_bytes])


@cache
def spm() -> bytes:
    """A sentencepiece BPE model of 600 pieces trained on CORPUS."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2, character_coverage=0.98,
    )  # fmt: skip
    return out.getvalue()


def vocabulary(tokenizer: HF) -> tuple[list[str], list[int], list[str]]:
    """tokens, token types and merges as a GGUF file holds them."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [3 if token in SPECIAL else 1 for token in tokens], [" ".join(merge) for merge in model["merges"]]


def write_gguf(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] = CONFIG, *, tokenizer: Any = None,
               pre: str | None = "smollm", raw: dict[str, Any] | None = None, **keys: Any) -> Path:  # fmt: skip
    """A GGUF file of `tensors` (Hugging Face names and order). `raw`: name -> GGML type of the bytes given."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if callable(tokenizer):
        tokenizer(writer)
    else:
        tokens, kinds, merges = vocabulary(tokenizer or bpe())
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    for name, array in tensors.items():
        if name == "rope_freqs.weight":
            writer.add_tensor(name, array)
        else:
            kind = (raw or {}).get(name)
            writer.add_tensor(renamed(name, GGUF_NAMES, "blk", 0), interleaved(name, array, config), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_mistral(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] = CONFIG, **params: Any) -> None:
    save_file({renamed(name, ORIGINAL_NAMES, "layers", 1): np.ascontiguousarray(interleaved(name, array, config))
               for name, array in tensors.items()}, folder / "consolidated.safetensors")  # fmt: skip
    (folder / "params.json").write_text(json.dumps({
        "dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
        "vocab_size": config["vocab_size"], "rope_theta": 1e6,
    } | params))  # fmt: skip


def save_meta(folder: Path, tensors: dict[str, np.ndarray], parts: int, config: dict[str, Any] = CONFIG,
              embedding_axis: int = 0, **params: Any) -> None:  # fmt: skip
    for part in range(parts):
        state = {"rope.freqs": torch.zeros(8)}
        for name, array in tensors.items():
            whole = torch.from_numpy(np.ascontiguousarray(interleaved(name, array, config))).to(torch.bfloat16)
            axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            axis = embedding_axis if "embed" in name else axis
            piece = whole if whole.ndim == 1 else whole.chunk(parts, axis)[part].clone()
            state[renamed(name, ORIGINAL_NAMES, "layers", 1)] = piece
        torch.save(state, folder / f"consolidated.{part:02}.pth")
    (folder / "params.json").write_text(json.dumps(
        {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 32}
        | params
    ))  # fmt: skip


def put_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(bpe().to_str())
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')


def save_torch(folder: Path, tensors: dict[str, np.ndarray], sharded: bool) -> None:
    state = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in tensors.items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    q = "model.layers.0.self_attn.q_proj.weight"
    state[q] = torch.from_numpy(np.ascontiguousarray(tensors[q].T)).T  # not contiguous
    (folder / "config.json").write_text(json.dumps(CONFIG))
    put_tokenizer(folder)
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for shard in set(places.values()):
        torch.save({name: state[name] for name in state if places[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


