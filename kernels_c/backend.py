"""CpuBackend: runtime.backend.Backend on the CPU. Each method checks shapes and dtypes and calls one C function."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_c.arrays import F16, F32, I32, U8, Buffer, Matrix, allocate, check, matrix_record, pointer, vector_pointer
from kernels_c.cache_ops import CacheOps
from kernels_c.errors import KernelError
from kernels_c.isa import choose_isa, operation
from kernels_c.machine import available_bytes
from kernels_c.threads import set_threads

Draws = Any  # runtime.backend.Draws

_OPERATIONS = ("embed", "qkv", "prefill_attention", "linear_add", "gate_up", "logits", "sample",
               "attention_mass")


class CpuBackend(CacheOps):
    """The C kernels of one instruction set.

    isa: "scalar", "avx2" or "avx512"; None takes COCKTAIL_ISA, else the widest this processor has.
    threads: of the process-wide pool; None measures what helps (kernels_c.threads). Results never depend on it.
    """

    name = "cpu"
    prefill_tile = 512
    prefill_rows = 17  # GEMV_ROWS of linear.h and one: fewer are multiplied in another order
    asynchronous = False
    turns_by_place = False
    max_batch = exact_batch = 16  # GEMV_ROWS of src/linear.h: rows whose sums do not depend on how many there are
    least_batch = 1
    maps_weights = True
    reserve = 0  # a few MiB per thread

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.isa = choose_isa(isa)
        self.threads, self.streaming_threads = set_threads(self.isa, threads)
        compiled = [operation(name, self.isa) for name in _OPERATIONS]
        self._embed, self._qkv, self._prefill_attention, self._linear_add, self._gate_up, *compiled = compiled
        self._logits, self._sample, self._attention_mass = compiled
        super().__init__()

    def kernels(self) -> dict[str, str]:
        return {name: f"{name}_{self.isa}" for name in _OPERATIONS} | super().kernels()

    def check_model(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """KernelError for attention of a shape that the kernels do not have."""
        _check_head_dim(head_dim)
        if heads % kv_heads:
            raise KernelError(f"{heads} query heads are no multiple of {kv_heads} KV heads")

    # memory ----------------------------------------------------------------------------------------------------
    def matrix(self, data: npt.NDArray[Any], dtype: str) -> Matrix:
        """Keeps the view: a memory-mapped matrix stays in the file, at any alignment."""
        return Matrix(data, dtype)

    def vector(self, data: npt.NDArray[Any], dtype: str) -> Buffer:
        if dtype == "BF16":  # stored as uint16: the upper half of a float32
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return self.upload(np.asarray(data, np.float32))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        return allocate(shape, dtype)

    def activation_type(self, rows: int, weights: Sequence[Matrix]) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def upload(self, data: npt.NDArray[Any]) -> Buffer:
        buffer = allocate(data.shape, data.dtype)
        buffer[...] = data
        return buffer

    def download(self, array: Buffer) -> npt.NDArray[Any]:
        """A copy, as on every backend: later steps overwrite the buffer."""
        return np.array(array, subok=False)

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """MemoryError, here rather than at the first touch, if the machine or the container has less to give."""
        nbytes, free = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, available_bytes()
        if free is not None and nbytes > free:
            raise MemoryError(f"{nbytes:,} bytes of host memory are needed, but {free:,} are free")
        return np.empty(shape, dtype)

    def copy(self, source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
        np.copyto(target, source)

    def beside(self, copies: Callable[[], None]) -> Callable[[], None]:
        """Here and now: the processor that copies is the one that computes."""
        copies()
        return lambda: None

    def visible(self, n: int) -> tuple[Buffer, npt.NDArray[np.int32]]:
        ids = allocate((n,), np.int32)
        return ids, ids

    def launched(self) -> Callable[[], None]:
        return lambda: None

    def arena(self, nbytes: int) -> Buffer:
        """MemoryError, here rather than at the first touch, if the machine or the container has less to give."""
        free = available_bytes()
        if free is not None and nbytes > free:
            raise MemoryError(f"the KV cache needs {nbytes:,} bytes, but {free:,} are free; lower --kv-bits")
        return allocate((nbytes,), U8)

    def free_bytes(self) -> int | None:
        return available_bytes()

    def batch_of(self, weights: Sequence[Matrix]) -> int:
        return self.max_batch

    def bind_rows(self, states: Sequence[Buffer], ropes: Sequence[tuple[Buffer, Buffer]],
                  draws: Sequence[Draws]) -> None:  # fmt: skip
        """The host does as well."""

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step itself: on the CPU a call costs next to nothing."""
        return step

    # time ------------------------------------------------------------------------------------------------------
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    # layer operations ------------------------------------------------------------------------------------------
    def embed(self, ids: Buffer, table: Matrix, out: Buffer) -> None:
        T, E = len(ids), table.shape[1]
        args = pointer("ids", ids, (T,), I32), table.record, pointer("out", out, (T, E), F32), T
        check(self._embed(*args), "embed")

    def qkv(self, x: Buffer, norm: Buffer, eps: float, wq: Matrix, wk: Matrix, wv: Matrix, bq: Buffer | None,
            bk: Buffer | None, bv: Buffer | None, cos: Buffer, sin: Buffer, positions: Buffer, slots: Buffer,
            q: Buffer, k: Buffer, v: Buffer) -> None:  # fmt: skip
        """K and V beyond FP16's finite range are stored as +-65504, NaN as -65504."""
        (T, E), (_, H, D), (G, S, _), P = x.shape, q.shape, k.shape, len(cos)
        _check_head_dim(D)
        status = self._qkv(
            pointer("x", x, (T, E), F32),
            pointer("norm", norm, (E,), F32),
            eps,
            matrix_record("wq", wq, H * D, E),
            matrix_record("wk", wk, G * D, E),
            matrix_record("wv", wv, G * D, E),
            vector_pointer("bq", bq, H * D),
            vector_pointer("bk", bk, G * D),
            vector_pointer("bv", bv, G * D),
            pointer("cos", cos, (P, D // 2), F32),
            pointer("sin", sin, (P, D // 2), F32),
            P,
            pointer("positions", positions, (T,), I32),
            pointer("slots", slots, (T,), I32),
            H,
            G,
            D,
            S,
            pointer("q", q, (T, H, D), F32),
            pointer("k", k, (G, S, D), F16),
            pointer("v", v, (G, S, D), F16),
            T,
        )
        check(status, "qkv")

    def prefill_attention(self, q: Buffer, k: Buffer, v: Buffer, start: int, window: int | None, out: Buffer) -> None:
        (T, H, D), (G, S, _) = q.shape, k.shape
        _check_head_dim(D)
        _check_rows("prefill_attention", T, H, G, S, start, window)
        status = self._prefill_attention(
            pointer("q", q, (T, H, D), F32),
            pointer("k", k, (G, S, D), F16),
            pointer("v", v, (G, S, D), F16),
            pointer("out", out, (T, H * D), F32),
            T,
            H,
            G,
            D,
            S,
            start,
            window or S,
        )
        check(status, "prefill_attention")

    def attention_mass(self, q: Buffer, k: Buffer, start: int, window: int | None, first: int, chunk: int,
                       out: Buffer) -> None:  # fmt: skip
        (T, H, D), (G, S, _), N = q.shape, k.shape, out.shape[1]
        _check_head_dim(D)
        _check_rows("attention_mass", T, H, G, S, start, window)
        if chunk < 1 or first < 0 or first + N * chunk > S:
            raise KernelError(f"attention_mass: {N} chunks of {chunk} from row {first} on do not lie in {S} rows")
        status = self._attention_mass(
            pointer("q", q, (T, H, D), F32),
            pointer("k", k, (G, S, D), F16),
            pointer("out", out, (G, N), F32),
            T,
            H,
            G,
            D,
            S,
            start,
            window or S,
            first,
            chunk,
            N,
        )
        check(status, "attention_mass")

    def linear_add(self, h: Buffer, weight: Matrix, bias: Buffer | None, x: Buffer) -> None:
        (T, K), E = h.shape, weight.shape[0]
        status = self._linear_add(
            pointer("h", h, (T, K), F32),
            matrix_record("weight", weight, E, K),
            vector_pointer("bias", bias, E),
            pointer("x", x, (T, E), F32),
            T,
        )
        check(status, "linear_add")

    def gate_up(self, x: Buffer, norm: Buffer, eps: float, gate: Matrix, up: Matrix, gate_bias: Buffer | None,
                up_bias: Buffer | None, out: Buffer) -> None:  # fmt: skip
        (T, E), I = x.shape, gate.shape[0]  # noqa: E741 - the project's letter of the MLP size
        status = self._gate_up(
            pointer("x", x, (T, E), F32),
            pointer("norm", norm, (E,), F32),
            eps,
            matrix_record("gate", gate, I, E),
            matrix_record("up", up, I, E),
            vector_pointer("gate_bias", gate_bias, I),
            vector_pointer("up_bias", up_bias, I),
            pointer("out", out, (T, I), F32),
            T,
        )
        check(status, "gate_up")

    def logits(self, x: Buffer, norm: Buffer, eps: float, head: Matrix, out: Buffer) -> None:
        (T, E), V = x.shape, head.shape[0]
        status = self._logits(
            pointer("x", x, (T, E), F32),
            pointer("norm", norm, (E,), F32),
            eps,
            matrix_record("head", head, V, E),
            pointer("out", out, (T, V), F32),
            T,
        )
        check(status, "logits")

    # end of the step -------------------------------------------------------------------------------------------
    def sample(self, logits: Buffer, draws: Draws, state: Buffer) -> None:
        """Filters as in Hugging Face; top_k 0, top_p 1, min_p 0 and penalty 1 are off. NaN logits are never drawn."""
        temperature, top_k, top_p, min_p, penalty = map(float, draws.options)
        V, N, M, drawn = logits.shape[1], len(draws.uniforms), len(draws.seen), int(state[3])
        if temperature < 0 or top_k < 0 or penalty <= 0 or not 0 <= drawn < N <= M:
            raise KernelError(
                f"sample: needs temperature >= 0, top_k >= 0, penalty > 0 and less than {N} ids drawn, but got "
                f"{temperature}, {top_k}, {penalty} and {drawn}"
            )
        at = M - N + drawn  # in seen
        row, seen = pointer("logits", logits, (1, V), F32), pointer("seen", draws.seen, (M,), I32)
        chosen = self._sample(row, V, temperature, int(min(top_k, V)), top_p, min_p, penalty, seen,
                              at if penalty != 1 else 0, float(draws.uniforms[drawn]))  # fmt: skip
        if chosen < 0:
            check(chosen, "sample")
        draws.seen[at] = draws.ids[drawn] = chosen
        state[3] += 1
        self.advance(state, int(chosen))

    def advance(self, state: Buffer, token: int) -> None:
        """state: position, slot, token (runtime.backend.STATE_*)."""
        state[0] += 1
        state[1] += 1
        state[2] = token


def _check_head_dim(D: int) -> None:
    if D % 8 or not 0 < D <= 256:
        raise KernelError(f"head_dim must be a multiple of 8 up to 256, but is {D}")


def _check_rows(operation: str, T: int, H: int, G: int, S: int, start: int, window: int | None) -> None:
    if H % G or not 0 <= start <= S - T or (window is not None and window < 1):
        raise KernelError(
            f"{operation}: {H} query heads over {G} KV heads, rows {start}..{start + T} of {S} and window {window} do "
            "not fit: heads must divide, rows must exist and a window is at least 1"
        )
