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

from kernels_cu.arrays import F16, F32, I32, NULL, U8, Array, address, allocate, upload_bytes, wide_address
from kernels_cu.attention import HEAD_DIMS
from kernels_cu.build import Spec, compile_all, current_device, import_cupy, kernel
from kernels_cu.errors import KernelError
from kernels_cu.layout import BLOCK_TOKENS, TURNED, WIDTHS, codes_bytes, meta_bytes
from kernels_cu.work import Span, Tail, Work, divide, join

MAX_GROUP = 16
MAX_CHUNK = 256
WARPS = 4  # of a decode attention block
THREADS = 32 * WARPS
MERGE_THREADS = 512
STATE_SIZE = 8  # int32 of one sequence's state, as runtime.backend has it: position, slot, ...
RING = 13056  # bytes of a warp's queue of copies: four blocks on a multiprocessor of 227 KiB
MAX_GROUP_TURNED = 4  # at head_dim 256, where RoPE is applied when K is read
RING_TURNED = 8704  # where RoPE's tables need shared memory too
_MEMORY = "decode attention", "lower --kv-bits"  # what runs out of it, and what to do
TABLES = ("cos", "sin", "k_levels", "v_levels", "k_centre", "k_half")  # of runtime.backend.FormatData


@dataclass(frozen=True)
class Part:
    """What one sequence, bound alone, brings to its own Bound and to a batch's; arena and data are kept alive."""

    work: Work
    formats: frozenset[tuple[int, int]]
    family: str
    arena: Array
    data: Any  # FormatData
    head: int  # of its tail; -1: it does not flush
    place: tuple[int, int, int]  # its tail's addresses of K and V, and its capacity

    @property
    def flushes(self) -> bool:
        return self.head >= 0


@dataclass(frozen=True)
class Launch:
    """Sequences that one kernel can read (_groups): the kernel and its work list on the GPU."""

    attend: Spec
    shared: int
    segments: Array
    blocks: int


@dataclass(frozen=True)
class Bound:
    """One layer's work for one sequence or a batch of them: kernels, their tables on the GPU, and scratch."""

    parts: tuple[Part, ...]  # one per sequence
    launches: tuple[Launch, ...]
    merge: Spec
    chunk: int
    tables: Array | None  # SequenceData of attention.cuh, of each sequence
    places: Array  # Place of append.cu, of each sequence
    results: Array
    partial: Array
    softmax: Array
    window: int | None
    heads: int
    kv_heads: int
    head_dim: int


class CacheOps:
    """Mixed into CudaBackend."""

    _fault_address: np.uint64  # where kernels say what they found wrong

    def __init__(self) -> None:
        self._partial: Array | None = None  # partial results, shared by all layers: one stream runs them in order
        self._softmax: Array | None = None
        self._prepared: set[Spec] = set()

    def kernels(self) -> dict[str, str]:
        return {"pack": "pack", "copy_tail": "copy_tail", "append": "append",
                "decode_attention": "decode_attention (mma.sync), merge_attention"}  # fmt: skip

    def pack(self, k: Array, v: Array, arena: Array, span: Span, starts: npt.NDArray[np.int32], chunk: int,
             positions: npt.NDArray[np.int32] | None = None, data: Any = None) -> None:  # fmt: skip
        (G, S, D), n = k.shape, span.n
        _check_shape(D, chunk, (span.k_bits, span.v_bits), span.formats)
        if starts.shape != (n,) or (n and not 0 <= starts.min() <= starts.max() <= S - chunk):
            raise KernelError(f"pack: the span takes {n} chunks of {chunk} of the rows 0..{S - 1}, but the starts are "
                              f"{starts.shape}, from {starts.min(initial=S)} to {starts.max(initial=0)}")  # fmt: skip
        if positions is not None and positions.shape != (n,):
            raise KernelError(f"pack: {n} chunks need as many positions, not {positions.shape}")
        if not n:
            return
        base = wide_address("arena", arena, arena.shape, U8)
        stored = _ints(arena, span.positions, n)
        stored.set(np.ascontiguousarray(starts if positions is None else positions, np.int32))
        rows = stored if positions is None else _upload(np.ascontiguousarray(starts, np.int32))
        sides = (("k", k, span.k_bits, span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride),
                 ("v", v, span.v_bits, span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride))
        for name, x, bits, codes, codes_stride, meta, meta_stride in sides:
            spec, shared = pack_spec(name == "k", bits, chunk, D, span.formats)
            extra: tuple[np.uint64, ...] = ()
            if spec.source != "pack.cu":
                cos, sin = _rope_tables(data, D) if span.formats in TURNED else (NULL, NULL)
                extra = (np.uint64(stored.data.ptr), cos, sin)
            if spec.source == "pack_kvquant.cu":
                levels, *channels = _levels(data, name, bits, G, D)
                limits = self._ranges(x, rows, base + np.uint64(span.v_shared), n, chunk) if name == "v" else None
                extra += (levels, *channels, NULL if limits is None else np.uint64(limits.data.ptr))
            kernel(spec, shared)((n, G), (128,), (
                wide_address(name, x, (G, S, D), F16), np.int64(S), np.uint64(rows.data.ptr), *extra,
                base + np.uint64(codes), np.int64(codes_stride), base + np.uint64(meta),
                np.int64(meta_stride)), shared_mem=shared)  # fmt: skip

    def _ranges(self, v: Array, rows: Array, shared: np.uint64, n: int, chunk: int) -> Array:
        """kvquant's smallest and largest values of each token that are no outliers (n, chunk, 2), and stores of them
        what attention needs at `shared`."""
        G, S, D = v.shape
        limits = _allocate((n * chunk * 2,), F32)
        kernel(ranges_spec(G, chunk, D))((n, chunk), (128,), (
            wide_address("v", v, (G, S, D), F16), np.int64(S), np.int32(G), np.uint64(rows.data.ptr),
            np.uint64(limits.data.ptr), shared))  # fmt: skip
        return limits

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

    def prepare(self, layers: Sequence[Sequence[Span]], heads: int, kv_heads: int, head_dim: int, chunk: int,
                window: int | None, flushes: bool) -> None:  # fmt: skip
        specs = {_kernel_of(spans, heads, kv_heads, head_dim, chunk, window, flushes)[2] for spans in layers}
        compile_all(specs - self._prepared)
        self._prepared |= specs

    def bind(self, arena: Array, spans: Sequence[Span], tail: Tail, heads: int, kv_heads: int, head_dim: int,
             chunk: int, window: int | None, flushed: Span | None = None, data: Any = None) -> Bound:  # fmt: skip
        formats, family, spec, shared = _kernel_of([*spans, flushed] if flushed else spans, heads, kv_heads, head_dim,
                                                   chunk, window, flushed is not None)
        if family in TURNED:
            _rope_tables(data, head_dim)
        base = int(wide_address("arena", arena, arena.shape, U8))
        work = divide(base, spans, tail, kv_heads, head_dim, chunk, _blocks_at_once(spec, shared, current_device()),
                      family, flushed)
        if family == "kvquant":
            _levels(data, "k", 2, kv_heads, head_dim), _levels(data, "v", 2, kv_heads, head_dim)
        part = Part(work, formats, family, arena, data, tail.head if flushed else -1,
                    (base + tail.k, base + tail.v, tail.capacity))
        return self._bound((part,), chunk, window, heads, kv_heads, head_dim)

    def bind_batch(self, bounds: Sequence[Bound]) -> Bound:
        """One layer of several sequences, each bound before: row b of q, k, v, state and out is the b-th's.

        Sequences may differ in formats, chunks per format and lengths. Those share a launch that one's own kernel can
        read, so that no kernel is compiled for a batch. What a sequence gets does not depend on the others: its cuts
        are its own (work.py).
        """
        shapes = {(bound.chunk, bound.window, bound.heads, bound.kv_heads, bound.head_dim) for bound in bounds}
        if len(shapes) != 1 or any(len(bound.parts) > 1 for bound in bounds):
            raise KernelError(f"bind_batch takes sequences of one model and chunk size, each bound alone, but got "
                              f"{len(bounds)} of chunk, window, heads, KV heads, head_dim {list(shapes)}")  # fmt: skip
        return self._bound(tuple(bound.parts[0] for bound in bounds), *shapes.pop())

    def _bound(self, parts: tuple[Part, ...], chunk: int, window: int | None, heads: int, kv_heads: int,
               head_dim: int) -> Bound:  # fmt: skip
        launches, results = [], np.zeros((len(parts), kv_heads, 3), np.int32)
        tables, n_results = None, 0
        for mine in _groups(parts):
            first = parts[mine[0]]
            work = join([parts[b].work for b in mine], mine, n_results)
            n_results = work.n_results
            results[mine] = work.results.reshape(-1, kv_heads, 3)
            spec, shared = attention_spec(head_dim, heads // kv_heads, chunk, first.formats, window is not None,
                                          first.family, first.flushes)
            launches.append(Launch(spec, shared, _upload(work.segments), work.blocks))
            if tables is None and (first.flushes or first.family in TURNED):
                tables = _upload(_sequence_data(parts, kv_heads))
        rows = n_results * (heads // kv_heads)
        if self._partial is None or self._partial.size < rows * head_dim:
            self._partial = _allocate((rows * head_dim,), F32)
        if self._softmax is None or self._softmax.size < 2 * rows:
            self._softmax = _allocate((2 * rows,), F32)
        return Bound(parts, tuple(launches), merge_spec(head_dim), chunk, tables,
                     _upload(np.array([part.place for part in parts], np.int64)), _upload(results), self._partial,
                     self._softmax, window, heads, kv_heads, head_dim)  # fmt: skip

    def append(self, k: Array, v: Array, bound: Bound, state: Array) -> None:
        """k, v, state may have more rows than the batch has sequences: those behind are not looked at."""
        (G, T, D), B = k.shape, len(bound.parts)
        if (bound.kv_heads, bound.head_dim) != (G, D) or T < B:
            raise KernelError(f"append: K and V are {k.shape}; expected {bound.kv_heads} heads, at least {B} rows and "
                              f"{bound.head_dim} channels")
        kernel(append_spec(D))((B, G), (64,), (
            wide_address("k", k, (G, T, D), F16), wide_address("v", v, (G, T, D), F16), np.int64(T),
            np.uint64(bound.places.data.ptr), address("state", state, (T, STATE_SIZE), I32),
            self._fault_address))  # fmt: skip

    def decode_attention(self, q: Array, bound: Bound, state: Array, out: Array) -> None:
        """Of a batch q, state and out may have more rows than there are sequences: those behind stay as they are."""
        T, B, H, D = len(q), len(bound.parts), bound.heads, bound.head_dim
        if T < B:
            raise KernelError(f"decode_attention: {T} rows for {B} sequences")
        partial, softmax = np.uint64(bound.partial.data.ptr), np.uint64(bound.softmax.data.ptr)
        rows, out_rows = address("q", q, (T, H, D), F32), address("out", out, (T, H * D), F32)
        states = address("state", state, (STATE_SIZE,) if T == 1 and state.ndim == 1 else (T, STATE_SIZE), I32)
        for launch in bound.launches:
            kernel(launch.attend, launch.shared)((launch.blocks,), (THREADS,), (
                rows, np.uint64(launch.segments.data.ptr), states, np.int32(bound.window or 0), partial, softmax,
                np.uint64(0 if bound.tables is None else bound.tables.data.ptr)), shared_mem=launch.shared)  # fmt: skip
        kernel(bound.merge)((H, B), (MERGE_THREADS,), (
            partial, softmax, np.uint64(bound.results.data.ptr), np.int32(H // bound.kv_heads), out_rows))


def _groups(parts: Sequence[Part]) -> list[list[int]]:
    """Numbers of the sequences that share a launch; the first of each has all their formats."""
    groups: list[list[int]] = []
    for b in sorted(range(len(parts)), key=lambda b: -len(parts[b].formats - {(16, 16)})):
        part = parts[b]
        for group in groups:
            first = parts[group[0]]
            if ((part.family, part.flushes) == (first.family, first.flushes)
                    and part.formats - {(16, 16)} <= first.formats):
                group.append(b)
                break
        else:
            groups.append([b])
    return groups


def _kernel_of(spans: Sequence[Span], heads: int, kv_heads: int, head_dim: int, chunk: int, window: int | None,
               flushes: bool) -> tuple[frozenset[tuple[int, int]], str, Spec, int]:  # fmt: skip
    """The formats of a layer's spans, their family, and what attention_spec gives them; KernelError if none fits."""
    group = heads // kv_heads
    if heads % kv_heads or group > MAX_GROUP:
        raise KernelError(f"decode attention on the GPU takes 1 to {MAX_GROUP} query heads per KV head, but there "
                          f"are {heads} over {kv_heads}; use --backend cpu")  # fmt: skip
    stored = [span for span in spans if span.n]
    family = _one_family([span.formats for span in stored if min(span.k_bits, span.v_bits) < 16])
    formats = frozenset((span.k_bits, span.v_bits) for span in stored)
    for pair in formats or {(16, 16)}:
        _check_shape(head_dim, chunk, pair, family)
    if family in TURNED and head_dim > 128 and group > MAX_GROUP_TURNED:
        raise KernelError(f"{family} formats turn the query in shared memory, which has room for {MAX_GROUP_TURNED} "
                          f"query heads of {head_dim} channels per KV head, not for {group}; use --backend cpu")
    return formats, family, *attention_spec(head_dim, group, chunk, formats, window is not None, family, flushes)


def pack_spec(is_k: bool, bits: int, chunk: int, head_dim: int, family: str = "rotated") -> tuple[Spec, int]:
    """The kernel that packs one width, and its bytes of dynamic shared memory."""
    macros = {"D": head_dim, "CHUNK": chunk, "PACKS_K": int(is_k), "WIDTH": bits}
    if bits == 16:
        return Spec.of("pack.cu", "pack", **macros), 0
    if family == "rotated":
        return Spec.of("pack.cu", "pack", **macros), 4 * chunk * (head_dim + 8) + 8 * head_dim + chunk * head_dim
    source = "pack_kvquant.cu" if family == "kvquant" else "pack_tokens.cu"
    spec = Spec.of(source, "pack", FAMILY=family.upper(), **macros)
    return spec, 4 * chunk * (head_dim + 8) + chunk * head_dim


def ranges_spec(kv_heads: int, chunk: int, head_dim: int) -> Spec:
    """The kernel that finds kvquant's ranges of V."""
    return Spec.of("pack_kvquant.cu", "ranges", D=head_dim, CHUNK=chunk, FAMILY="KVQUANT", PACKS_K=0, WIDTH=2,
                   TOKEN_VALUES=1 << (-(-kv_heads * head_dim // 128) - 1).bit_length())  # fmt: skip


def attention_spec(head_dim: int, group: int, chunk: int, formats: frozenset[tuple[int, int]], windowed: bool,
                   family: str = "rotated", flush: bool = False) -> tuple[Spec, int]:  # fmt: skip
    """The kernel for these (K bits, V bits), and its bytes of dynamic shared memory: a queue per warp."""
    coded = sorted(formats - {(16, 16)})
    ring = max([RING_TURNED if family in TURNED else RING,
                *(_room(k, v, chunk, head_dim, family) for k, v in [*coded, (16, 16)])])
    two_sizes = chunk > BLOCK_TOKENS and chunk % BLOCK_TOKENS  # of blocks, which is code for both
    blocks = 2 if head_dim > 128 or (head_dim > 64 and group > 8) else 3 if group > 8 or two_sizes else 4  # registers
    if family == "kvquant" and group > 1:
        blocks = min(blocks, 3)
    return Spec.of("decode_attention.cu", "decode_attention", D=head_dim, GROUP=group, CHUNK=chunk,
                   WINDOWED=int(windowed), RING=ring, BLOCKS=blocks, FAMILY=family.upper(), FLUSH=int(flush),
                   FORMATS="".join(f"F({k},{v})" for k, v in coded)), WARPS * ring  # fmt: skip


def append_spec(head_dim: int) -> Spec:
    return Spec.of("append.cu", "append", D=head_dim)


def merge_spec(head_dim: int) -> Spec:
    return Spec.of("merge_attention.cu", "merge_attention", D=head_dim, THREADS=MERGE_THREADS)


@cache
def _blocks_at_once(spec: Spec, shared: int, device: int) -> int:
    """How many blocks of a decode attention kernel the current GPU, `device`, runs at a time."""
    cuda = import_cupy().cuda
    function = kernel(spec, shared).kernel.ptr
    per_processor = cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, shared)
    return int(per_processor * cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])


def _room(k_bits: int, v_bits: int, chunk: int, head_dim: int, family: str) -> int:
    """Two slots of attention_segment.cuh's Blocks; kvquant needs 16 rows for outliers beside them."""
    row = 2 * head_dim + 16
    if k_bits == v_bits == 16:
        return 2 * 16 * row
    tokens = min(chunk, BLOCK_TOKENS)
    whole = family == "kvquant"  # a chunk's sparse store is its blocks'
    meta_of = [meta_bytes(is_k, chunk if whole else tokens, head_dim, family) for is_k in (True, False)]
    k_meta, v_meta = (nbytes + {0: 0, 8: 8, 4: 12, 12: 20}[nbytes % 16] for nbytes in meta_of)
    k = v = tokens * row
    if k_bits < 16:
        k = codes_bytes(True, k_bits, tokens, head_dim) + k_meta + (4 * head_dim if family in TURNED else 0)
    if v_bits < 16:
        v = codes_bytes(False, v_bits, tokens, head_dim) + v_meta + (4 * tokens if whole else 0)
    return 2 * max(k, v) + (16 * row if whole else 0)


def _check_shape(head_dim: int, chunk: int, widths: tuple[int, int], family: str) -> None:
    if family not in WIDTHS:
        raise KernelError(f"the GPU has no kernels for the {family} formats, but for {', '.join(WIDTHS)}; "
                          "use --backend cpu")  # fmt: skip
    if family == "kvquant" and head_dim > 128:
        raise KernelError(f"kvquant formats at head_dim {head_dim} need more registers than a GPU's thread has; "
                          "use --backend cpu")  # fmt: skip
    if head_dim not in HEAD_DIMS or chunk % 8 or not 8 <= chunk <= MAX_CHUNK or not set(widths) <= set(WIDTHS[family]):
        raise KernelError(f"the GPU's cache takes head_dim {', '.join(map(str, HEAD_DIMS))}, chunks of 8, 16, .. "
                          f"{MAX_CHUNK} tokens and, of {family} formats, {', '.join(map(str, WIDTHS[family]))} bits, "
                          f"but got head_dim {head_dim}, chunks of {chunk} and K{widths[0]}V{widths[1]}")  # fmt: skip


def _one_family(families: Sequence[str]) -> str:
    if len(set(families)) > 1:
        raise KernelError(f"decode attention reads formats of one family, but these are of {sorted(set(families))}")
    return families[0] if families else "rotated"


def _rope_tables(data: Any, head_dim: int) -> tuple[np.uint64, np.uint64]:
    """Addresses of the cosines and sines; their rows are copied 16 bytes at a time."""
    if data is None or data.cos is None or data.sin is None:
        raise KernelError("these formats keep K as it was before RoPE and need its tables (FormatData.cos and sin)")
    shape = (len(data.cos), head_dim // 2)
    return wide_address("cos", data.cos, shape, F32), wide_address("sin", data.sin, shape, F32)


def _levels(data: Any, side: str, bits: int, kv_heads: int, head_dim: int) -> tuple[np.uint64, ...]:
    """Addresses of one width's levels, and K's centres and half ranges."""
    if data is None or any(getattr(data, name) is None for name in TABLES[2:]):
        raise KernelError("kvquant formats need a calibration (FormatData.k_levels, v_levels, k_centre and k_half)")
    shape = (kv_heads, head_dim)
    levels = address(f"{side}_levels", getattr(data, f"{side}_levels"), (28,), F32)
    return (levels + np.uint64(4 * (2**bits - 4)), wide_address("k_centre", data.k_centre, shape, F32),
            wide_address("k_half", data.k_half, shape, F32))  # fmt: skip


def _sequence_data(parts: Sequence[Part], kv_heads: int) -> npt.NDArray[np.int64]:
    """SequenceData of attention.cuh, (B, 8)."""
    arrays = [[getattr(part.data, name, None) for name in TABLES] for part in parts]
    return np.array([[*(0 if array is None else array.data.ptr for array in row), max(part.head, 0), kv_heads]
                     for row, part in zip(arrays, parts, strict=True)], np.int64)  # fmt: skip


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return allocate(shape, dtype, *_MEMORY)


def _upload(table: npt.NDArray[Any]) -> Array:
    return upload_bytes(table, *_MEMORY)


def _ints(arena: Array, offset: int, n: int) -> Array:
    return arena[offset : offset + 4 * n].view(np.int32)
