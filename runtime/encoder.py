"""BERT encoders on this runtime's own kernels: a folder's config.json and model.safetensors, ids in, embeddings out.

The family: learned positions, token types, layers that norm after each half (post-LN), GELU by the error function,
attention in both directions. Sequences lie packed one after the other, so no row is padding; texts, prompts and what
sentence-transformers adds to such a folder are cocktail.scorers' affair.

Letters: N sequences, B of them in a batch, T rows of a batch, E hidden size, H heads, I MLP size, P positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from runtime.backend import Array, Matrix
from runtime.checkpoint import SafetensorsFile, Tensor, parse_json_object, read_file
from runtime.errors import BackendError, CheckpointError, OutOfMemory, UnsupportedEncoder

Pooling = Literal["mean", "cls"]
_PREFIXES = ("", "bert.")  # of tensor names: a bare model, or one saved under a head


class EncoderBackend(Protocol):
    """The operations of an encoder's layer. Every method checks shapes and dtypes; results are deterministic."""

    architecture: str  # what the kernels are compiled for, such as "avx512" or "sm_90"
    tile: int  # rows of one batch: enough to keep the device busy, few enough to bound its memory

    def beside(self) -> AbstractContextManager[Any]:
        """A context for the calls of one embedding; on a GPU they run on a stream of their own, of high priority."""

    def check_model(self, heads: int, head_dim: int) -> None:
        """Raises RuntimeError, naming what is unsupported, where there is no kernel for such attention."""

    def matrix(self, *parts: Tensor) -> Matrix:
        """Weights (out, in) from host memory; several share their inputs and are multiplied as one."""

    def vector(self, data: npt.NDArray[np.float32]) -> Array: ...

    def upload(self, data: npt.NDArray[np.int32]) -> Array: ...

    def download(self, array: Array) -> npt.NDArray[np.float32]: ...

    def rows(self, T: int, width: int) -> Array:
        """A buffer (T, width) in the type in which activations pass from one operation to the next."""

    def embed(self, ids: Array, positions: Array, words: Matrix, places: Array, norm: Norm, x: Array) -> None:
        """x (T, E) = LayerNorm(words[ids] + places[positions]); ids, positions (T,) int32."""

    def attention(self, x: Array, weight: Matrix, bias: Array, starts: Array, longest: int, heads: int,
                  out: Array) -> None:
        """out (T, E): attention of every row to all rows of its sequence.

        weight, bias: those of q, k and v, (3 * E, E) and (3 * E,). starts: (B + 1,) int32, each sequence's first row
        and the end; longest: rows of the longest sequence. Scale is D**-0.5.
        """

    def add(self, h: Array, weight: Matrix, bias: Array, norm: Norm, x: Array) -> None:
        """x (T, E) = LayerNorm(x + h @ weight.T + bias)."""

    def gelu(self, x: Array, weight: Matrix, bias: Array, out: Array) -> None:
        """out (T, I) = GELU(x @ weight.T + bias)."""

    def pool(self, x: Array, starts: Array, pooling: Pooling) -> Array:
        """(B, E) float32: each sequence's mean row, or its first."""


@dataclass(frozen=True)
class EncoderConfig:
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    intermediate_size: int
    max_positions: int
    token_types: int
    norm_eps: float

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> EncoderConfig:
        """Raises UnsupportedEncoder for another family than BERT, CheckpointError for a config that makes no sense."""
        family = config.get("model_type")
        if not isinstance(family, str):
            raise CheckpointError(f"config.json: model_type is {family!r}; expected the name of a family, such as bert")
        fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
        for key, wanted in fixed.items():
            if config.get(key, wanted) != wanted:
                raise UnsupportedEncoder(f"config.json: {key} is {config[key]!r}; the encoder kernels have {wanted!r}")
        eps = config.get("layer_norm_eps", 1e-12)
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise CheckpointError(f"config.json: layer_norm_eps is {eps!r}; expected a number between 0 and 1")
        found = cls(_size(config, "vocab_size"), _size(config, "hidden_size"), _size(config, "num_hidden_layers"),
                    _size(config, "num_attention_heads"), _size(config, "intermediate_size"),
                    _size(config, "max_position_embeddings"), _size(config, "type_vocab_size"), eps)
        if found.hidden_size % found.n_heads:
            raise CheckpointError(f"config.json: hidden_size {found.hidden_size} is no multiple of num_attention_heads "
                                  f"{found.n_heads}")
        return found


@dataclass(frozen=True)
class Norm:
    """LayerNorm's weight and bias, float32 (E,)."""

    weight: Array
    bias: Array
    eps: float


@dataclass(frozen=True)
class EncoderLayer:
    """One layer; matrices (out, in), vectors float32."""

    qkv: Matrix  # (3*E, E)
    qkv_bias: Array  # (3*E,)
    output: Matrix  # (E, E)
    output_bias: Array  # (E,)
    attention_norm: Norm
    up: Matrix  # (I, E)
    up_bias: Array  # (I,)
    down: Matrix  # (E, I)
    down_bias: Array  # (E,)
    mlp_norm: Norm


class Encoder:
    """A loaded model. Keeps its weights and nothing of what it embedded."""

    def __init__(self, folder: Path, backend: EncoderBackend) -> None:
        """Raises CheckpointError, UnsupportedEncoder, BackendError, OutOfMemory."""
        self.config = EncoderConfig.from_json(parse_json_object(read_file(folder / "config.json"),
                                                                str(folder / "config.json")))
        self._backend = backend
        try:
            backend.check_model(self.config.n_heads, self.config.hidden_size // self.config.n_heads)
        except RuntimeError as error:
            raise UnsupportedEncoder(f"the kernels cannot run this model: {error}") from error
        try:
            with backend.beside():
                self._load(_Reader(_weights(folder)))
        except MemoryError as error:
            raise OutOfMemory(f"the encoder's weights do not fit: {error}") from error
        except RuntimeError as error:  # a kernel error: of a value, or of a library that is missing
            raise BackendError(f"the encoder cannot be loaded: {error}") from error

    def embed(self, sequences: Iterable[Sequence[int]], pooling: Pooling) -> Iterator[Array]:
        """(B, E) float32 per batch of sequences, in order, in the backend's memory; work may go on until it is
        downloaded. Sequences are ids with their special tokens, 1 to max_positions of them each."""
        for batch in _batches(sequences, self._backend.tile):
            yield self._forward(batch, pooling)

    def _forward(self, batch: Sequence[Sequence[int]], pooling: Pooling) -> Array:
        config, backend = self.config, self._backend
        lengths = [len(ids) for ids in batch]
        if min(lengths) < 1 or max(lengths) > config.max_positions:
            raise CheckpointError(f"sequences of {min(lengths)} to {max(lengths)} ids; this encoder takes 1 to "
                                  f"{config.max_positions}")
        packed = np.concatenate([np.asarray(ids, np.int32) for ids in batch])
        if packed.min() < 0 or packed.max() >= config.vocab_size:
            raise CheckpointError(f"ids of {packed.min()} to {packed.max()}; this encoder's vocabulary has "
                                  f"{config.vocab_size}: the tokenizer does not belong to it")
        ids, starts = backend.upload(packed), backend.upload(np.cumsum([0, *lengths], dtype=np.int32))
        positions = backend.upload(np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]))
        T = sum(lengths)
        x, attended = backend.rows(T, config.hidden_size), backend.rows(T, config.hidden_size)
        hidden = backend.rows(T, config.intermediate_size)
        backend.embed(ids, positions, self._words, self._places, self._norm, x)
        for layer in self._layers:
            backend.attention(x, layer.qkv, layer.qkv_bias, starts, max(lengths), config.n_heads, attended)
            backend.add(attended, layer.output, layer.output_bias, layer.attention_norm, x)
            backend.gelu(x, layer.up, layer.up_bias, hidden)
            backend.add(hidden, layer.down, layer.down_bias, layer.mlp_norm, x)
        return backend.pool(x, starts, pooling)

    def _load(self, read: _Reader) -> None:
        config, backend = self.config, self._backend
        E, I = config.hidden_size, config.intermediate_size  # noqa: E741 - the project's letter of the MLP size

        def linear(name: str, rows: int, columns: int) -> tuple[Matrix, Array]:
            return (backend.matrix(read.tensor(f"{name}.weight", (rows, columns))),
                    backend.vector(read.values(f"{name}.bias", (rows,))))

        def norm(name: str) -> Norm:
            return Norm(backend.vector(read.values(f"{name}.LayerNorm.weight", (E,))),
                        backend.vector(read.values(f"{name}.LayerNorm.bias", (E,))), config.norm_eps)

        def layer(index: int) -> EncoderLayer:
            base = f"encoder.layer.{index}"
            parts = [f"{base}.attention.self.{part}" for part in ("query", "key", "value")]
            return EncoderLayer(
                backend.matrix(*(read.tensor(f"{part}.weight", (E, E)) for part in parts)),
                backend.vector(np.concatenate([read.values(f"{part}.bias", (E,)) for part in parts])),
                *linear(f"{base}.attention.output.dense", E, E), norm(f"{base}.attention.output"),
                *linear(f"{base}.intermediate.dense", I, E), *linear(f"{base}.output.dense", E, I),
                norm(f"{base}.output"))

        self._words = backend.matrix(read.tensor("embeddings.word_embeddings.weight", (config.vocab_size, E)))
        # One text is token type 0 throughout, so types and positions are one table.
        types = read.values("embeddings.token_type_embeddings.weight", (config.token_types, E))
        places = read.values("embeddings.position_embeddings.weight", (config.max_positions, E)) + types[0]
        self._places, self._norm = backend.vector(places), norm("embeddings")
        self._layers = tuple(layer(index) for index in range(config.n_layers))


def load_encoder_backend(device: Literal["cpu", "cuda"] | None = None, threads: int | None = None) -> EncoderBackend:
    """The kernels of that device; None: CUDA where CuPy and a GPU are there, else the CPU. threads: of the CPU's.

    Raises BackendError.
    """
    if device not in ("cpu", "cuda", None):
        raise BackendError(f"unknown device {device!r} for an encoder; expected cpu or cuda")
    if device != "cpu":
        from kernels_cu.errors import CupyMissing, NoDevice
        from kernels_cu.errors import KernelError as CudaError

        try:
            from kernels_cu.encoder import CudaEncoder

            return CudaEncoder()
        except (CupyMissing, NoDevice) as error:
            if device == "cuda":
                raise BackendError(str(error)) from error
        except CudaError as error:  # there is a GPU: running elsewhere would be a silent slow path
            raise BackendError(f"{error}; or give the encoder device='cpu'") from error
    try:
        from kernels_c.errors import KernelError
    except ImportError as error:
        raise BackendError(f"the C kernels are not installed ({error}); run: pip install .") from error
    try:
        from kernels_c.encoder import CpuEncoder

        return CpuEncoder(threads)
    except KernelError as error:
        raise BackendError(str(error)) from error


def _weights(folder: Path) -> SafetensorsFile:
    path = folder / "model.safetensors"
    if not path.exists() and any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{folder} has torch weights only; convert them once: "
                              f"python -m converters torch {folder} {path}")
    return SafetensorsFile(path)


class _Reader:
    """Tensors by name, shape and dtype, whatever the names begin with."""

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        first = "embeddings.word_embeddings.weight"
        self._prefix = next((prefix for prefix in _PREFIXES if prefix + first in file.entries), "")

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        name = self._prefix + name
        entry = self._file.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self._file.path}: tensor {name!r} of shape {list(shape)} is missing")
        if entry.shape != shape:
            raise CheckpointError(f"{self._file.path}: tensor {name!r}: expected shape {list(shape)}, got "
                                  f"{list(entry.shape)}")
        return self._file.tensor(name)

    def values(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        tensor = self.tensor(name, shape)
        if tensor.dtype == "BF16":
            return (tensor.data.astype(np.uint32) << 16).view(np.float32)
        return tensor.data.astype(np.float32)


def _batches(sequences: Iterable[Sequence[int]], rows: int) -> Iterator[list[Sequence[int]]]:
    """Consecutive sequences of `rows` ids together at most; a longer one is a batch of its own."""
    batch: list[Sequence[int]] = []
    total = 0
    for ids in sequences:
        if batch and total + len(ids) > rows:
            yield batch
            batch, total = [], 0
        batch.append(ids)
        total += len(ids)
    if batch:
        yield batch


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a positive integer")
    return value
