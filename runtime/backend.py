"""What every backend offers: the operations of a Llama layer over buffers that the backend itself owns.

The model (runtime.model) calls these in order and knows nothing of devices. Arrays are opaque to it apart from
slicing along the first axis and `.shape`. Everything a decode step touches is allocated before the first step and
keeps its address; the position and the tail's length live in an int32 state buffer, so that a backend may capture
the whole step once and replay it.

A backend raises MemoryError where memory is short and a RuntimeError of its own (KernelError) for what it cannot run;
callers in the runtime turn both into CocktailErrors.

Letters: T tokens (rows), E hidden size, H query heads, G KV heads, D head_dim, I MLP size, V vocabulary, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import BackendError

Array = Any  # a backend's own buffer: numpy.ndarray on the CPU, cupy.ndarray on CUDA
Matrix = Any  # a backend's own weight matrix (out, in), F32, F16 or BF16 as stored


@dataclass(frozen=True)
class Span:
    """The chunks of one layer and one tier, contiguous per KV head in one K and one V region. Offsets in bytes.

    Chunk c of KV head g has its K codes at k_codes + g * k_codes_stride + c * (bytes of a K block's codes), and
    likewise for its metadata and for V (runtime.formats). positions: int32 (n,), first token of each chunk.
    formats: the family behind widths below 16. v_shared: where it stores something of V for all heads at once, chunk
    c's lies at v_shared + c * (bytes of a V block's shared).
    """

    n: int
    k_bits: int
    v_bits: int
    k_codes: int
    k_codes_stride: int
    k_meta: int
    k_meta_stride: int
    v_codes: int
    v_codes_stride: int
    v_meta: int
    v_meta_stride: int
    positions: int
    formats: str = "rotated"
    v_shared: int = 0


@dataclass(frozen=True)
class Tail:
    """One layer's never-quantized tokens: k and v are FP16 (G, capacity, D), positions int32 (capacity,); byte offsets.

    The first `head` slots hold the prefix; attention visits them, then the spans in order, then the other slots.
    """

    k: int
    v: int
    positions: int
    capacity: int
    head: int


# Indices into the int32 state buffer of one sequence.
STATE_POSITION = 0  # position of the token being decoded
STATE_SLOT = 1  # tail slot that this token's K and V go to; slots 0..slot are visible after the write
STATE_TOKEN = 2  # id of the token being decoded
STATE_DRAWN = 3  # ids drawn so far
STATE_FLUSHED = 4  # chunks of the flushed span that are read instead of as many chunks of the tail behind its head
STATE_SIZE = 8  # sequences of a batch begin at multiples of 32 bytes


@dataclass(frozen=True)
class FormatData:
    """What some families need of one layer besides the values; device arrays, None where the family does without.

    Families that store K before RoPE: cos, sin (P, D/2) f32, the run's tables, row = position. kvquant: k_levels and
    v_levels (28,) f32, those of 2, 3 and 4 bits behind one another (runtime.formats.kvquant.levels_of); k_centre and
    k_half (G, D) f32.
    """

    cos: Array = None
    sin: Array = None
    k_levels: Array = None
    v_levels: Array = None
    k_centre: Array = None
    k_half: Array = None


@dataclass(frozen=True)
class Draws:
    """What drawing the ids of one sequence reads and writes, N of them at most; all keep their addresses.

    options: float64 (5,): temperature, top_k, top_p, min_p, repetition penalty, as in runtime.sampler.SamplingParams.
    uniforms: float64 (N,) in [0, 1): element i makes draw i. seen: int32 (M,), what the penalty is for: M - N ids of
    the prompt, then every draw. ids: int32 (N,), the draws where the host can read them (Backend.visible).
    """

    options: Array
    uniforms: Array
    seen: Array
    ids: Array


class BatchRows(Protocol):
    """The sequences of a batch on an asynchronous backend. Both operations may be captured."""

    def gather(self, state: Array, token: Array, cos: Array, sin: Array) -> None:
        """Row b of state (T, STATE_SIZE), token (T,) int32 and cos, sin (T, D/2) f32 becomes the b-th sequence's state,
        its token, and RoPE of its position."""

    def sample(self, logits: Array) -> None:
        """Backend.sample of each sequence, from row b of logits (T, V) for the b-th."""

    def errors(self) -> list[Exception | None]:
        """What went wrong in the last draw of each, once it is waited for."""


class Backend(Protocol):
    """The operations of a layer. Every method checks shapes and dtypes; results are deterministic."""

    name: str
    prefill_tile: int  # tokens of one prefill step: large enough to keep the device busy
    prefill_rows: int  # in steps of so many and more, what a row gets does not depend on how many there are
    asynchronous: bool  # operations return before their work is done, so that more can be launched meanwhile
    turns_by_place: bool  # formats that store K before RoPE need one set of frequencies for all positions of a chunk
    max_batch: int  # sequences of one decode step, at most; 1: in turns
    exact_batch: int  # up to so many, each bit for bit as in a batch of its own
    least_batch: int  # rows of such a step, at least: those behind the sequences mean nothing
    maps_weights: bool  # weights stay in their mapped file, whose memory counts as free
    reserve: int  # bytes of free_bytes that many requests leave to the operations' own scratch and tables

    def kernels(self) -> dict[str, str]:
        """Operation -> name of the kernel (with its instruction set or architecture) that serves it."""

    def check_model(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """Raises RuntimeError, naming what is unsupported, where the backend has no kernel for such attention."""

    # memory ----------------------------------------------------------------------------------------------------
    def matrix(self, data: npt.NDArray[Any], dtype: str) -> Matrix:
        """A weight matrix (out, in) from host memory; dtype F32, F16 or BF16 (uint16). The CPU keeps the view."""

    def vector(self, data: npt.NDArray[Any], dtype: str) -> Array:
        """A float32 vector from host memory."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array: ...

    def activation_type(self, rows: int, weights: Sequence[Matrix]) -> np.dtype[Any]:
        """Of what linear_add reads, `rows` rows, with any of these weights: float32, or what it would round them to."""

    def upload(self, data: npt.NDArray[Any]) -> Array: ...

    def download(self, array: Array) -> npt.NDArray[Any]: ...

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Host memory that `copy` reaches at full speed: page-locked on CUDA. Raises MemoryError."""

    def copy(self, source: Any, target: Any) -> None:
        """Between a buffer and host memory of equal bytes, either way, both contiguous. Does not wait; both have to
        stay as they are until the copy is done."""

    def beside(self, copies: Callable[[], None]) -> Callable[[], None]:
        """Do the copies behind the work handed over so far and beside what is handed over from now on. Returns a
        function: what is handed over after it was called comes behind the copies."""

    def visible(self, n: int) -> tuple[Array, npt.NDArray[np.int32]]:
        """int32 (n,), and the host's view of the same memory, valid for what has been waited for (`launched`)."""

    def launched(self) -> Callable[[], None]:
        """A function that waits until all work launched so far is done, and no longer; raises what went wrong in it."""

    def arena(self, nbytes: int) -> Array:
        """One allocation of uint8, 64-byte aligned; raises OutOfMemory with needed and free bytes."""

    def free_bytes(self) -> int | None:
        """What can still be allocated on the device, now; None where the system does not say."""

    def prepare(self, layers: Sequence[Sequence[Span]], heads: int, kv_heads: int, head_dim: int, chunk: int,
                window: int | None, flushes: bool) -> None:
        """Have ready what `bind` takes long to make for layers with these spans, flushed ones among them: on CUDA the
        kernels, which are compiled side by side."""

    def bind(self, arena: Array, spans: Sequence[Span], tail: Tail, heads: int, kv_heads: int, head_dim: int,
             chunk: int, window: int | None, flushed: Span | None = None, data: FormatData | None = None) -> Any:
        """Everything decode attention needs of one layer's cache, resolved once (addresses, work list, kernel).

        flushed: room for what the tail gives up while it grows (Layout.flush); decode attention reads its first
        state[STATE_FLUSHED] chunks. data: as pack's. Both are kept alive.
        """

    def bind_batch(self, bounds: Sequence[Any]) -> Any:
        """One layer of several sequences, each bound before, for one call of append and one of decode_attention.

        What a sequence gets does not depend on who shares the batch, to the last bit. Formats may be of several
        families.
        """

    def batch_of(self, weights: Sequence[Matrix]) -> int:
        """max_batch, or 1 where rows that are multiplied with any of these weights depend on how few they are."""

    def bind_rows(self, states: Sequence[Array], ropes: Sequence[tuple[Array, Array]],
                  draws: Sequence[Draws]) -> BatchRows | None:
        """What each sequence of a batch keeps for itself, resolved once; None where the host does as well by slices
        and `sample`, one sequence after the other. ropes: cos, sin (P, D/2) f32. All are kept alive."""

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function that does what `step` does, perhaps recorded once and replayed.

        `step` may touch only buffers that keep their addresses; what changes from call to call is in the state buffer.
        """

    # time ------------------------------------------------------------------------------------------------------
    def mark(self) -> Any:
        """A point behind all the work handed over so far, for `seconds`."""

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to another, as the device passes them; waits for the second."""

    # layer operations ------------------------------------------------------------------------------------------
    def embed(self, ids: Array, table: Matrix, out: Array) -> None:
        """out (T, E) float32 = table[ids]; ids (T,) int32."""

    def qkv(self, x: Array, norm: Array, eps: float, wq: Matrix, wk: Matrix, wv: Matrix, bq: Array | None,
            bk: Array | None, bv: Array | None, cos: Array, sin: Array, positions: Array, slots: Array, q: Array,
            k: Array, v: Array) -> None:
        """RMSNorm(x) times Wq, Wk, Wv (+ bias), RoPE on q and k (halves rotated as in Hugging Face).

        x (T, E) f32; cos, sin (P, D/2) f32, row = position; positions, slots (T,) int32; q (T, H, D) f32 out;
        k, v (G, S, D) f16 out, token t written to slot slots[t].
        """

    def prefill_attention(self, q: Array, k: Array, v: Array, start: int, window: int | None, out: Array) -> None:
        """Causal attention of query rows start..start+T over K and V rows 0..start+T-1 (row = position).

        q (T, H, D) f32; k, v (G, S, D) f16; out (T, H*D) f32 or its activation_type. Scale is D**-0.5. A key is visible
        when 0 <= query - key < window. Never a T x T buffer.
        """

    def attention_mass(self, q: Array, k: Array, start: int, window: int | None, first: int, chunk: int,
                       out: Array) -> None:
        """out (G, N) f32: how much of the attention of the query rows start..start+T-1 each chunk of keys gets.

        q (T, H, D) f32; k (G, S, D) f16, visible as in prefill_attention. Chunk n holds the `chunk` keys from row
        first + n * chunk on; its mass is the sum of the softmax's probabilities over its keys, the rows and the
        H / G query heads of the KV head. Probabilities are not kept.
        """

    def linear_add(self, h: Array, weight: Matrix, bias: Array | None, x: Array) -> None:
        """x (T, E) += h (T, I) @ weight.T + bias; h f32 or its activation_type."""

    def gate_up(self, x: Array, norm: Array, eps: float, gate: Matrix, up: Matrix, gate_bias: Array | None,
                up_bias: Array | None, out: Array) -> None:
        """out (T, I) = silu(n @ gate.T + gate_bias) * (n @ up.T + up_bias) with n = RMSNorm(x).

        out: f32 or its activation_type.
        """

    def logits(self, x: Array, norm: Array, eps: float, head: Matrix, out: Array) -> None:
        """out (T, V) f32 = RMSNorm(x) @ head.T."""

    # cache operations ------------------------------------------------------------------------------------------
    def pack(self, k: Array, v: Array, arena: Array, span: Span, starts: npt.NDArray[np.int32], chunk: int,
             positions: npt.NDArray[np.int32] | None = None, data: FormatData | None = None) -> None:
        """Encode the chunks that begin at rows `starts` (n,) of k, v (G, S, D) f16 into the span, in that order.

        Codes and scales equal runtime.formats bit for bit. positions (n,): of the chunks' first tokens, where they are
        not the rows' numbers; they are what the span's positions say and what K is turned back by. data: of the layer,
        for families that need it.
        """

    def copy_tail(self, k: Array, v: Array, rows: npt.NDArray[np.int32], arena: Array, tail: Tail, slot: int) -> None:
        """Copy rows (m,) of k, v (G, S, D) f16 to tail slots slot..slot+m-1 and write their positions (= rows)."""

    def append(self, k: Array, v: Array, bound: Any, state: Array) -> None:
        """Row b of k, v (G, B, D) f16 goes to slot state[b, STATE_SLOT] of the tail of a batch's b-th sequence; state
        (B, STATE_SIZE). Only where max_batch is more than 1."""

    def decode_attention(self, q: Array, bound: Any, state: Array, out: Array) -> None:
        """One token's attention over all spans and the tail with one running softmax. q (1, H, D) f32, out (1, H*D).

        Of a flushed span F = state[STATE_FLUSHED] chunks are read; the tail's slots head .. head + F * chunk - 1 hold
        the same tokens and are hidden.

        With a batch of B bounds: q (B, H, D), state (B, STATE_SIZE), out (B, H*D), a row for each sequence.
        """

    # end of the step -------------------------------------------------------------------------------------------
    def sample(self, logits: Array, draws: Draws, state: Array) -> None:
        """Draw id number state[STATE_DRAWN] from logits (1, V), which stay as they are, and advance the state with it.

        Repetition penalty over the ids seen, temperature (0: greedy, the lowest id among equals), top-k, min-p, top-p.
        """

    def advance(self, state: Array, token: int) -> None:
        """Next step, of an id that was not drawn: position and slot grow by one, token is the id to decode."""


def load_backend(name: str = "auto", threads: int | None = None, graph: bool = True) -> Backend:
    """The backend of that name ("auto", "cpu", "cuda"); kernels are imported here and nowhere else in the runtime.

    auto: CUDA where CuPy and a GPU are there, else the CPU. threads: of the CPU backend. graph: whether CUDA captures
    decode steps. Raises BackendError where its kernels are missing or cannot run on this machine.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise BackendError(f"unknown backend {name!r}; expected auto, cpu or cuda")
    if name != "cpu":
        from kernels_cu.errors import CupyMissing, NoDevice
        from kernels_cu.errors import KernelError as CudaError

        try:
            from kernels_cu.backend import CudaBackend

            cuda: Backend = CudaBackend(graph=graph)
            return cuda
        except (CupyMissing, NoDevice) as error:
            if name == "cuda":
                raise BackendError(str(error)) from error
        except CudaError as error:  # there is a GPU: running elsewhere would be a silent slow path
            raise BackendError(f"{error}; or use --backend cpu") from error
    try:
        from kernels_c.errors import KernelError
    except ImportError as error:
        raise BackendError(f"the C kernels are not installed ({error}); run: pip install .") from error
    try:
        from kernels_c.backend import CpuBackend

        backend: Backend = CpuBackend(threads=threads)
    except KernelError as error:
        raise BackendError(str(error)) from error
    return backend
