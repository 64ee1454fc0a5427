"""Attention mass on every instruction set, against a plain float64 softmax."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mass_ref import mass_arrays, mass_cases, mass_reference

from kernels_c import CpuBackend, KernelError, available_isas

EPS = 2.0**-24
ISAS = available_isas()
BACKENDS = {isa: CpuBackend(threads=1, isa=isa) for isa in ISAS}


def masses(backend, case):
    """The kernel's output, after checking that it wrote all of it."""
    q, k, shape = mass_arrays(**case)
    out = np.full(shape, np.nan, np.float32)
    backend.attention_mass(q, k, case["before"], case["window"], case["first"], case["chunk"], out)
    assert np.isfinite(out).all()
    return out


def score_error(q, k):
    return 4 * (np.sqrt(q.shape[1]) + 4) * EPS * (np.abs(q) @ np.abs(k).T) + 8 * EPS


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(case=mass_cases(st.sampled_from([8, 24, 64, 80, 96, 128, 256])))
def test_equals_reference(isa, case):
    q, k, shape = mass_arrays(**case)
    expected, bound = mass_reference(q, k, case["before"], case["window"], case["first"], case["chunk"], shape,
                                     score_error)
    # Sums of a few hundred positive terms, of 128 keys each and of chunks.
    error = np.abs(masses(BACKENDS[isa], case) - expected)
    assert (error <= bound + (len(k[0]) / 128 + 400) * EPS * expected + 1e-30).all()


CASE = {"T": 50, "before": 300, "G": 2, "group": 9, "D": 64, "spare": 40, "window": None, "first": 5, "chunk": 32,
        "N": 10, "scale": 1.0, "seed": 1}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_masses_of_all_keys_count_the_rows(isa):
    out = masses(BACKENDS[isa], CASE | {"first": 0, "chunk": 10, "N": 35})
    np.testing.assert_allclose(out.sum(axis=1), 50 * 9, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa):
    assert len({masses(CpuBackend(threads=n, isa=isa), CASE).tobytes() for n in (1, 2, 3, 1)}) == 1


def test_mismatches_are_named():
    backend = CpuBackend(threads=1)
    q, k, out = np.zeros((4, 6, 16), np.float32), np.zeros((2, 9, 16), np.float16), np.zeros((2, 1), np.float32)
    with pytest.raises(KernelError, match=r"attention_mass: 6 query heads over 2 KV heads, rows 6\.\.10 of 9"):
        backend.attention_mass(q, k, 6, None, 0, 8, out)
    with pytest.raises(KernelError, match="1 chunks of 8 from row 2 on do not lie in 9 rows"):
        backend.attention_mass(q, k, 0, None, 2, 8, out)
    with pytest.raises(KernelError, match=r"out must be .*\(2, 1\)"):
        backend.attention_mass(q, k, 0, None, 0, 8, np.zeros((1, 1), np.float32))
