"""CudaBackend: runtime.backend.Backend on one NVIDIA GPU. Each method checks shapes and dtypes and launches kernels.

Everything runs on CuPy's current stream. Kernels report an index outside its table through a word of host memory that
is looked at whenever the host waits for the GPU anyway (download, sample).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.arrays import (
    F16,
    F32,
    F64,
    I32,
    NULL,
    STORED,
    Array,
    Matrix,
    address,
    allocate,
    check_matrix,
    free_bytes,
    same_dtype,
    vector_address,
    wide_address,
)  # fmt: skip
from kernels_cu.attention import HEAD_DIMS, Tile, prefill_attention
from kernels_cu.attention_mass import attention_mass
from kernels_cu.build import architecture_of, current_device, import_cupy, kernel
from kernels_cu.cache_ops import STATE_SIZE, CacheOps
from kernels_cu.ends import ADVANCE, EMBED, SAMPLE
from kernels_cu.errors import KernelError
from kernels_cu.host_memory import locked
from kernels_cu.linear import BATCH_ROWS, PANEL_ROWS, Linear
from kernels_cu.product import Operation
from kernels_cu.rows import Rows, check_draws

Draws = Any  # runtime.backend.Draws

_OPERATIONS = {
    "embed": "embed", "qkv": "gemv, panel, cuBLAS", "prefill_attention": "prefill_attention",
    "attention_mass": "mass_rows, mass_chunks",
    "linear_add": "gemv, panel, cuBLAS", "gate_up": "gemv, panel, cuBLAS", "logits": "gemv, panel, cuBLAS",
    "sample": "sample", "advance": "advance",
}  # fmt: skip
_FAULTS = {
    1: "embed, qkv, append or gather: an id, position or slot lies outside its table",
    2: "sample: an id of those seen lies outside the vocabulary",
    3: "sample: every logit is NaN or -infinity; the weights or the cache are damaged",
    4: "sample: needs temperature >= 0, top_k >= 0, penalty > 0 and a uniform number for every draw",
}


class CudaBackend(CacheOps):
    """The CUDA kernels on the current GPU; raises what is missing (kernels_cu.errors) when it is made.

    graph: whether `captured` records a step as a CUDA graph.
    """

    name = "cuda"
    asynchronous = True
    turns_by_place = True  # R(p + j) = R(p) R(j): the query by the chunk's first position, keys by their place
    max_batch = BATCH_ROWS
    exact_batch = PANEL_ROWS
    least_batch = 2  # one row is multiplied by a kernel of its own, which adds in another order (linear.py)
    prefill_rows = 1  # cuBLAS promises nothing of the kind
    prefill_tile = 2048  # 4096 gains 1 to 2% on a 7B model and takes 0.26 GiB more of activations
    maps_weights = False
    # Products of a tile, 32 MiB of workspace, 96 of sums and 20 to 40 of activations; work lists and partial results of
    # decode attention, 3 to 8 MiB for each of the sequences that run.
    reserve = 256 * 2**20

    def __init__(self, graph: bool = True) -> None:
        self._graph = graph
        device = current_device()
        self.architecture = architecture_of(device)
        self._cupy = import_cupy()
        self._processors = int(self._cupy.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])
        self._linear = Linear()
        self._lane = self._cupy.cuda.Stream(non_blocking=True)  # of copies between host and device
        fault, self._fault = self.visible(1)  # what a kernel found wrong
        self._fault[0] = 0
        self._fault_address = np.uint64(fault.data.ptr)
        self._candidates: dict[int, Array] = {}  # scratch of sample by V; captured steps keep its address
        super().__init__()

    def kernels(self) -> dict[str, str]:
        return {name: f"{by} [sm_{self.architecture}]" for name, by in _OPERATIONS.items()} | super().kernels()

    def check_model(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """KernelError for attention of a shape that the kernels do not have."""
        _check_head_dim(head_dim)
        if heads % kv_heads or heads // kv_heads > 16:
            raise KernelError(f"{heads} query heads over {kv_heads} KV heads: the kernels take 1 to 16 per KV head")

    # memory ----------------------------------------------------------------------------------------------------
    def matrix(self, data: npt.NDArray[Any], dtype: str) -> Matrix:
        return Matrix(data, dtype)

    def vector(self, data: npt.NDArray[Any], dtype: str) -> Array:
        if dtype == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return self.upload(data.astype(np.float32))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return allocate(shape, dtype, f"a buffer {shape}", "use a shorter prompt")

    def activation_type(self, rows: int, weights: Sequence[Matrix]) -> np.dtype[Any]:
        """That of the weights for what cuBLAS multiplies, where all weights share one."""
        dtypes = {weight.dtype for weight in weights}
        return STORED[dtypes.pop()] if rows > PANEL_ROWS and len(dtypes) == 1 else F32

    def upload(self, data: npt.NDArray[Any]) -> Array:
        array = self.empty(data.shape, data.dtype)
        array.set(np.ascontiguousarray(data))
        return array

    def download(self, array: Array) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self._cupy.asnumpy(array)
        self._check_fault()
        return host

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Page-locked; MemoryError where the host has no such memory."""
        return locked(shape, dtype)

    def copy(self, source: Any, target: Any) -> None:
        runtime = self._cupy.cuda.runtime
        inward = isinstance(source, np.ndarray)
        host, device = (source, target) if inward else (target, source)
        if host.nbytes != device.nbytes or not (host.flags.c_contiguous and device.flags.c_contiguous):
            raise KernelError(f"copy: expected two contiguous arrays of equal bytes, but got {host.nbytes} and "
                              f"{device.nbytes}")  # fmt: skip
        pointers = (device.data.ptr, host.ctypes.data) if inward else (host.ctypes.data, device.data.ptr)
        kind = runtime.memcpyHostToDevice if inward else runtime.memcpyDeviceToHost
        runtime.memcpyAsync(*pointers, host.nbytes, kind, self._cupy.cuda.get_current_stream().ptr)

    def beside(self, copies: Callable[[], None]) -> Callable[[], None]:
        """On a stream of its own, which waits for the current one as it stands."""
        cuda = self._cupy.cuda
        before, after = (cuda.Event(disable_timing=True) for _ in range(2))
        before.record()
        self._lane.wait_event(before)
        with self._lane:
            copies()
        after.record(self._lane)
        return lambda: cuda.get_current_stream().wait_event(after)

    def visible(self, n: int) -> tuple[Array, npt.NDArray[np.int32]]:
        """Pinned memory, which kernels write over the bus."""
        cuda = self._cupy.cuda
        pinned = cuda.alloc_pinned_memory(4 * n)
        memory = cuda.MemoryPointer(cuda.UnownedMemory(pinned.ptr, 4 * n, pinned), 0)
        return self._cupy.ndarray((n,), np.int32, memory), np.frombuffer(pinned, np.int32, n)

    def launched(self) -> Callable[[], None]:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record()

        def wait() -> None:
            event.synchronize()
            self._check_fault()

        return wait

    def arena(self, nbytes: int) -> Array:
        return allocate((nbytes,), np.uint8, "the KV cache", "lower --kv-bits")

    def free_bytes(self) -> int:
        """Weights, which are on the GPU, are not in it; unused blocks of CuPy's pool are."""
        return free_bytes()

    def batch_of(self, weights: Sequence[Matrix]) -> int:
        """1 for float32 weights: what cuBLAS gives a row may depend on how many there are."""
        return 1 if any(weight.dtype == "F32" for weight in weights) else self.max_batch

    def bind_rows(self, states: Sequence[Array], ropes: Sequence[tuple[Array, Array]],
                  draws: Sequence[Draws]) -> Rows:  # fmt: skip
        faults = self.visible(len(states))
        return Rows(states, ropes, draws, faults, self._fault_address, _FAULTS)

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function that does what `step` does, faster: its second call captures a CUDA graph, later calls replay it.

        The first call is an ordinary one, which compiles what is not compiled yet. `step` may only launch kernels on
        buffers that exist and keep their addresses; what changes from call to call is in device memory.
        """
        return _Captured(step) if self._graph else step

    # time ------------------------------------------------------------------------------------------------------
    def mark(self) -> Any:
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    # layer operations ------------------------------------------------------------------------------------------
    def embed(self, ids: Array, table: Matrix, out: Array) -> None:
        T, (V, E) = len(ids), table.shape
        arguments = (address("ids", ids, (T,), I32), table.address, np.int32(V), np.int32(E),
                     wide_address("out", out, (T, E), F32), self._fault_address)  # fmt: skip
        kernel(EMBED[table.dtype])((T,), (256,), arguments)

    def qkv(self, x: Array, norm: Array, eps: float, wq: Matrix, wk: Matrix, wv: Matrix, bq: Array | None,
            bk: Array | None, bv: Array | None, cos: Array, sin: Array, positions: Array, slots: Array, q: Array,
            k: Array, v: Array) -> None:  # fmt: skip
        """K and V beyond FP16's finite range are stored as +-65504, NaN as -65504."""
        (T, E), (_, H, D), (G, S, _), P = x.shape, q.shape, k.shape, len(cos)
        _check_head_dim(D)
        for name, weight, heads in (("wq", wq, H), ("wk", wk, G), ("wv", wv, G)):
            check_matrix(name, weight, heads * D, E)
        same_dtype(wq=wq, wk=wk, wv=wv)
        units = (H + 2 * G) * (D // 2)
        arguments = (
            wq.address, wk.address, wv.address,
            vector_address("bq", bq, H * D), vector_address("bk", bk, G * D), vector_address("bv", bv, G * D),
            address("cos", cos, (P, D // 2), F32), address("sin", sin, (P, D // 2), F32), np.int32(P),
            address("positions", positions, (T,), I32), address("slots", slots, (T,), I32),
            np.int32(H), np.int32(G), np.int32(S), wide_address("q", q, (T, H, D), F32),
            wide_address("k", k, (G, S, D), F16), wide_address("v", v, (G, S, D), F16), self._fault_address,
            np.int32(units),
        )  # fmt: skip
        self._linear.run(Operation("QKV", (wq, wk, wv), units, arguments, D), wide_address("x", x, (T, E), F32), T, E,
                         wide_address("norm", norm, (E,), F32), eps)  # fmt: skip

    def prefill_attention(self, q: Array, k: Array, v: Array, start: int, window: int | None, out: Array) -> None:
        (T, H, D), (G, S, _) = q.shape, k.shape
        _check_head_dim(D)
        _check_rows("prefill_attention", T, H, G, S, start, window)
        out_type = _stored_type("out", out)
        tile = Tile.of(self.architecture, D, T, fill=128 * self._processors // H)
        prefill_attention(tile, wide_address("q", q, (T, H, D), F32), wide_address("k", k, (G, S, D), F16),
                          wide_address("v", v, (G, S, D), F16), wide_address("out", out, (T, H * D), out.dtype),
                          T, H, G, S, start, window, out_type)  # fmt: skip

    def attention_mass(self, q: Array, k: Array, start: int, window: int | None, first: int, chunk: int,
                       out: Array) -> None:  # fmt: skip
        (T, H, D), (G, S, _), N = q.shape, k.shape, out.shape[1]
        _check_head_dim(D)
        _check_rows("attention_mass", T, H, G, S, start, window)
        if chunk < 1 or first < 0 or first + N * chunk > S:
            raise KernelError(f"attention_mass: {N} chunks of {chunk} from row {first} on do not lie in {S} rows")
        attention_mass(wide_address("q", q, (T, H, D), F32), wide_address("k", k, (G, S, D), F16),
                       address("out", out, (G, N), F32), T, H, G, S, D, start, window, first, chunk, N,
                       self._processors)  # fmt: skip

    def linear_add(self, h: Array, weight: Matrix, bias: Array | None, x: Array) -> None:
        (T, K), E = h.shape, weight.shape[0]
        check_matrix("weight", weight, E, K)
        arguments = (weight.address, vector_address("bias", bias, E), wide_address("x", x, (T, E), F32), np.int32(E))
        converted = _is_narrow("h", h, weight)
        self._linear.run(Operation("ADD", (weight,), E, arguments), wide_address("h", h, (T, K), h.dtype), T, K,
                         converted=converted)  # fmt: skip

    def gate_up(self, x: Array, norm: Array, eps: float, gate: Matrix, up: Matrix, gate_bias: Array | None,
                up_bias: Array | None, out: Array) -> None:  # fmt: skip
        (T, E), I = x.shape, gate.shape[0]  # noqa: E741 - the project's letter of the MLP size
        check_matrix("gate", gate, I, E)
        check_matrix("up", up, I, E)
        same_dtype(gate=gate, up=up)
        arguments = (gate.address, up.address, vector_address("gate_bias", gate_bias, I),
                     vector_address("up_bias", up_bias, I), wide_address("out", out, (T, I), out.dtype),
                     np.int32(I))  # fmt: skip
        operation = Operation("GATE_UP", (gate, up), I, arguments, narrow=_is_narrow("out", out, gate))
        self._linear.run(operation, wide_address("x", x, (T, E), F32), T, E,
                         wide_address("norm", norm, (E,), F32), eps)  # fmt: skip

    def logits(self, x: Array, norm: Array, eps: float, head: Matrix, out: Array) -> None:
        (T, E), V = x.shape, head.shape[0]
        check_matrix("head", head, V, E)
        arguments = head.address, NULL, wide_address("out", out, (T, V), F32), np.int32(V)
        self._linear.run(Operation("STORE", (head,), V, arguments), wide_address("x", x, (T, E), F32), T, E,
                         wide_address("norm", norm, (E,), F32), eps)  # fmt: skip

    # end of the step -------------------------------------------------------------------------------------------
    def sample(self, logits: Array, draws: Draws, state: Array) -> None:
        """Filters as in Hugging Face; top_k 0, top_p 1, min_p 0 and penalty 1 are off. NaN logits are never drawn."""
        V, N, M = logits.shape[1], len(draws.uniforms), len(draws.seen)
        check_draws(V, draws)
        if V not in self._candidates:
            self._candidates[V] = self.empty((2, V), np.int32)
        keys, left = self._candidates[V]
        arguments = (
            address("logits", logits, (1, V), F32), np.int32(V), address("options", draws.options, (5,), F64),
            address("uniforms", draws.uniforms, (N,), F64), np.int32(N), address("seen", draws.seen, (M,), I32),
            np.int32(M), address("state", state, (STATE_SIZE,), I32), np.uint64(keys.data.ptr),
            np.uint64(left.data.ptr), address("ids", draws.ids, (N,), I32), self._fault_address,
        )  # fmt: skip
        kernel(SAMPLE)((1,), (1024,), arguments)

    def advance(self, state: Array, token: int) -> None:
        """state: position, slot, token (runtime.backend.STATE_*)."""
        kernel(ADVANCE)((1,), (1,), (address("state", state, state.shape, I32), np.int32(token)))

    def _check_fault(self) -> None:
        fault = int(self._fault[0])
        if fault:
            self._fault[0] = 0
            raise KernelError(_FAULTS[fault])


class _Captured:
    """First call: run. Second: capture, then replay; later: replay."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step, self._warm = step, False
        self._graph: Any = None

    def __call__(self) -> None:
        if not self._warm:
            self._step()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.launch()

    def _capture(self) -> Any:
        # The legacy default stream cannot be captured; the graph is launched on whatever stream is current.
        stream = import_cupy().cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                self._step()
            finally:
                graph = stream.end_capture()
        return graph


def _is_narrow(name: str, activations: Array, weight: Matrix) -> bool:
    """Whether activations are of the weights' type rather than float32; KernelError where they may not be."""
    if _stored_type(name, activations) == "F32":
        return False
    T, K = activations.shape
    if activations.dtype != STORED[weight.dtype] or T <= PANEL_ROWS or K % 4:
        raise KernelError(
            f"{name} must be float32, or {STORED[weight.dtype].name} as the weights with over {PANEL_ROWS} rows and "
            f"columns in fours, but is {activations.dtype.name} {activations.shape}"
        )
    return True


def _stored_type(name: str, array: Array) -> str:
    for stored, dtype in STORED.items():
        if array.dtype == dtype:
            return stored
    raise KernelError(f"{name} must be float32, float16 or BF16 as uint16, but is {array.dtype.name}")


def _check_head_dim(D: int) -> None:
    if D not in HEAD_DIMS:
        raise KernelError(f"head_dim must be one of {HEAD_DIMS} on the GPU, but is {D}; use --backend cpu")


def _check_rows(operation: str, T: int, H: int, G: int, S: int, start: int, window: int | None) -> None:
    if H % G or not 0 <= start <= S - T or (window is not None and window < 1):
        raise KernelError(
            f"{operation}: {H} query heads over {G} KV heads, rows {start}..{start + T} of {S} and window {window} do "
            "not fit: heads must divide, rows must exist and a window is at least 1"
        )
