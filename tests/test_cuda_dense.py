"""The dense CUDA operations against plain float64 NumPy; skipped where no GPU is present.

One row is computed with float32 activations. More rows go through tensor cores with the activations rounded to the
weights' type, as in any half-precision runtime, and the bounds say so.
"""

import numpy as np
import pytest
from cuda_backend import BACKEND, EXAMPLES, LARGE, OTHERS, cupy, up
from dense_ref import EPS, Qkv, hostile, norm64, stored
from hypothesis import strategies as st
from mass_ref import mass_arrays, mass_cases, mass_reference
from strategies import count, seeds, spread

from kernels_cu import product
from kernels_cu.build import in_order
from kernels_cu.errors import DeviceMemoryError, KernelError

pytestmark = pytest.mark.usefixtures("compiled")
ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}  # of one activation on its way to the tensor cores
GUARD = 64

dtypes = st.sampled_from(["F32", "F16", "BF16"])
rows = st.one_of(st.integers(1, 20), st.sampled_from([1, 1, 24, 37, 130]))
depths = st.one_of(st.integers(1, 40).map(lambda n: 8 * n), st.sampled_from([576, 1536, *[4096, 11008] * LARGE]))
sizes = st.one_of(st.integers(1, 70), st.sampled_from([576, 2200] if LARGE else [130]))


class Guarded:
    """An output on the GPU filled with NaN between two guard bands, which check() proves untouched."""

    def __init__(self, shape, dtype=np.float32, fill=None):
        n = int(np.prod(shape))
        self.whole = cupy.full(n + 2 * GUARD, np.nan, dtype)
        self.array = self.whole[GUARD : GUARD + n].reshape(shape)
        if fill is not None:
            self.array.set(fill)

    def check(self):
        whole = BACKEND.download(self.whole)
        assert np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all(), "wrote outside the output"
        return whole[GUARD:-GUARD].reshape(self.array.shape).astype(np.float64)


def weights(rng, shape, dtype, scale=1.0):
    """(matrix on the GPU, its exact float64 values)."""
    data, values = stored(rng, shape, dtype, scale)
    return BACKEND.matrix(data, dtype), values


def dot_bound(a, b, dtype):
    """|error| of the product a (T, K) @ b (K, N): float32 roundings walk at random; from two rows on, tensor cores add
    with truncation and see rounded activations (in FP16 with an absolute step of 2^-24 below the normal range)."""
    T, K = a.shape
    products = np.abs(a) @ np.abs(b)
    if T == 1 or dtype == "F32":
        return 4 * (np.sqrt(K) + 4) * EPS * products + 1e-37
    subnormal = 2.0**-25 * np.abs(b).sum(0) if dtype == "F16" else 0
    return (ROUNDING[dtype] + 8 * (np.sqrt(K) + 4) * EPS) * products + subnormal + 1e-37


@spread(T=rows, K=depths, N=sizes, dtype=dtypes, bias=st.booleans(), seed=seeds, examples=OTHERS)
def test_linear_add(T, K, N, dtype, bias, seed):
    rng = np.random.default_rng(seed)
    matrix, w = weights(rng, (N, K), dtype)
    h, x0, b = hostile(rng, (T, K)), hostile(rng, (T, N)), rng.standard_normal(N).astype(np.float32)
    x = Guarded((T, N), fill=x0)
    BACKEND.linear_add(up(h), matrix, up(b) if bias else None, x.array)
    expected = h.astype(np.float64) @ w.T + x0 + (b if bias else 0)
    bound = dot_bound(h.astype(np.float64), w.T, dtype) + 4 * EPS * (np.abs(expected) + np.abs(x0) + np.abs(b))
    assert (np.abs(x.check() - expected) <= bound).all()


@spread(T=rows, E=depths, V=sizes, dtype=dtypes, seed=seeds, examples=OTHERS)
def test_logits(T, E, V, dtype, seed):
    rng = np.random.default_rng(seed)
    head, w = weights(rng, (V, E), dtype)
    x, norm = hostile(rng, (T, E)), rng.standard_normal(E).astype(np.float32)
    out = Guarded((T, V))
    BACKEND.logits(up(x), up(norm), 1e-5, head, out.array)
    normed = norm64(x, norm, 1e-5)
    assert (np.abs(out.check() - normed @ w.T) <= 2 * dot_bound(normed, w.T, dtype)).all()


@spread(T=rows, E=depths, I=sizes, dtype=dtypes, bias=st.booleans(), seed=seeds, examples=OTHERS)
def test_gate_up(T, E, I, dtype, bias, seed):  # noqa: E741
    rng = np.random.default_rng(seed)
    (gate, g), (up_matrix, u) = weights(rng, (I, E), dtype), weights(rng, (I, E), dtype)
    x, norm = hostile(rng, (T, E)), rng.standard_normal(E).astype(np.float32)
    gb, ub = (rng.standard_normal(I).astype(np.float32) if bias else None for _ in range(2))
    out = Guarded((T, I))
    BACKEND.gate_up(up(x), up(norm), 1e-5, gate, up_matrix, up(gb), up(ub), out.array)
    n = norm64(x, norm, 1e-5)
    a, b = n @ g.T + (0 if gb is None else gb), n @ u.T + (0 if ub is None else ub)
    sigmoid = 0.5 * (1 + np.tanh(a / 2))
    # silu is 1.1-Lipschitz; exp adds a few units to the quotient; each factor carries its dot product's error.
    da, db = (2 * dot_bound(n, w.T, dtype) + 4 * EPS * np.abs(y) + 4 * EPS for w, y in ((g, a), (u, b)))
    bound = 1.1 * da * (np.abs(b) + db) + np.abs(a * sigmoid) * db + 16 * EPS * np.abs(a * b) + 1e-30
    assert (np.abs(out.check() - a * sigmoid * b) <= bound).all()


@spread(
    T=rows,
    E=depths,
    G=st.integers(1, 3),
    group=st.integers(1, 4),
    D=st.sampled_from([64, 80, 96, 128, 256]),
    dtype=dtypes,
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 1e-6, 3e5]),  # K and V among FP16's subnormals, and beyond its range
    seed=seeds,
    examples=OTHERS,
)
def test_qkv(T, E, G, group, D, dtype, bias, scale, seed):
    if T > 1 and scale > 1:
        scale = 1.0  # the normed activations themselves would leave FP16
    case = Qkv(np.random.default_rng(seed), T, E, G, group, D, dtype, bias, scale)
    q, k, v = case.outputs(Guarded)
    BACKEND.qkv(up(case.x), up(case.norm), 1e-5, *(BACKEND.matrix(data, dtype) for data, _ in case.parts),
                *map(up, (*case.biases, case.cos, case.sin, case.positions, case.slots)), q.array, k.array, v.array)
    case.check(q.check(), k.check(), v.check(), lambda a, b: dot_bound(a, b, dtype))


@st.composite
def prompts(draw):
    """The sizes of one call of prefill attention; one in eight is long, with fewer heads."""
    long = LARGE and draw(st.integers(0, 7)) == 5
    T, before = draw(st.one_of(
        st.tuples(st.integers(1, 40), st.integers(0, 700)),  # a small tile behind a prompt
        st.tuples(st.integers(1, 400), st.sampled_from((0, 1, 63, 64, 300)))))
    group = draw(st.integers(1, 16))
    if not LARGE:
        T, before, group = T % 150 + 1, before % 100, group % 4 + 1
    if long:
        T, before, group = T + draw(st.sampled_from((900, 1500))), before + draw(st.integers(0, 2000)), group % 4 + 1
    return {"T": T, "before": before, "G": 1 if long or group > 8 else draw(st.integers(1, 3)), "group": group,
            "D": draw(st.sampled_from([64, 80, 96, 128, 256])), "spare": draw(st.integers(0, 40)),
            "window": draw(st.one_of(st.none(), st.integers(1, 900), st.integers(1, before + T + 9)))}


@spread(prompt=prompts(), scale=st.sampled_from([1.0, 4.0, 0.01]), seed=seeds, examples=EXAMPLES,
        processors=st.sampled_from([1, 10**6]))  # large tiles, small tiles
def test_prefill_attention(prompt, scale, processors, seed):
    """Scores carry the rounding of q to FP16; probabilities are FP16. Rows beyond the last key are NaN and not read."""
    T, before, G, group, D, spare, window = prompt.values()
    count("prefill attention", [(D, span(T), "none" if window is None else span(window), group)], before + T)
    rng, H, keys = np.random.default_rng(seed), G * group, before + T
    q = (rng.standard_normal((T, H, D)) * scale).astype(np.float32)
    k, v = (rng.standard_normal((G, keys + spare, D)).astype(np.float16) for _ in range(2))
    k[:, keys:], v[:, keys:] = np.nan, np.nan
    out = Guarded((T, H * D))
    BACKEND._processors = processors
    BACKEND.prefill_attention(up(q), up(k), up(v), before, window, out.array)
    got = out.check().reshape(T, H, D)
    age = np.arange(before, keys)[:, None] - np.arange(keys)[None]
    visible = (age >= 0) & (age < (window or keys + 1))
    for head in range(H):
        kk, vv = (x[head // group, :keys].astype(np.float64) for x in (k, v))
        qq = q[:, head].astype(np.float64) * D**-0.5
        scores = np.where(visible, qq @ kk.T, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        expected = p @ vv
        off = (1.5 * ROUNDING["F16"] * (np.abs(qq) @ np.abs(kk).T) * visible).max(-1, keepdims=True) + 2.0**-25 * D
        bound = np.expm1(2 * off) * (p @ np.abs(vv) + np.abs(expected)) + 2.0**-9 * (p @ np.abs(vv)) + 2.0**-24
        assert (np.abs(got[:, head] - expected) <= bound).all()


def rounded(x, dtype):
    """float32 to F16, beyond it +-65504, or BF16, as stored."""
    if dtype == "F16":
        return np.clip(x, -65504, 65504).astype(np.float16)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@spread(
    T=st.one_of(st.integers(17, 300 if LARGE else 60), st.just(1000 if LARGE else 40)),
    H=st.integers(1, 3),
    D=st.sampled_from([64, 80, 96, 128, 256]),
    I=st.integers(1, 90).map(lambda n: 8 * n),
    dtype=st.sampled_from(["F16", "BF16"]),
    sums=st.sampled_from([10**4, 10**9]),  # bytes: several parts, one part
    seed=seeds,
    examples=OTHERS,
)
def test_activations_of_many_rows_are_rounded_once(T, H, D, I, dtype, sums, seed):  # noqa: E741
    """In the weights' type operations write what rounding their float32 result gives, and read it as they would read
    that: bit for bit."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((T, H, D)).astype(np.float32), up(rng.standard_normal((1, T, D)).astype(np.float16))
    x, norm = rng.standard_normal((T, H * D)).astype(np.float32), up(np.ones(H * D, np.float32))
    gate, up_matrix, down = (weights(rng, shape, dtype)[0] for shape in ((I, H * D), (I, H * D), (H * D, I)))
    narrow = BACKEND.activation_type(T, [down, down])
    assert narrow == rounded(x, dtype).dtype

    def attend(out):
        BACKEND.prefill_attention(up(q), k, k, 0, None, out)

    def project(out):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(product, "_SUMS_BYTES", sums)
            BACKEND.gate_up(up(x), norm, 1e-5, gate, up_matrix, None, None, out)

    for operation, columns in ((attend, H * D), (project, I)):
        wide, out = Guarded((T, columns)), BACKEND.empty((T, columns), narrow)
        operation(wide.array)
        operation(out)
        expected = rounded(wide.check().astype(np.float32), dtype)
        assert np.array_equal(BACKEND.download(out), expected)
    hidden, wide_sum, narrow_sum = wide.array, up(x), up(x)
    BACKEND.linear_add(hidden, down, None, wide_sum)
    BACKEND.linear_add(up(expected), down, None, narrow_sum)
    assert np.array_equal(BACKEND.download(narrow_sum), BACKEND.download(wide_sum))


@spread(mass_cases(st.sampled_from([64, 80, 96, 128, 256]), LARGE), examples=OTHERS)
def test_attention_mass(case):
    """Scores carry the rounding of q to FP16: independent errors, of which the sum is allowed four deviations."""
    q, k, shape = mass_arrays(**case)
    T, before, window, first, chunk = (case[name] for name in ("T", "before", "window", "first", "chunk"))
    reach = "none" if window is None else span(window)
    count("attention mass", [(case["D"], span(T), reach, case["group"])], before + T)
    outs = [Guarded(shape) for _ in range(2)]
    for out in outs:
        BACKEND.attention_mass(up(q), up(k), before, window, first, chunk, out.array)
    got = outs[0].check()
    assert np.array_equal(got, outs[1].check()), "two runs differ"

    def score_error(q, k):
        return 4 * (2.0**-12 * np.sqrt(q**2 @ (k**2).T) + 2.0**-25 * np.sqrt((k**2).sum(1)))

    expected, bound = mass_reference(q, k, before, window, first, chunk, shape, score_error)
    assert (np.abs(got - expected) <= bound + 2.0**-18 * expected + 1e-30).all()


def span(n):
    """The range of a table's cell that n falls into."""
    return next(name for limit, name in ((1, "1"), (64, "2-64"), (1024, "65-1024"), (10**9, "more")) if n <= limit)


@spread(T=st.integers(1, 70), E=depths, V=st.integers(1, 300), dtype=dtypes, seed=seeds, examples=OTHERS)
def test_embed(T, E, V, dtype, seed):
    rng = np.random.default_rng(seed)
    table, w = weights(rng, (V, E), dtype)
    ids, out = rng.integers(0, V, T).astype(np.int32), Guarded((T, E))
    BACKEND.embed(up(ids), table, out.array)
    assert np.array_equal(out.check(), w[ids])


def test_every_half_survives_embedding():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    out = BACKEND.empty((256, 256), np.float32)
    BACKEND.embed(up(np.arange(256, dtype=np.int32)), BACKEND.matrix(halves, "F16"), out)
    got, wide = BACKEND.download(out), halves.astype(np.float32)
    assert np.array_equal(got, wide, equal_nan=True)
    assert np.array_equal(got.view(np.uint32)[~np.isnan(got)], wide.view(np.uint32)[~np.isnan(wide)]), "a sign of zero"


@pytest.mark.parametrize("T", [1, 5, 16, 40])
def test_two_runs_are_bitwise_equal(T):
    rng = np.random.default_rng(T)
    x, norm = up(rng.standard_normal((T, 1536)).astype(np.float32)), up(np.ones(1536, np.float32))
    gate, up_matrix = (weights(rng, (4500, 1536), "F16")[0] for _ in range(2))
    results = set()
    for _ in range(5):
        out = Guarded((T, 4500))
        BACKEND.gate_up(x, norm, 1e-5, gate, up_matrix, None, None, out.array)
        results.add(out.check().tobytes())
    assert len(results) == 1


def test_a_captured_step_follows_device_memory():
    """The second call captures, the third replays: all three must read the state of their moment."""
    rng = np.random.default_rng(1)
    table, w = weights(rng, (10, 64), "F16")
    matrix, m = weights(rng, (64, 64), "F16")
    state = up(np.array([0, 0, 3, 0], np.int32))
    x, h = BACKEND.empty((1, 64), np.float32), BACKEND.empty((1, 64), np.float32)

    def step():
        BACKEND.embed(state[2:3], table, x)
        BACKEND.embed(state[2:3], table, h)
        BACKEND.linear_add(h, matrix, None, x)

    captured = BACKEND.captured(step)
    for token in (3, 7, 1, 9):
        BACKEND.advance(state, token)
        captured()
        np.testing.assert_allclose(BACKEND.download(x)[0], w[token] + m @ w[token], rtol=1e-5, atol=1e-5)
    assert BACKEND.download(state).tolist() == [4, 4, 9, 0]


@pytest.mark.parametrize("T", [1, 9])
def test_starting_early_changes_nothing(T):
    """A chain of products that each need the one before, large enough that kernels do overlap."""
    rng, E, I = np.random.default_rng(T), 2048, 2816  # noqa: E741
    table, norm = weights(rng, (T, E), "F16")[0], up(np.ones(E, np.float32))
    layers = [[weights(rng, shape, "F16", E**-0.5)[0] for shape in ((I, E), (I, E), (E, I))] for _ in range(4)]
    head, ids = weights(rng, (E, E), "F16")[0], up(np.arange(T, dtype=np.int32))
    x, hidden, out = (BACKEND.empty((T, n), np.float32) for n in (E, I, E))

    def step():
        BACKEND.embed(ids, table, x)
        for gate, up_matrix, down in layers * 3:
            BACKEND.gate_up(x, norm, 1e-5, gate, up_matrix, None, None, hidden)
            BACKEND.linear_add(hidden, down, None, x)
        BACKEND.logits(x, norm, 1e-5, head, out)

    def run(captured):
        out[:] = np.nan
        captured()
        return BACKEND.download(out).tobytes()

    with in_order():
        expected = run(step)
    captured = BACKEND.captured(step)
    assert {run(captured) for _ in range(20)} == {expected}


def test_an_index_outside_its_table_is_reported():
    table, out = BACKEND.matrix(np.zeros((4, 8), np.float16), "F16"), BACKEND.empty((1, 8), np.float32)
    BACKEND.embed(up(np.array([4], np.int32)), table, out)
    with pytest.raises(KernelError, match="outside its table"):
        BACKEND.download(out)
    BACKEND.embed(up(np.array([3], np.int32)), table, out)
    assert not BACKEND.download(out).any()


def test_mismatches_are_named():
    x, out = BACKEND.empty((2, 8), np.float32), BACKEND.empty((2, 5), np.float32)
    weight = BACKEND.matrix(np.zeros((5, 8), np.float16), "F16")
    with pytest.raises(KernelError, match=r"weight must be \(5, 16\), but is \(5, 8\)"):
        BACKEND.linear_add(BACKEND.empty((2, 16), np.float32), weight, None, out)
    with pytest.raises(KernelError, match=r"x must be float32 of shape \(2, 5\), but is float16"):
        BACKEND.linear_add(x, weight, None, BACKEND.empty((2, 5), np.float16))
    with pytest.raises(KernelError, match="multiple of 8 inputs, but has 7"):
        BACKEND.matrix(np.zeros((5, 7), np.float16), "F16")
    with pytest.raises(KernelError, match="gate F16, up BF16"):
        other = BACKEND.matrix(np.zeros((5, 8), np.uint16), "BF16")
        BACKEND.gate_up(x, up(np.ones(8, np.float32)), 1e-5, weight, other, None, None, out)


def test_out_of_memory_says_what_was_needed_and_what_helps():
    with pytest.raises(DeviceMemoryError, match=r"the KV cache needs 9,536,743 MiB on the GPU, but .* free; lower"):
        BACKEND.arena(10**13)
