"""Operations on a sequence's cache on the GPU: packing, copying the tail, decode attention.

Regions hold the bytes that runtime.formats counts, in the order of formats.cuh (stated for the host in layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.arrays import F16, F32, I32, U8, Array, address, allocate, wide_address
from kernels_cu.attention import HEAD_DIMS
from kernels_cu.build import Spec, current_device, import_cupy, kernel
from kernels_cu.errors import KernelError
from kernels_cu.layout import BLOCK_TOKENS, WIDTHS, codes_bytes
from kernels_cu.work import Span, Tail, Work, divide, join

MAX_GROUP = 16
MAX_CHUNK = 256
WARPS = 4  # of a decode attention block
THREADS = 32 * WARPS
MERGE_THREADS = 512
STATE_SIZE = 8  # int32 of one sequence's state, as runtime.backend has it: position, slot, ...
RING = 13056  # bytes of a warp's queue of copies: four blocks on a multiprocessor of 227 KiB


@dataclass(frozen=True)
class Bound:
    """One layer's work for one sequence or a batch of them (`work`, and its tables on the GPU), kernels and scratch."""

    attend: Spec
    merge: Spec
    shared: int
    formats: frozenset[tuple[int, int]]
    chunk: int
    arenas: tuple[Array, ...]  # kept alive; one per sequence
    work: Work
    segments: Array
    results: Array
    partial: Array
    softmax: Array
    window: int | None
    heads: int
    kv_heads: int
    head_dim: int


class CacheOps:
    """Mixed into CudaBackend."""

    def __init__(self) -> None:
        self._partial: Array | None = None  # partial results, shared by all layers: one stream runs them in order
        self._softmax: Array | None = None

    def kernels(self) -> dict[str, str]:
        return {"pack": "pack", "copy_tail": "copy_tail",
                "decode_attention": "decode_attention (mma.sync), merge_attention"}  # fmt: skip

    def pack(self, k: Array, v: Array, arena: Array, span: Span, starts: npt.NDArray[np.int32], chunk: int,
             positions: npt.NDArray[np.int32] | None = None, data: Any = None) -> None:  # fmt: skip
        (G, S, D), n = k.shape, span.n
        _check_formats("pack", [span], positions, data)
        _check_shape(D, chunk, (span.k_bits, span.v_bits))
        if starts.shape != (n,) or (n and not 0 <= starts.min() <= starts.max() <= S - chunk):
            raise KernelError(f"pack: the span takes {n} chunks of {chunk} of the rows 0..{S - 1}, but the starts are "
                              f"{starts.shape}, from {starts.min(initial=S)} to {starts.max(initial=0)}")  # fmt: skip
        if not n:
            return
        base = wide_address("arena", arena, arena.shape, U8)
        stored = _ints(arena, span.positions, n)
        stored.set(np.ascontiguousarray(starts, np.int32))
        sides = (("k", k, span.k_bits, span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride),
                 ("v", v, span.v_bits, span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride))
        for name, x, bits, codes, codes_stride, meta, meta_stride in sides:
            spec, shared = pack_spec(name == "k", bits, chunk, D)
            kernel(spec, shared)((n, G), (128,), (
                wide_address(name, x, (G, S, D), F16), np.int64(S), np.uint64(stored.data.ptr),
                base + np.uint64(codes), np.int64(codes_stride), base + np.uint64(meta),
                np.int64(meta_stride)), shared_mem=shared)  # fmt: skip

    def copy_tail(self, k: Array, v: Array, rows: npt.NDArray[np.int32], arena: Array, tail: Tail, slot: int) -> None:
        (G, S, D), m = k.shape, len(rows)
        if not 0 <= slot <= tail.capacity - m or (m and not 0 <= rows.min() <= rows.max() < S):
            raise KernelError(f"copy_tail: {m} rows of 0..{S - 1} to slot {slot} and on do not fit a tail of "
                              f"{tail.capacity} slots")  # fmt: skip
        if not m:
            return
        base = wide_address("arena", arena, arena.shape, U8)
        positions = _ints(arena, tail.positions + 4 * slot, m)
        positions.set(np.ascontiguousarray(rows, np.int32))  # a row's position is its number
        kernel(Spec.of("copy_tail.cu", "copy_tail", D=D))((m, G), (64,), (
            wide_address("k", k, (G, S, D), F16), wide_address("v", v, (G, S, D), F16), np.int64(S),
            np.uint64(positions.data.ptr), base + np.uint64(tail.k), base + np.uint64(tail.v), np.int64(tail.capacity),
            np.int64(slot)))  # fmt: skip

    def bind(self, arena: Array, spans: Sequence[Span], tail: Tail, heads: int, kv_heads: int, head_dim: int,
             chunk: int, window: int | None, flushed: Span | None = None, data: Any = None) -> Bound:  # fmt: skip
        _check_formats("bind", spans, flushed, data)
        if heads % kv_heads or heads // kv_heads > MAX_GROUP:
            raise KernelError(f"decode attention on the GPU takes 1 to {MAX_GROUP} query heads per KV head, but there "
                              f"are {heads} over {kv_heads}; use --backend cpu")  # fmt: skip
        formats = frozenset((span.k_bits, span.v_bits) for span in spans if span.n)
        for pair in formats or {(16, 16)}:
            _check_shape(head_dim, chunk, pair)
        spec, shared = attention_spec(head_dim, heads // kv_heads, chunk, formats, window is not None)
        work = divide(int(wide_address("arena", arena, arena.shape, U8)), spans, tail, kv_heads, head_dim, chunk,
                      _blocks_at_once(spec, shared, current_device()))  # fmt: skip
        return self._bound((arena,), work, formats, chunk, window, heads, kv_heads, head_dim)

    def bind_batch(self, bounds: Sequence[Bound]) -> Bound:
        """One layer of several sequences, each bound before, as one launch: row b of q, state and out is the b-th's.

        Sequences may differ in formats, chunks per format and lengths. What one gets does not depend on the others.
        """
        shapes = {(bound.chunk, bound.window, bound.heads, bound.kv_heads, bound.head_dim) for bound in bounds}
        if len(shapes) != 1 or any(len(bound.arenas) > 1 for bound in bounds):
            raise KernelError(f"bind_batch takes sequences of one model and chunk size, each bound alone, but got "
                              f"{len(bounds)} of chunk, window, heads, KV heads, head_dim {list(shapes)}")  # fmt: skip
        formats = frozenset[tuple[int, int]]().union(*(bound.formats for bound in bounds))
        return self._bound(tuple(bound.arenas[0] for bound in bounds), join([bound.work for bound in bounds]), formats,
                           *shapes.pop())  # fmt: skip

    def _bound(self, arenas: tuple[Array, ...], work: Work, formats: frozenset[tuple[int, int]], chunk: int,
               window: int | None, heads: int, kv_heads: int, head_dim: int) -> Bound:  # fmt: skip
        spec, shared = attention_spec(head_dim, heads // kv_heads, chunk, formats, window is not None)
        rows = work.n_results * (heads // kv_heads)
        if self._partial is None or self._partial.size < rows * head_dim:
            self._partial = _allocate((rows * head_dim,), F32)
        if self._softmax is None or self._softmax.size < 2 * rows:
            self._softmax = _allocate((2 * rows,), F32)
        return Bound(spec, merge_spec(head_dim), shared, formats, chunk, arenas, work, _upload(work.segments),
                     _upload(work.results), self._partial, self._softmax, window, heads, kv_heads,
                     head_dim)  # fmt: skip

    def decode_attention(self, q: Array, bound: Bound, state: Array, out: Array) -> None:
        B, H, D = len(bound.arenas), bound.heads, bound.head_dim
        partial, softmax = np.uint64(bound.partial.data.ptr), np.uint64(bound.softmax.data.ptr)
        kernel(bound.attend, bound.shared)((bound.work.blocks,), (THREADS,), (
            address("q", q, (B, H, D), F32), np.uint64(bound.segments.data.ptr),
            address("state", state, (STATE_SIZE,) if B == 1 and state.ndim == 1 else (B, STATE_SIZE), I32),
            np.int32(bound.window or 0), partial, softmax), shared_mem=bound.shared)  # fmt: skip
        kernel(bound.merge)((H, B), (MERGE_THREADS,), (
            partial, softmax, np.uint64(bound.results.data.ptr), np.int32(H // bound.kv_heads),
            address("out", out, (B, H * D), F32)))  # fmt: skip


def _check_formats(operation: str, spans: Sequence[Span], *extra: Any) -> None:
    formats = {getattr(span, "formats", "rotated") for span in spans} - {"rotated"}
    if formats or any(argument is not None for argument in extra):
        raise KernelError(f"{operation}: the GPU's kernels take rotated formats and a tail that is never packed, but "
                          f"these are {', '.join(formats) or 'rotated with more'}; leave --formats and flush out")


def pack_spec(is_k: bool, bits: int, chunk: int, head_dim: int) -> tuple[Spec, int]:
    """The kernel that packs one width, and its bytes of dynamic shared memory."""
    spec = Spec.of("pack.cu", "pack", D=head_dim, CHUNK=chunk, PACKS_K=int(is_k), WIDTH=bits)
    return spec, 0 if bits == 16 else 4 * chunk * (head_dim + 8) + 8 * head_dim + chunk * head_dim


def attention_spec(head_dim: int, group: int, chunk: int, formats: frozenset[tuple[int, int]],
                   windowed: bool) -> tuple[Spec, int]:  # fmt: skip
    """The kernel for these (K bits, V bits), and its bytes of dynamic shared memory: a queue per warp."""
    coded = sorted(formats - {(16, 16)})
    ring = max([RING, *(2 * _slot_bytes(k, v, chunk, head_dim) for k, v in [*coded, (16, 16)])])
    two_sizes = chunk > BLOCK_TOKENS and chunk % BLOCK_TOKENS  # of blocks, which is code for both
    blocks = 2 if head_dim > 128 or (head_dim > 64 and group > 8) else 3 if group > 8 or two_sizes else 4  # registers
    return Spec.of("decode_attention.cu", "decode_attention", D=head_dim, GROUP=group, CHUNK=chunk,
                   WINDOWED=int(windowed), RING=ring, BLOCKS=blocks,
                   FORMATS="".join(f"F({k},{v})" for k, v in coded)), WARPS * ring  # fmt: skip


def merge_spec(head_dim: int) -> Spec:
    return Spec.of("merge_attention.cu", "merge_attention", D=head_dim, THREADS=MERGE_THREADS)


@cache
def _blocks_at_once(spec: Spec, shared: int, device: int) -> int:
    """How many blocks of a decode attention kernel the current GPU, `device`, runs at a time."""
    cuda = import_cupy().cuda
    function = kernel(spec, shared).kernel.ptr
    per_processor = cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, shared)
    return int(per_processor * cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])


def _slot_bytes(k_bits: int, v_bits: int, chunk: int, head_dim: int) -> int:
    """Blocks::SLOT of decode_attention.cu."""
    tokens = 16 if k_bits == v_bits == 16 else min(chunk, BLOCK_TOKENS)
    rows = tokens * (2 * head_dim + 16)
    k = rows if k_bits == 16 else codes_bytes(True, k_bits, tokens, head_dim) + 2 * head_dim + 16
    v = rows if v_bits == 16 else codes_bytes(False, v_bits, tokens, head_dim) + 2 * tokens
    return max(k, v)


def _check_shape(head_dim: int, chunk: int, widths: tuple[int, int]) -> None:
    if head_dim not in HEAD_DIMS or chunk % 8 or not 8 <= chunk <= MAX_CHUNK or not set(widths) <= set(WIDTHS):
        raise KernelError(f"the GPU's cache takes head_dim {', '.join(map(str, HEAD_DIMS))}, chunks of 8, 16, .. "
                          f"{MAX_CHUNK} tokens and {', '.join(map(str, WIDTHS))} bits, but got head_dim {head_dim}, "
                          f"chunks of {chunk} and K{widths[0]}V{widths[1]}")  # fmt: skip


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return allocate(shape, dtype, "decode attention", "lower --kv-bits")


def _upload(table: npt.NDArray[Any]) -> Array:
    array = _allocate((table.nbytes,), U8)
    array.set(np.ascontiguousarray(table).reshape(-1).view(np.uint8))
    return array


def _ints(arena: Array, offset: int, n: int) -> Array:
    return arena[offset : offset + 4 * n].view(np.int32)
