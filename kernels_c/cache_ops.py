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

from kernels_c.arrays import F16, F32, I32, NULL, Buffer, allocate, check, pointer
from kernels_c.errors import KernelError
from kernels_c.isa import ffi, lib, operation

_OPERATIONS = ("pack", "append", "decode_attention")
_NO_WINDOW = 2**31 - 1
_WIDTHS = {"rotated": (2, 3, 4, 8), "kivi": (2, 3, 4, 8), "atom": (4,), "kvquant": (2, 3, 4)}  # besides 16
_PRE_ROPE = ("atom", "kvquant")  # store K as it was before RoPE
_LEVELS = 4 + 8 + 16  # of kvquant's widths
_VECTOR = 16  # lanes of the widest vectors


class Bound:
    """One layer's cache as decode attention reads it, or those of a batch; keeps the arenas and the records alive."""

    __slots__ = ("_alive", "caches", "out_shape", "q_shape", "records", "shape", "state_shape")

    def __init__(self, records: Sequence[Any], shape: tuple[int, int, int], alive: Any, batch: bool = False) -> None:
        """records: `cache *` of each sequence; shape: H, G, D; batch: whether state is (B, 8) rather than (8,)."""
        B, (H, _, D) = len(records), shape
        self.records, self.shape, self.caches = tuple(records), shape, ffi.new("cache *[]", list(records))
        self.q_shape, self.out_shape = (B, H, D), (B, H * D)
        self.state_shape = (B, lib.STATE_SIZE) if batch else (lib.STATE_SIZE,)
        self._alive = alive


class CacheOps:
    """Mixed into CpuBackend, which has set `self.isa` before this class is initialized."""

    isa: str

    def __init__(self) -> None:
        self._pack, self._append, self._decode_attention = (operation(name, self.isa) for name in _OPERATIONS)

    def kernels(self) -> dict[str, str]:
        return {name: f"{name}_{self.isa}" for name in _OPERATIONS}

    def pack(self, k: Buffer, v: Buffer, arena: Buffer, span: Any, starts: npt.NDArray[np.int32], chunk: int,
             positions: npt.NDArray[np.int32] | None = None, data: Any = None) -> None:  # fmt: skip
        """Encode the chunks that begin at rows `starts` (n,) of k, v (G, S, D) f16 into the span, in that order.

        Codes and scales equal runtime.formats bit for bit. positions (n,), if not the rows, are what the span's
        positions say and what K is turned back by; data: runtime.backend.FormatData, for families that need it.
        """
        G, S, D = k.shape
        _check_sizes(D, chunk)
        starts = np.ascontiguousarray(starts, np.int32)
        positions = starts if positions is None else np.ascontiguousarray(positions, np.int32)
        if not len(starts) == len(positions) == span.n:
            raise KernelError(f"pack: starts has {len(starts)} entries and positions {len(positions)}, but the span "
                              f"holds {span.n} chunks")  # fmt: skip
        if span.n == 0:
            return
        if starts.min() < 0 or starts.max() > S - chunk:
            raise KernelError(f"pack: chunks of {chunk} begin at rows {starts.min()} to {starts.max()} of {S}")
        record = ffi.new("span *", _span(arena, span, G, D, chunk))
        formats, _alive = _format_data([span], data, G, D)
        turned = span.formats in _PRE_ROPE and span.k_bits < 16
        if turned and not 0 <= positions.min() <= positions.max() <= formats.P - chunk:
            raise KernelError(f"pack: chunks of {chunk} begin at positions {positions.min()} to {positions.max()}, but "
                              f"cos and sin have {formats.P} rows")  # fmt: skip
        args = pointer("k", k, (G, S, D), F16), pointer("v", v, (G, S, D), F16), record
        rows = pointer("starts", starts, (span.n,), I32), pointer("positions", positions, (span.n,), I32)
        check(self._pack(*args, *rows, formats, S, G, D, chunk), "pack")

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

    def prepare(self, layers: Sequence[Sequence[Any]], heads: int, kv_heads: int, head_dim: int, chunk: int,
                window: int | None, flushes: bool) -> None:  # fmt: skip
        """Nothing: these kernels were compiled when they were installed."""

    def bind(self, arena: Buffer, spans: Sequence[Any], tail: Any, heads: int, kv_heads: int, head_dim: int, chunk: int,
             window: int | None, flushed: Any = None, data: Any = None) -> Bound:  # fmt: skip
        """Everything decode attention needs of one layer's cache, resolved and checked once."""
        _check_sizes(head_dim, chunk)
        if heads % kv_heads:
            raise KernelError(f"bind: {heads} query heads are no multiple of {kv_heads} KV heads")
        if window is not None and window < 1:
            raise KernelError(f"bind: window is {window}; expected at least 1, or None")
        if not 0 <= tail.head <= tail.capacity:
            raise KernelError(f"bind: the tail's head is {tail.head} of {tail.capacity} slots")
        stored = [span for span in spans if span.n]
        records = ffi.new("span[]", [_span(arena, span, kv_heads, head_dim, chunk) for span in stored])
        last = NULL if flushed is None else ffi.new("span *", _span(arena, flushed, kv_heads, head_dim, chunk))
        formats, alive = _format_data(stored if flushed is None else [*stored, flushed], data, kv_heads, head_dim,
                                      (chunk, tail.head % chunk))  # fmt: skip
        half, positions = 2 * kv_heads * tail.capacity * head_dim, 4 * tail.capacity
        record = ffi.new("cache *", {
            "spans": records, "n_spans": len(records), "flushed": last, "data": formats,
            "capacity": tail.capacity, "head": tail.head,
            "tail_k": ffi.cast("uint16_t *", _address(arena, "tail K", tail.k, half)),
            "tail_v": ffi.cast("uint16_t *", _address(arena, "tail V", tail.v, half)),
            "tail_positions": ffi.cast("int32_t *", _address(arena, "tail positions", tail.positions, positions)),
            "H": heads, "G": kv_heads, "D": head_dim, "C": chunk, "window": _NO_WINDOW if window is None else window,
        })  # fmt: skip
        return Bound([record], (heads, kv_heads, head_dim), (arena, records, last, formats, alive))

    def bind_batch(self, bounds: Sequence[Bound]) -> Bound:
        """One layer of several sequences for one call of append and decode_attention, a task per sequence and head."""
        shapes = {bound.shape for bound in bounds}
        if len(shapes) != 1:
            raise KernelError(f"bind_batch takes sequences of one model, but got {len(bounds)} of query heads, KV "
                              f"heads and head_dim {sorted(shapes)}")  # fmt: skip
        return Bound([record for bound in bounds for record in bound.records], shapes.pop(), tuple(bounds), batch=True)

    def append(self, k: Buffer, v: Buffer, bound: Bound, state: Buffer) -> None:
        """Row b of k, v (G, B, D) f16 goes to the tail of the batch's b-th sequence, slot state[b, 1]."""
        (B, _, D), G = bound.q_shape, bound.shape[1]
        rows = pointer("k", k, (G, B, D), F16), pointer("v", v, (G, B, D), F16)
        check(self._append(*rows, bound.caches, pointer("state", state, bound.state_shape, I32), B), "append")

    def decode_attention(self, q: Buffer, bound: Bound, state: Buffer, out: Buffer) -> None:
        """One token's attention over all spans and the tail with one running softmax; out (1, H*D) f32.

        q (1, H, D) f32; state int32 (8,), as runtime.backend has it: tail slots 0..slot and the keys at positions
        above position - window are visible. With a batch of B bounds q, state and out have B rows.
        """
        B = len(bound.records)
        if B > 1 and not len(q) == len(state) == len(out) == B:
            raise KernelError(f"decode_attention: q, state and out have {len(q)}, {len(state)} and {len(out)} rows "
                              f"for a batch of {B}")  # fmt: skip
        status = self._decode_attention(
            pointer("q", q, bound.q_shape, F32),
            bound.caches,
            pointer("state", state, bound.state_shape, I32),
            pointer("out", out, bound.out_shape, F32),
            B,
        )
        check(status, "decode_attention")


def _check_sizes(head_dim: int, chunk: int) -> None:
    for name, size, limit in (("head_dim", head_dim, lib.MAX_HEAD_DIM), ("chunk", chunk, lib.MAX_CHUNK)):
        if size % 8 or not 8 <= size <= limit:
            raise KernelError(f"{name} is {size}; the cache kernels need a multiple of 8 up to {limit}")


def _span(arena: Buffer, span: Any, kv_heads: int, head_dim: int, chunk: int) -> dict[str, Any]:
    """The C record of a span; raises KernelError if a kernel could not read it or it leaves the arena."""

    def region(kind: str, bits: int, codes: int, codes_stride: int, meta: int, meta_stride: int,
               shared: int) -> dict[str, Any]:  # fmt: skip
        codes_bytes, meta_bytes, shared_bytes = _block_bytes(kind, bits, chunk, head_dim, span.formats)
        begins = {"codes": (codes, codes_stride, codes_bytes), "meta": (meta, meta_stride, meta_bytes),
                  "shared": (shared, 0, shared_bytes)}  # fmt: skip
        family = lib.HALF if bits == 16 else getattr(lib, span.formats.upper())
        record: dict[str, Any] = {"bits": bits, "family": family}
        for part, (offset, stride, nbytes) in begins.items():
            what = f"{kind}{bits} {part}"
            record |= {part: _address(arena, what, offset, (kv_heads - 1) * stride + span.n * nbytes),
                       f"{part}_bytes": nbytes}  # fmt: skip
            if part != "shared":
                record[f"{part}_stride"] = stride
        return record

    positions = _address(arena, "chunk positions", span.positions, 4 * span.n)
    return {
        "n": span.n, "positions": ffi.cast("int32_t *", positions),
        "k": region("K", span.k_bits, span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride, 0),
        "v": region("V", span.v_bits, span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride,
                    span.v_shared),
    }  # fmt: skip


def _block_bytes(kind: str, bits: int, chunk: int, head_dim: int, formats: str) -> tuple[int, int, int]:
    """Bytes of one chunk's codes and metadata for one KV head, and of what all heads share: the same numbers as
    runtime.formats.block_bytes."""
    if bits == 16:
        return 2 * chunk * head_dim, 0, 0
    if formats not in _WIDTHS:
        raise KernelError(f"no kernel for {formats} formats; expected {', '.join(_WIDTHS)}")
    if bits not in _WIDTHS[formats]:
        raise KernelError(f"no kernel for {kind} at {bits} bits in {formats} formats; expected one of "
                          f"{', '.join(map(str, _WIDTHS[formats]))}, 16")  # fmt: skip
    is_k = kind == "K"
    streams, length = (chunk, head_dim) if is_k else (head_dim, chunk)
    codes = 4 * streams * -(-length * bits // 32)
    if formats == "rotated":
        return codes, 2 * head_dim + 4 if is_k else 2 * chunk, 0
    if formats == "kivi":
        return codes, 4 * head_dim if is_k else 4 * chunk * -(-head_dim // lib.KIVI_GROUP), 0
    if formats == "atom":
        return codes, 4 * chunk, 0
    return codes, 4 + 4 * -(-chunk * head_dim // 80), 0 if is_k else 4 * chunk


def _format_data(spans: Sequence[Any], data: Any, kv_heads: int, head_dim: int,
                 turned: tuple[int, int] | None = None) -> tuple[Any, Any]:  # fmt: skip
    """The C record of what the spans' families need (NULL if nothing), and what to keep alive as long as it.

    turned: the chunk size and the first chunk's least position, for decode attention.
    """
    needed: dict[str, tuple[int, ...]] = {}
    tables = {span.formats for span in spans if span.k_bits < 16} & set(_PRE_ROPE)
    if tables:
        rows = len(data.cos) if data is not None and data.cos is not None else 0
        needed |= dict.fromkeys(("cos", "sin"), (rows, head_dim // 2))
    for kind in "kv":
        if any(span.formats == "kvquant" and getattr(span, f"{kind}_bits") < 16 for span in spans):
            needed[f"{kind}_levels"] = (_LEVELS,)
            if kind == "k":
                needed |= dict.fromkeys(("k_centre", "k_half"), (kv_heads, head_dim))
    if not needed:
        return NULL, None
    missing = [name for name in needed if getattr(data, name, None) is None]
    if missing:
        families = ", ".join(sorted({span.formats for span in spans}))
        raise KernelError(f"{families} formats need {', '.join(missing)} of the layer's FormatData")
    fields = {name: pointer(name, getattr(data, name), shape, F32) for name, shape in needed.items()}
    turns = None
    if tables:
        fields["P"] = len(data.cos)
    if tables and turned is not None:
        turns = _turns(data.cos, data.sin, *turned)
        fields |= {"turns": pointer("turns", turns, turns.shape, F32), "tiles": len(turns), "row": turns.shape[-1],
                   "first": turned[1]}  # fmt: skip
    return ffi.new("format_data *", fields), (data, turns)


def _turns(cos: Buffer, sin: Buffer, chunk: int, first: int) -> Buffer:
    """Cosines and sines (P, D/2) as decode attention reads them, (tiles, D/2, 2, row): tile i holds the `chunk`
    positions from first + i * chunk on, side by side. Made once for all layers of a run."""
    known = getattr(cos, "turns", None)
    if known is not None and known[0] is sin and known[1:3] == (chunk, first):
        return known[3]  # type: ignore[no-any-return]
    tiles, half, row = max(0, len(cos) - first) // chunk, cos.shape[1], -(-chunk // _VECTOR) * _VECTOR
    turns = allocate((tiles, half, 2, row), F32)
    turns[..., chunk:] = 0
    for i, table in enumerate((cos, sin)):
        whole = np.asarray(table)[first : first + tiles * chunk].reshape(tiles, chunk, half)
        turns[:, :, i, :chunk] = whole.swapaxes(1, 2)
    if isinstance(cos, Buffer):
        cos.turns = sin, chunk, first, turns
    return turns


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
