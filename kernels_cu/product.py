"""Products of many rows of activations with weight matrices, by cuBLAS: what an Operation is, and how it is done.

Activations are converted to the weights' type, sums are float32, and `finish` does what cuBLAS cannot (RoPE, SiLU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kernels_cu.arrays import NULL, STORED, Array, Matrix, allocate
from kernels_cu.blas import Blas
from kernels_cu.build import Spec, kernel

Defines = tuple[tuple[str, int | str], ...]

PAIR = {"STORE": 1, "ADD": 1, "GATE_UP": 2, "QKV": 2}  # rows of weights that an epilogue needs together
_SUMS_BYTES = 96 * 2**20  # of GATE_UP's products that wait for their epilogue at a time
_PART_UNITS = 128  # a part of GATE_UP begins at a multiple of so many units
_HELD = 4  # float4 of a row that a thread of `convert` keeps in registers, at most


@dataclass(frozen=True)
class Operation:
    """An epilogue of epilogue.cuh, its weights and arguments; D only for QKV."""

    epilogue: str
    weights: tuple[Matrix, ...]
    units: int
    arguments: tuple[Any, ...]
    D: int = 0
    narrow: bool = False  # GATE_UP of many rows: its result is of the weights' type, not float32

    @property
    def dtype(self) -> str:
        return self.weights[0].dtype

    @property
    def defines(self) -> Defines:
        head = (("D", self.D),) if self.D else ()
        return (("EPILOGUE", self.epilogue), ("WEIGHT", self.dtype), *head)

    def parts(self, T: int) -> Iterator[tuple[int, list[tuple[Matrix, int, int]]]]:
        """Pairs cut into parts whose sums of T rows are few bytes, but whose products are still large ones: the first
        unit of each, and its rows of weights (matrix, first, number) in the order of their sums."""
        if self.epilogue == "QKV":
            first = 0
            for weight in self.weights:
                yield first, [(weight, 0, weight.shape[0])]
                first += weight.shape[0] // 2
            return
        count = -(-2 * 4 * T * self.units // _SUMS_BYTES)
        part = -(-self.units // (count * _PART_UNITS)) * _PART_UNITS
        for first in range(0, self.units, part):
            yield first, [(weight, first, min(part, self.units - first)) for weight in self.weights]


class Product:
    """Runs Operations by cuBLAS on one GPU; owns their scratch memory, which grows to the largest tile.

    room: rows at most, in scratch of its own that never grows: a captured step keeps the addresses.
    """

    def __init__(self) -> None:
        self.blas = Blas()
        self._scratch: dict[str, Array] = {}

    def converted(self, dtype: str, x: np.uint64, T: int, K: int, norm: np.uint64 | None, eps: float,
                  room: int | None = None) -> np.uint64:  # fmt: skip
        """x in the weights' type, normed; x itself where there is nothing to do."""
        if dtype == "F32" and norm is None:
            return x
        name = "activations" if room is None else f"{room} activations of {K} {dtype}"
        out = self._room(name, (room or T) * K * STORED[dtype].itemsize)
        convert = _convert(dtype, norm is not None, K)
        convert((T,), (256,), (x, NULL if norm is None else norm, np.float32(eps), np.int32(K), out))
        return out

    def run(self, operation: Operation, activations: np.uint64, T: int, room: int | None = None) -> None:
        """operation of activations (T, K) in the weights' type."""
        units, epilogue, gemm = operation.units, operation.epilogue, self.blas.gemm
        finish = kernel(finish_spec(operation.defines, operation.narrow))
        if PAIR[epilogue] == 1:
            weight, (_, bias, out, _) = operation.weights[0], operation.arguments
            if bias:
                finish((-(-units // 256), T), (256,), (NULL, np.int32(0), np.int32(units), *operation.arguments))
            gemm(weight, 0, units, activations, T, out, units, add=epilogue == "ADD" or bool(bias))
            return
        parts = list(operation.parts(room or T))
        width = max(sum(rows for _, _, rows in part) for _, part in parts)
        sums = self._room("sums" if room is None else f"{room} sums of {width}", 4 * (room or T) * width)
        for first, part in parts:
            total, column = sum(rows for _, _, rows in part), 0
            for weight, row, rows in part:
                gemm(weight, row, rows, activations, T, np.uint64(int(sums) + 4 * column), total)
                column += rows
            per_block = 256 * _finish_units(operation.defines, operation.narrow)
            finish((-(-total // (2 * per_block)), T), (256,),
                   (sums, np.int32(first), np.int32(total // 2), *operation.arguments))  # fmt: skip

    def _room(self, name: str, nbytes: int) -> np.uint64:
        held = self._scratch.get(name)
        if held is None or held.nbytes < nbytes:
            self._scratch.pop(name, None)
            held = allocate((nbytes,), np.uint8, f"scratch of products ({name})",
                            "use a smaller tile, or let fewer sequences run at once")
            self._scratch[name] = held
        return np.uint64(held.data.ptr)


@cache
def finish_spec(defines: Defines, narrow: bool = False) -> Spec:
    return Spec.of("finish.cu", "finish", NARROW=int(narrow), UNITS=_finish_units(defines, narrow), **dict(defines))


def _finish_units(defines: Defines, narrow: bool) -> int:
    """Neighbouring units of one of its threads."""
    return 4 if narrow or dict(defines)["EPILOGUE"] == "QKV" else 1


def convert_spec(dtype: str, norm: bool, K: int) -> Spec:
    return Spec.of("convert.cu", "convert", WEIGHT=dtype, NORM=int(norm), HELD=min(-(-K // 1024), _HELD))


@cache
def _convert(dtype: str, norm: bool, K: int) -> Any:
    return kernel(convert_spec(dtype, norm, K))
