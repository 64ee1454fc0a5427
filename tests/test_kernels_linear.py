"""Linear layers, norms, RoPE and the embedding on every instruction set, against plain float64 NumPy."""

from threading import Thread

import numpy as np
import psutil
import pytest
from dense_ref import EPS, Qkv, hostile, norm64, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_c import CpuBackend, KernelError, available_isas

ISAS = available_isas()
BACKENDS = {isa: CpuBackend(threads=1, isa=isa) for isa in ISAS}
GUARD = 64  # elements of canary on either side of an output

dtypes = st.sampled_from(["F32", "F16", "BF16"])
rows = st.one_of(st.integers(1, 14), st.sampled_from([24, 37, 100]))
sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 160, 576]))


class Guarded:
    """An output filled with NaN between two guard bands, which check() proves untouched."""

    def __init__(self, shape, dtype=np.float32, fill=None):
        n = int(np.prod(shape))
        self.whole = np.full(n + 2 * GUARD, np.nan, dtype)
        self.array = self.whole[GUARD : GUARD + n].reshape(shape)
        if fill is not None:
            self.array[...] = fill

    def check(self):
        assert np.isnan(self.whole[:GUARD]).all() and np.isnan(self.whole[-GUARD:]).all(), "wrote outside the output"
        return np.asarray(self.array, np.float64)


def unaligned(data):
    """The same matrix at an odd address, as a mapped file may have it."""
    raw = np.zeros(data.nbytes + 1, np.uint8)
    raw[1:] = data.view(np.uint8).ravel()
    return raw[1:].view(data.dtype).reshape(data.shape)


def dot_bound(n, a, b):
    """|error| of a float32 dot product of length n in any order: roundings walk at random, so 4 sqrt(n) of them."""
    return 4 * (np.sqrt(n) + 4) * EPS * (np.abs(a) @ np.abs(b)) + 1e-37


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(T=rows, K=sizes, N=sizes, dtype=dtypes, bias=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_linear_add(isa, T, K, N, dtype, bias, seed):
    rng = np.random.default_rng(seed)
    data, w = stored(rng, (N, K), dtype)
    h, x0, b = hostile(rng, (T, K)), hostile(rng, (T, N)), rng.standard_normal(N).astype(np.float32)
    x = Guarded((T, N), fill=x0)
    BACKENDS[isa].linear_add(h, BACKENDS[isa].matrix(unaligned(data), dtype), b if bias else None, x.array)
    expected = h.astype(np.float64) @ w.T + x0 + (b if bias else 0)
    bound = dot_bound(K, h.astype(np.float64), w.T) + 4 * EPS * (np.abs(expected) + np.abs(x0) + np.abs(b))
    assert (np.abs(x.check() - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(T=rows, E=sizes, V=sizes, dtype=dtypes, seed=st.integers(0, 2**32 - 1))
def test_logits(isa, T, E, V, dtype, seed):
    rng = np.random.default_rng(seed)
    data, w = stored(rng, (V, E), dtype)
    x, norm = hostile(rng, (T, E)), rng.standard_normal(E).astype(np.float32)
    out = Guarded((T, V))
    BACKENDS[isa].logits(x, norm, 1e-5, BACKENDS[isa].matrix(data, dtype), out.array)
    normed = norm64(x, norm, 1e-5)
    bound = 2 * dot_bound(E, normed, w.T)  # once for the products, once for the norm
    assert (np.abs(out.check() - normed @ w.T) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(T=rows, E=sizes, I=sizes, gate=dtypes, up=dtypes, bias=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_gate_up(isa, T, E, I, gate, up, bias, seed):  # noqa: E741
    rng = np.random.default_rng(seed)
    (g_data, g), (u_data, u) = stored(rng, (I, E), gate), stored(rng, (I, E), up)
    x, norm = hostile(rng, (T, E)), rng.standard_normal(E).astype(np.float32)
    gb, ub = (rng.standard_normal(I).astype(np.float32) if bias else None for _ in range(2))
    out, backend = Guarded((T, I)), BACKENDS[isa]
    backend.gate_up(x, norm, 1e-5, backend.matrix(g_data, gate), backend.matrix(u_data, up), gb, ub, out.array)
    n = norm64(x, norm, 1e-5)
    a, b = n @ g.T + (0 if gb is None else gb), n @ u.T + (0 if ub is None else ub)
    sigmoid = 0.5 * (1 + np.tanh(a / 2))
    # silu is 1.1-Lipschitz; exp adds a few units to the quotient; each factor carries its dot product's error.
    da, db = (2 * dot_bound(E, n, w.T) + 4 * EPS * np.abs(y) + 4 * EPS for w, y in ((g, a), (u, b)))
    bound = 1.1 * da * (np.abs(b) + db) + np.abs(a * sigmoid) * db + 16 * EPS * np.abs(a * b) + 1e-30
    assert (np.abs(out.check() - a * sigmoid * b) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    T=rows,
    E=sizes,
    G=st.integers(1, 3),
    group=st.integers(1, 4),
    D=st.sampled_from([8, 24, 64, 80, 128, 256]),
    dtype=dtypes,
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 1e-6, 3e5]),  # K and V among FP16's subnormals, and beyond its range
    seed=st.integers(0, 2**32 - 1),
)
def test_qkv(isa, T, E, G, group, D, dtype, bias, scale, seed):
    case, backend = Qkv(np.random.default_rng(seed), T, E, G, group, D, dtype, bias, scale), BACKENDS[isa]
    q, k, v = case.outputs(Guarded)
    backend.qkv(case.x, case.norm, 1e-5, *(backend.matrix(data, dtype) for data, _ in case.parts), *case.biases,
                case.cos, case.sin, case.positions, case.slots, q.array, k.array, v.array)
    case.check(q.check(), k.check(), v.check(), lambda a, b: dot_bound(E, a, b))


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_survives_embedding_and_store(isa):
    """All 65536 halves widen exactly; all finite ones come back from the FP16 store unchanged, others clamped."""
    backend = BACKENDS[isa]
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    out = backend.empty((256, 256), np.float32)
    ids = backend.upload(np.arange(256, dtype=np.int32))
    backend.embed(ids, backend.matrix(halves, "F16"), out)
    wide = halves.astype(np.float32)
    assert np.array_equal(out, wide, equal_nan=True)
    bits = out.view(np.uint32)[~np.isnan(out)]
    assert np.array_equal(bits, wide.view(np.uint32)[~np.isnan(wide)]), "a sign of zero was lost"


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_half_store_rounds_to_nearest_even(isa, bits):
    """A 1 x 1 value weight of 1 passes any float32 to the V cache: it must round as NumPy does, after the clamp."""
    values = np.array(bits, np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    assert_store(BACKENDS[isa], values)


@pytest.mark.parametrize("isa", ISAS)
def test_half_store_at_ties_and_edges(isa):
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    near = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0)), halves.astype(np.float32)]
    edges = np.array([65504, 65519.99, 65520, 65536, 1e38, 2.0**-25, 2.0**-24, 2.0**-149, 0], np.float32)
    values = np.concatenate([*near, edges])
    assert_store(BACKENDS[isa], np.concatenate([values, -values]))


def assert_store(backend, values):
    """V = bias exactly where the weights are zero, so the bias is the value that is stored."""
    D = 8
    padded = np.resize(values, (len(values) + D - 1) // D * D)
    G = len(padded) // D
    zero = backend.matrix(np.zeros((G * D, 1), np.float32), "F32")
    table, index = np.ones((1, D // 2), np.float32), np.zeros(1, np.int32)
    q, k, v = np.empty((1, G, D), np.float32), *(np.empty((G, 1, D), np.float16) for _ in range(2))
    one = np.ones((1, 1), np.float32)
    backend.qkv(one, one[0], 1e-5, zero, zero, zero, None, None, padded, table, table, index, index, q, k, v)
    expected = np.clip(padded, -65504, 65504).astype(np.float16)
    assert np.array_equal(v.ravel(), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("T", [1, 3, 13, 50])
def test_threads_change_no_bit(isa, T):
    rng = np.random.default_rng(T)
    x, norm = rng.standard_normal((T, 100)).astype(np.float32), np.ones(100, np.float32)
    data = rng.standard_normal((9000, 100)).astype(np.float16)
    results = []
    for threads in (1, 2, 5, 3, 1):
        backend = CpuBackend(threads=threads, isa=isa)
        out = Guarded((T, 4500))
        gate, up = backend.matrix(data[:4500], "F16"), backend.matrix(data[4500:], "F16")
        for _ in range(5):
            backend.gate_up(x, norm, 1e-5, gate, up, None, None, out.array)
        out.check()
        results.append(out.array.tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(T=st.integers(2, CpuBackend.exact_batch), K=sizes, N=sizes, dtype=dtypes, bias=st.booleans(),
       seed=st.integers(0, 2**32 - 1))
def test_who_shares_a_batch_changes_no_bit(isa, T, K, N, dtype, bias, seed):
    """Every row of up to exact_batch gets what it gets alone, in every mode of the product, signs of zero included."""
    rng, backend = np.random.default_rng(seed), BACKENDS[isa]
    gate, up = (backend.matrix(unaligned(stored(rng, (N, K), dtype)[0]), dtype) for _ in range(2))
    x, norm, added = hostile(rng, (T, K)), rng.standard_normal(K).astype(np.float32), hostile(rng, (T, N))
    b = rng.standard_normal(N).astype(np.float32) if bias else None

    def run(rows):
        outs = [Guarded((len(x[rows]), N), fill=added[rows]), *(Guarded((len(x[rows]), N)) for _ in range(2))]
        backend.linear_add(x[rows], gate, b, outs[0].array)
        backend.gate_up(x[rows], norm, 1e-5, gate, up, b, b, outs[1].array)
        backend.logits(x[rows], norm, 1e-5, up, outs[2].array)
        for out in outs:
            out.check()
        return [out.array for out in outs]

    together, alone = run(slice(0, T)), [run(slice(t, t + 1)) for t in range(T)]
    for mode, rows in enumerate(together):
        assert rows.tobytes() == b"".join(single[mode].tobytes() for single in alone)


def test_a_thread_that_ends_gives_its_scratch_back():
    backend, K, T = BACKENDS[ISAS[-1]], 512, 1024
    weight = backend.matrix(np.ones((8, K), np.float16), "F16")
    h, x = np.ones((T, K), np.float32), np.zeros((T, 8), np.float32)  # 2 MiB of panels

    def run(threads):
        for _ in range(threads):
            thread = Thread(target=backend.linear_add, args=(h, weight, None, x.copy()))
            thread.start()
            thread.join()
        return psutil.Process().memory_info().rss

    before = run(3)
    assert run(40) - before < 20 * 2**20


@pytest.mark.parametrize("isa", ISAS)
def test_deep_products_accumulate_across_blocks(isa):
    """More inputs than one block of packed weights holds (BLOCK_DEPTH), in every mode."""
    rng, backend, K, N, T = np.random.default_rng(0), BACKENDS[isa], 2500, 70, 20
    data, w = stored(rng, (2 * N, K), "BF16")
    h, x = rng.standard_normal((T, K)).astype(np.float32), Guarded((T, N), fill=1)
    backend.linear_add(h, backend.matrix(data[:N], "BF16"), None, x.array)
    assert (np.abs(x.check() - 1 - h.astype(np.float64) @ w[:N].T) <= dot_bound(K, h.astype(np.float64), w[:N].T)).all()
    out, norm = Guarded((T, N)), np.full(K, 0.02, np.float32)
    gate, up = backend.matrix(data[:N], "BF16"), backend.matrix(data[N:], "BF16")
    backend.gate_up(h, norm, 1e-5, gate, up, None, None, out.array)
    n = norm64(h, norm, 1e-5)
    a, b = n @ w[:N].T, n @ w[N:].T
    np.testing.assert_allclose(out.check(), a / (1 + np.exp(-a)) * b, rtol=1e-4, atol=1e-5)


def test_mismatches_are_named():
    backend = CpuBackend(threads=1)
    x, out = backend.empty((2, 8), np.float32), backend.empty((2, 5), np.float32)
    weight = backend.matrix(np.zeros((5, 8), np.float16), "F16")
    with pytest.raises(KernelError, match=r"weight must be \(5, 7\), but is \(5, 8\)"):
        backend.linear_add(backend.empty((2, 7), np.float32), weight, None, out)
    with pytest.raises(KernelError, match=r"x must be float32 of shape \(2, 5\), but is float16"):
        backend.linear_add(x, weight, None, backend.empty((2, 5), np.float16))
    with pytest.raises(KernelError, match="C-contiguous"):
        backend.linear_add(backend.empty((8, 2), np.float32).T, weight, None, out)
    with pytest.raises(KernelError, match="F32, F16 or BF16, but is Q4_0"):
        backend.matrix(np.zeros((5, 8), np.float16), "Q4_0")
    ids = backend.upload(np.array([0, 5], np.int32))
    with pytest.raises(KernelError, match="embed: an id, position or slot lies outside its table"):
        backend.embed(ids, weight, x)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("COCKTAIL_ISA", "sse9")
    with pytest.raises(KernelError, match="'sse9' is not available here; choose one of scalar"):
        CpuBackend(threads=1)
    monkeypatch.setenv("COCKTAIL_ISA", "scalar")
    assert CpuBackend(threads=1).kernels()["qkv"] == "qkv_scalar"


def test_arena_is_aligned_and_refuses_more_than_the_machine_has():
    backend = CpuBackend(threads=1)
    assert backend.arena(1000).ctypes.data % 64 == 0
    with pytest.raises(MemoryError, match=r"needs 1,125,899,906,842,624 bytes, but [\d,]+ are free"):
        backend.arena(2**50)
