"""What is compiled before a cache's layers are bound; needs no GPU."""

from types import SimpleNamespace

import pytest

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from kernels_cu import cache_ops
from kernels_cu.errors import KernelError

SIZES = 4, 2, 64, 32, None  # heads, KV heads, head_dim, chunk, window


def spans(*widths, n=3, formats="rotated"):
    return [SimpleNamespace(n=n, k_bits=k_bits, v_bits=v_bits, formats=formats) for k_bits, v_bits in widths]


@pytest.fixture
def compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(cache_ops, "compile_all", lambda specs: calls.append(set(specs)))
    return calls


def spec_of(*widths, flush=False):
    return cache_ops.attention_spec(64, 2, 32, frozenset(widths), False, flush=flush)[0]


def test_every_layers_kernel_at_once_and_only_once(compiled):
    ops = cache_ops.CacheOps()
    layers = [spans((3, 2), (4, 4)), spans((4, 4), (3, 2)), spans((2, 2)), []]
    ops.prepare(layers, *SIZES, False)
    ops.prepare([*layers, spans((8, 8))], *SIZES, False)
    ops.prepare([spans((2, 2))], *SIZES, True)
    assert compiled == [{spec_of((3, 2), (4, 4)), spec_of((2, 2)), spec_of()}, {spec_of((8, 8))},
                        {spec_of((2, 2), flush=True)}]  # fmt: skip


def test_spans_without_chunks_do_not_count(compiled):
    cache_ops.CacheOps().prepare([spans((2, 2)) + spans((8, 8), n=0)], *SIZES, False)
    assert compiled == [{spec_of((2, 2))}]


@pytest.mark.parametrize(("layer", "heads", "reason"), [
    (spans((5, 2)), 4, "K5V2"),
    (spans((2, 2)), 5, "5 over 2"),
    (spans((2, 2)) + spans((2, 2), formats="kivi"), 4, "one family"),
])  # fmt: skip
def test_what_bind_refuses_is_refused_before_anything_is_compiled(compiled, layer, heads, reason):
    with pytest.raises(KernelError, match=reason):
        cache_ops.CacheOps().prepare([spans((2, 2)), layer], heads, *SIZES[1:], False)
    assert not compiled
