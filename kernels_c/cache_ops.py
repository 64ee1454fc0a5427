"""CpuBackend's operations on a sequence's cache: packing, the tail, and decode attention (src/pack.h, src/decode.h).

Spans and tails are records with byte offsets into an arena (runtime.backend.Span, Tail). Letters: n chunks, C tokens of
a chunk, H query heads, G KV heads, D head_dim, S rows. D and C are multiples of 8
up to 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_c.arrays import F16, F32, I32, Buffer, check, pointer
from kernels_c.errors import KernelError
from kernels_c.isa import ffi, lib, operation

_OPERATIONS = ("pack", "decode_attention")
_STATE = (8,)
_NO_WINDOW = 2**31 - 1


class Bound:
    """One layer's cache as decode attention reads it; keeps the arena and the records alive."""

    __slots__ = ("_alive", "out_shape", "q_shape", "record")

    def __init__(self, record: Any, heads: int, head_dim: int, alive: tuple[Any, ...]) -> None:
        self.record, self.q_shape, self.out_shape = record, (1, heads, head_dim), (1, heads * head_dim)
        self._alive = alive


class CacheOps:
    """Mixed into CpuBackend, which has set `self.isa` before this class is initialized."""

    isa: str

    def __init__(self) -> None:
        self._pack, self._decode_attention = (operation(name, self.isa) for name in _OPERATIONS)

    def kernels(self) -> dict[str, str]:
        return {name: f"{name}_{self.isa}" for name in _OPERATIONS}

    def pack(self, k: Buffer, v: Buffer, arena: Buffer, span: Any, starts: npt.NDArray[np.int32], chunk: int,
             positions: npt.NDArray[np.int32] | None = None, data: Any = None) -> None:
        """Encode the chunks that begin at rows `starts` (n,) of k, v (G, S, D) f16 into the span, in that order.

        Codes and scales equal runtime.formats bit for bit. Writes the span's positions (= starts).
        """
        G, S, D = k.shape
        _check_sizes(D, chunk)
        _check_formats("pack", [span], positions, data)
        starts = np.ascontiguousarray(starts, np.int32)
        if len(starts) != span.n:
            raise KernelError(f"pack: starts has {len(starts)} entries, but the span holds {span.n} chunks")
        if span.n == 0:
            return
        if starts.min() < 0 or starts.max() > S - chunk:
            raise KernelError(f"pack: chunks of {chunk} begin at rows {starts.min()} to {starts.max()} of {S}")
        record = ffi.new("span *", _span(arena, span, G, D, chunk))
        args = pointer("k", k, (G, S, D), F16), pointer("v", v, (G, S, D), F16), record
        check(self._pack(*args, pointer("starts", starts, (span.n,), I32), S, G, D, chunk), "pack")

    def copy_tail(self, k: Buffer, v: Buffer, rows: npt.NDArray[np.int32], arena: Buffer, tail: Any, slot: int) -> None:
        """Copy rows (m,) of k, v (G, S, D) f16 to tail slots slot..slot+m-1 and write their positions (= rows)."""
        G, S, D = k.shape
        m = len(rows)
        if m == 0:
            return
        if slot < 0 or slot + m > tail.capacity:
            raise KernelError(f"copy_tail: slots {slot} to {slot + m - 1} of a tail of {tail.capacity}")
        if rows.min() < 0 or rows.max() >= S:
            raise KernelError(f"copy_tail: rows {rows.min()} to {rows.max()} of {S}")
        shape = G, tail.capacity, D
        _view(arena, tail.k, shape, F16)[:, slot : slot + m] = k[:, rows]
        _view(arena, tail.v, shape, F16)[:, slot : slot + m] = v[:, rows]
        _view(arena, tail.positions, shape[1:2], I32)[slot : slot + m] = rows

    def bind(self, arena: Buffer, spans: Sequence[Any], tail: Any, heads: int, kv_heads: int, head_dim: int, chunk: int,
             window: int | None, flushed: Any = None, data: Any = None) -> Bound:  # fmt: skip
        """Everything decode attention needs of one layer's cache, resolved and checked once."""
        _check_formats("bind", spans, flushed, data)
        _check_sizes(head_dim, chunk)
        if heads % kv_heads:
            raise KernelError(f"bind: {heads} query heads are no multiple of {kv_heads} KV heads")
        if window is not None and window < 1:
            raise KernelError(f"bind: window is {window}; expected at least 1, or None")
        if not 0 <= tail.head <= tail.capacity:
            raise KernelError(f"bind: the tail's head is {tail.head} of {tail.capacity} slots")
        records = ffi.new("span[]", [_span(arena, span, kv_heads, head_dim, chunk) for span in spans if span.n])
        half, positions = 2 * kv_heads * tail.capacity * head_dim, 4 * tail.capacity
        record = ffi.new("cache *", {
            "spans": records, "n_spans": len(records), "capacity": tail.capacity, "head": tail.head,
            "tail_k": ffi.cast("uint16_t *", _address(arena, "tail K", tail.k, half)),
            "tail_v": ffi.cast("uint16_t *", _address(arena, "tail V", tail.v, half)),
            "tail_positions": ffi.cast("int32_t *", _address(arena, "tail positions", tail.positions, positions)),
            "H": heads, "G": kv_heads, "D": head_dim, "C": chunk, "window": _NO_WINDOW if window is None else window,
        })  # fmt: skip
        return Bound(record, heads, head_dim, (arena, records))

    def bind_batch(self, bounds: Sequence[Bound]) -> tuple[Bound, ...]:
        """One layer of several sequences for one call of decode_attention, which takes them in turn."""
        return tuple(bounds)

    def decode_attention(self, q: Buffer, bound: Bound | tuple[Bound, ...], state: Buffer, out: Buffer) -> None:
        """One token's attention over all spans and the tail with one running softmax; out (1, H*D) f32.

        q (1, H, D) f32; state int32 (8,), as runtime.backend has it: tail slots 0..slot and the keys at positions
        above position - window are visible. With a batch of B bounds q, state and out have B rows.
        """
        if isinstance(bound, tuple):
            if not len(q) == len(bound) == len(state) == len(out):
                raise KernelError(f"decode_attention: q, state and out have {len(q)}, {len(state)} and {len(out)} rows "
                                  f"for a batch of {len(bound)}")  # fmt: skip
            for b, one in enumerate(bound):
                row, out_row = (array[b : b + 1].view(Buffer) for array in (q, out))
                self.decode_attention(row, one, state[b].view(Buffer), out_row)
            return
        status = self._decode_attention(
            pointer("q", q, bound.q_shape, F32),
            bound.record,
            pointer("state", state, _STATE, I32),
            pointer("out", out, bound.out_shape, F32),
        )
        check(status, "decode_attention")


def _check_formats(operation: str, spans: Sequence[Any], *extra: Any) -> None:
    formats = {span.formats for span in spans} - {"rotated"}
    if formats or any(argument is not None for argument in extra):
        raise KernelError(f"{operation}: the CPU kernels take rotated formats and a tail that is never packed, but "
                          f"these are {', '.join(formats) or 'rotated with more'}; leave --formats and flush out")


def _check_sizes(head_dim: int, chunk: int) -> None:
    for name, size, limit in (("head_dim", head_dim, lib.MAX_HEAD_DIM), ("chunk", chunk, lib.MAX_CHUNK)):
        if size % 8 or not 8 <= size <= limit:
            raise KernelError(f"{name} is {size}; the cache kernels need a multiple of 8 up to {limit}")


def _span(arena: Buffer, span: Any, kv_heads: int, head_dim: int, chunk: int) -> dict[str, Any]:
    """The C record of a span; raises KernelError if a kernel could not read it or it leaves the arena."""

    def region(kind: str, bits: int, codes: int, codes_stride: int, meta: int, meta_stride: int) -> dict[str, Any]:
        codes_bytes, meta_bytes = _block_bytes(kind, bits, chunk, head_dim)
        begins = {"codes": (codes, codes_stride, codes_bytes), "meta": (meta, meta_stride, meta_bytes)}
        record: dict[str, Any] = {"bits": bits}
        for part, (offset, stride, nbytes) in begins.items():
            what = f"{kind}{bits} {part}"
            record |= {part: _address(arena, what, offset, (kv_heads - 1) * stride + span.n * nbytes),
                       f"{part}_stride": stride, f"{part}_bytes": nbytes}  # fmt: skip
        return record

    positions = _address(arena, "chunk positions", span.positions, 4 * span.n)
    return {
        "n": span.n, "positions": ffi.cast("int32_t *", positions),
        "k": region("K", span.k_bits, span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride),
        "v": region("V", span.v_bits, span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride),
    }  # fmt: skip


def _block_bytes(kind: str, bits: int, chunk: int, head_dim: int) -> tuple[int, int]:
    """Bytes of one chunk's codes and metadata for one KV head: the same numbers as runtime.formats.block_bytes."""
    if bits == 16:
        return 2 * chunk * head_dim, 0
    if bits not in (2, 3, 4, 8):
        raise KernelError(f"no kernel for {kind} at {bits} bits; expected 2, 3, 4, 8 or 16")
    if kind == "K":
        return 4 * chunk * -(-head_dim * bits // 32), 2 * head_dim + 4
    return 4 * head_dim * -(-chunk * bits // 32), 2 * chunk


def _address(arena: Buffer, what: str, offset: int, nbytes: int) -> Any:
    """`uint8_t *` of `nbytes` at `offset` of the arena."""
    if arena.dtype != np.uint8 or arena.ndim != 1:
        raise KernelError(f"an arena is uint8 of one dimension, but this is {arena.dtype.name} {arena.shape}")
    if offset % 4 or offset < 0 or offset + nbytes > len(arena):
        raise KernelError(f"{what}: bytes {offset} to {offset + nbytes} of an arena of {len(arena)}, in steps of 4")
    return ffi.cast("uint8_t *", pointer("arena", arena, arena.shape, arena.dtype)) + offset


def _view(arena: Buffer, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return arena[offset : offset + nbytes].view(np.ndarray).view(dtype).reshape(shape)
