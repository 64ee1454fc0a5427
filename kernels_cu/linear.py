"""Products of activations with weight matrices: which kernel runs, and how it is launched.

One row (decode): `gemv`, bound by reading the weights. Two to sixteen rows: `panel`, the same on tensor cores. More
rows (prefill), and float32 weights from two rows on: cuBLAS, with the activations converted to the weights' type,
float32 sums, and `finish` for what cuBLAS cannot do. cuBLAS cannot be captured into a graph; the other two can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kernels_cu.arrays import NULL, STORED, Array, Matrix, allocate
from kernels_cu.build import Spec, current_device, import_cupy, kernel
from kernels_cu.errors import KernelError, ToolkitMissing

Defines = tuple[tuple[str, int | str], ...]

PANEL_ROWS = 16
_PAIR = {"STORE": 1, "ADD": 1, "GATE_UP": 2, "QKV": 2}
_GEMV_WARPS, _GEMV_CHUNKS, _GEMV_LOADS = 8, 4, 8
_GEMV_VALUES = 64  # activations that a lane can hold
_PANEL_WARPS, _PANEL_TILES = 8, 2
_CUDA_R = {"F32": 0, "F16": 2, "BF16": 14}
_COMPUTE_32F, _DEFAULT_ALGORITHM = 68, -1


@dataclass(frozen=True)
class Operation:
    """An epilogue of epilogue.cuh, its weights and arguments; D only for QKV."""

    epilogue: str
    weights: tuple[Matrix, ...]
    units: int
    arguments: tuple[Any, ...]
    D: int = 0

    @property
    def dtype(self) -> str:
        return self.weights[0].dtype

    @property
    def defines(self) -> Defines:
        head = (("D", self.D),) if self.D else ()
        return (("EPILOGUE", self.epilogue), ("WEIGHT", self.dtype), *head)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and dynamic shared memory."""

    kernel: Any
    grid: int
    block: int
    shared: int = 0

    def __call__(self, *arguments: Any) -> None:
        self.kernel((self.grid,), (self.block,), arguments, shared_mem=self.shared)


class Linear:
    """Runs Operations on one GPU; owns the scratch memory of the cuBLAS path, which grows to the largest tile."""

    def __init__(self) -> None:
        device = import_cupy().cuda.runtime.getDeviceProperties(current_device())
        self._processors = int(device["multiProcessorCount"])
        self._scratch: dict[str, Array] = {}

    def run(self, operation: Operation, x: np.uint64, T: int, K: int, norm: np.uint64 | None = None,
            eps: float = 0.0) -> None:  # fmt: skip
        """operation of x (T, K) float32, RMS-normed with weights norm (K,) if given."""
        if T == 1:
            launch = _gemv(operation.defines, norm is not None, K, operation.units, self._processors)
            launch(x, NULL if norm is None else norm, np.float32(eps), np.int32(K), *operation.arguments)
            return
        activations = self._converted(operation.dtype, x, T, K, norm, eps)
        if T <= PANEL_ROWS and operation.dtype != "F32":
            _panel(operation.defines, operation.units, T)(activations, np.int32(T), np.int32(K), *operation.arguments)
        else:
            self._by_cublas(operation, activations, T, K)

    def _converted(self, dtype: str, x: np.uint64, T: int, K: int, norm: np.uint64 | None, eps: float) -> np.uint64:
        """x in the weights' type, normed; x itself where there is nothing to do."""
        if dtype == "F32" and norm is None:
            return x
        out = self._room("activations", T * K * STORED[dtype].itemsize)
        convert = _convert(dtype, norm is not None)
        convert((T,), (256,), (x, NULL if norm is None else norm, np.float32(eps), np.int32(K), out))
        return out

    def _by_cublas(self, operation: Operation, activations: np.uint64, T: int, K: int) -> None:
        units, epilogue = operation.units, operation.epilogue
        finish = kernel(_finish_spec(operation.defines))
        grid = (-(-units // 256), T)
        if _PAIR[epilogue] == 1:
            _, bias, out, _ = operation.arguments
            if bias:
                finish(grid, (256,), (NULL, *operation.arguments))
            _gemm(operation.weights[0], activations, T, out, units, add=epilogue == "ADD" or bool(bias))
            return
        total = sum(weight.shape[0] for weight in operation.weights)
        sums = self._room("sums", 4 * T * total)
        column = 0
        for weight in operation.weights:
            _gemm(weight, activations, T, np.uint64(int(sums) + 4 * column), total)
            column += weight.shape[0]
        finish(grid, (256,), (sums, *operation.arguments))

    def _room(self, name: str, nbytes: int) -> np.uint64:
        held = self._scratch.get(name)
        if held is None or held.nbytes < nbytes:
            self._scratch.pop(name, None)
            held = allocate((nbytes,), np.uint8, f"prefill scratch ({name})", "use a smaller tile")
            self._scratch[name] = held
        return np.uint64(held.data.ptr)


def compile_cover() -> Iterator[Spec]:
    """Specs that meet every (dtype, epilogue) and, over them, every shape of a team that models of 135M to 70B need."""
    dtypes, epilogues = ("F32", "F16", "BF16"), ("STORE", "ADD", "GATE_UP", "QKV")
    depths = (576, 960, 1536, 2048, 4096, 8192, 11008, 14336, 28672)
    heads = (64, 80, 96, 128, 256)
    for i, epilogue in enumerate(epilogues):
        for j, dtype in enumerate(dtypes):
            defines: Defines = (("EPILOGUE", epilogue), ("WEIGHT", dtype))
            if epilogue == "QKV":
                defines += (("D", heads[j]),)
            for depth in depths[(i + j) % 3 :: 3]:
                yield _gemv_spec(defines, epilogue != "ADD", depth)
            yield _finish_spec(defines)
            if dtype != "F32":
                yield from (_panel_spec(defines, columns) for columns in (1, 2))
    for dtype in dtypes:
        yield from (_convert_spec(dtype, norm) for norm in (False, True))


@cache
def _gemv(defines: Defines, norm: bool, K: int, units: int, processors: int) -> Launch:
    spec = _gemv_spec(defines, norm, K)
    chosen = dict(spec.defines)
    blocks = int(chosen["BLOCKS"]) * processors
    teams = blocks * int(chosen["WARPS"]) // int(chosen["TEAM"])
    shared = 4 * int(chosen["WARPS"]) * -(-units // teams) * _PAIR[str(chosen["EPILOGUE"])]
    return Launch(kernel(spec, shared), blocks, 32 * int(chosen["WARPS"]), shared)


def _gemv_spec(defines: Defines, norm: bool, K: int) -> Spec:
    """As few warps to a team as hold K with _GEMV_CHUNKS 16-byte loads a lane; as many rows as fill _GEMV_LOADS."""
    chosen = dict(defines)
    per_warp = 32 * 16 // STORED[str(chosen["WEIGHT"])].itemsize
    warps, blocks = (_GEMV_WARPS, 2) if K <= _GEMV_WARPS * 32 * _GEMV_VALUES else (2 * _GEMV_WARPS, 1)
    if warps * 32 * _GEMV_VALUES < K:
        raise KernelError(f"a decode step takes at most {warps * 32 * _GEMV_VALUES} inputs, but got {K}")
    team = 1
    while team < warps and team * per_warp * _GEMV_CHUNKS < K:
        team *= 2
    chunks = -(-K // (team * per_warp))
    units = 1
    while 2 * units * _PAIR[str(chosen["EPILOGUE"])] * chunks <= _GEMV_LOADS:
        units *= 2
    return Spec.of("gemv.cu", "gemv", NORM=int(norm), TEAM=team, CHUNKS=chunks, UNITS=units, WARPS=warps, BLOCKS=blocks,
                   **chosen)  # fmt: skip


@cache
def _panel(defines: Defines, units: int, T: int) -> Launch:
    spec = _panel_spec(defines, -(-T // 8))
    block_units = _PANEL_TILES * 16 // _PAIR[str(dict(defines)["EPILOGUE"])]
    return Launch(kernel(spec), -(-units // block_units), 32 * _PANEL_WARPS)


def _panel_spec(defines: Defines, columns: int) -> Spec:
    return Spec.of("panel.cu", "panel", WARPS=_PANEL_WARPS, TILES=_PANEL_TILES, COLUMN_TILES=columns, **dict(defines))


@cache
def _finish_spec(defines: Defines) -> Spec:
    return Spec.of("finish.cu", "finish", **dict(defines))


def _convert_spec(dtype: str, norm: bool) -> Spec:
    return Spec.of("convert.cu", "convert", WEIGHT=dtype, NORM=int(norm))


@cache
def _convert(dtype: str, norm: bool) -> Any:
    return kernel(_convert_spec(dtype, norm))


def _gemm(weight: Matrix, x: np.uint64, T: int, out: np.uint64, stride: int, add: bool = False) -> None:
    """out (T, N), rows `stride` floats apart, = or += x (T, K) @ weight.T, sums in float32."""
    cublas, handle = _cublas()
    cublas.setStream(handle, import_cupy().cuda.get_current_stream().ptr)
    N, K = weight.shape
    factors = np.array([1, 1 if add else 0], np.float32)  # alpha and beta, in host memory until the call returns
    at, kind = factors.ctypes.data, _CUDA_R[weight.dtype]
    # cuBLAS counts by columns: its (N, T) is our (T, N).
    cublas.gemmEx(handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, N, T, K, at, int(weight.address), kind, K,
                  int(x), kind, K, at + 4, int(out), _CUDA_R["F32"], stride, _COMPUTE_32F,
                  _DEFAULT_ALGORITHM)  # fmt: skip


def _cublas() -> tuple[Any, Any]:
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        raise ToolkitMissing(f"cuBLAS cannot be loaded ({error}); run: pip install nvidia-cublas") from error
    return cublas, import_cupy().cuda.device.get_cublas_handle()
