"""A model's weights on a backend: every tensor read by name, shape and dtype, none left over."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from runtime.backend import Array, Backend, Matrix
from runtime.checkpoint import Checkpoint, Tensor

_HASHED = 1024  # values of every tensor: a page that loading touches anyway, and fine-tunes differ in it


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Matrices as stored (out, in), vectors float32. Letters as in runtime.backend."""

    attn_norm: Array  # (E,)
    wq: Matrix  # (H*D, E)
    wk: Matrix  # (G*D, E)
    wv: Matrix  # (G*D, E)
    wo: Matrix  # (E, H*D)
    bq: Array | None  # (H*D,)
    bk: Array | None  # (G*D,)
    bv: Array | None  # (G*D,)
    bo: Array | None  # (E,)
    mlp_norm: Array  # (E,)
    gate: Matrix  # (I, E)
    up: Matrix  # (I, E)
    down: Matrix  # (E, I)
    gate_bias: Array | None  # (I,)
    up_bias: Array | None  # (I,)
    down_bias: Array | None  # (E,)


@dataclass(frozen=True)
class Weights:
    """The whole model. `nbytes` counts matrices and vectors as the backend holds them, a tied head once.

    digest: 16 hex digits of every tensor's name, dtype, shape and first page, the same on every backend and however the
    checkpoint is cut into files; "" for weights that come from none.
    """

    embed: Matrix  # (V, E)
    layers: tuple[LayerWeights, ...]  # L
    norm: Array  # (E,)
    head: Matrix  # (V, E); the same object as embed when tied
    nbytes: int
    digest: str = ""


def load_weights(checkpoint: Checkpoint, backend: Backend) -> Weights:
    """Read every tensor of the checkpoint's config onto the backend. Raises CheckpointError, also for left-overs."""
    config, reader = checkpoint.config, _Reader(checkpoint, backend)
    E, I, V = config.hidden_size, config.intermediate_size, config.vocab_size  # noqa: E741
    q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def layer(index: int) -> LayerWeights:
        base = f"model.layers.{index}."
        attention, mlp = base + "self_attn.", base + "mlp."
        wq, bq = reader.linear(attention + "q_proj", q_size, E, config.attention_bias)
        wk, bk = reader.linear(attention + "k_proj", kv_size, E, config.attention_bias)
        wv, bv = reader.linear(attention + "v_proj", kv_size, E, config.attention_bias)
        wo, bo = reader.linear(attention + "o_proj", E, q_size, config.attention_bias)
        gate, gate_bias = reader.linear(mlp + "gate_proj", I, E, config.mlp_bias)
        up, up_bias = reader.linear(mlp + "up_proj", I, E, config.mlp_bias)
        down, down_bias = reader.linear(mlp + "down_proj", E, I, config.mlp_bias)
        return LayerWeights(
            attn_norm=reader.vector(base + "input_layernorm.weight", E),
            mlp_norm=reader.vector(base + "post_attention_layernorm.weight", E),
            wq=wq, wk=wk, wv=wv, wo=wo, bq=bq, bk=bk, bv=bv, bo=bo,
            gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias,
        )

    embed = reader.matrix("model.embed_tokens.weight", V, E)
    layers = tuple(layer(index) for index in range(config.n_layers))
    norm = reader.vector("model.norm.weight", E)
    head = embed if config.tie_embeddings else reader.matrix("lm_head.weight", V, E)
    checkpoint.finish()
    return Weights(embed, layers, norm, head, reader.nbytes, reader.hash.hexdigest()[:16])


class _Reader:
    """Reads from the checkpoint onto the backend and counts the bytes held there."""

    def __init__(self, checkpoint: Checkpoint, backend: Backend) -> None:
        self.checkpoint, self.backend = checkpoint, backend
        self.nbytes = 0
        self.hash = hashlib.sha256()

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        tensor = self._read(name, (rows, columns))
        self.nbytes += tensor.data.nbytes
        return self.backend.matrix(tensor.data, tensor.dtype)

    def vector(self, name: str, size: int) -> Array:
        tensor = self._read(name, (size,))
        self.nbytes += 4 * size  # float32 on every backend
        return self.backend.vector(tensor.data, tensor.dtype)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.read(name, shape)
        self.hash.update(f"{name} {tensor.dtype} {shape}".encode())
        self.hash.update(tensor.data.reshape(-1)[:_HASHED].tobytes())
        return tensor

    def linear(self, name: str, rows: int, columns: int, bias: bool) -> tuple[Matrix, Array | None]:
        return (self.matrix(name + ".weight", rows, columns),
                self.vector(name + ".bias", rows) if bias else None)
