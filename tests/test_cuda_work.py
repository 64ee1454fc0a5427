"""Decode attention's division of work, which needs no GPU: each chunk and tail slot of a layer once, at its address."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from kernels_cu.layout import chunk_bytes
from kernels_cu.work import TAIL, divide
from runtime.arena import ArenaLayout
from runtime.plan import FP16, DocumentShape, Tier

TIERS = (Tier(3, 2), Tier(4, 4), Tier(8, 2), FP16)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=4, max_size=4),
    G=st.integers(1, 4),
    D=st.sampled_from([64, 128]),
    chunk=st.sampled_from([8, 32]),
    max_new=st.integers(1, 300),
    base=st.integers(1, 2**40).map(lambda units: 64 * units),
    blocks=st.sampled_from([1, 7, 528]),
)
def test_each_chunk_once_at_its_address(counts, G, D, chunk, max_new, base, blocks):
    """In every layer alike: what is worked out once is moved to where the layer lies."""
    shape = DocumentShape(n_layers=3, n_kv_heads=G, head_dim=D, chunk=chunk, n_chunks=sum(counts), prefix=3,
                          remainder=2, suffix=5, max_new=max_new, window=None)
    sizes = ArenaLayout(shape.layout(TIERS, counts))
    for layer in range(3):
        spans, tail = [span for span in sizes.spans(layer) if span.n], sizes.tail(layer)
        work = divide(base, spans, tail, G, D, chunk, blocks)
        expected = {(head, base + span.positions + 4 * c): tuple(
            base + start + head * stride + c * size
            for start, stride, size in zip(
                (span.k_codes, span.k_meta, span.v_codes, span.v_meta),
                (span.k_codes_stride, span.k_meta_stride, span.v_codes_stride, span.v_meta_stride),
                (*chunk_bytes(True, span.k_bits, chunk, D), *chunk_bytes(False, span.v_bits, chunk, D)), strict=True))
            for head in range(G) for span in spans for c in range(span.n)}  # fmt: skip
        sizes_of = {100 * span.k_bits + span.v_bits: (*chunk_bytes(True, span.k_bits, chunk, D),
                                                      *chunk_bytes(False, span.v_bits, chunk, D)) for span in spans}
        found, parts = {}, [[] for _ in range(G)]
        for segment in work.segments:
            head = int(segment["head"])
            if segment["format"] == TAIL:
                row = 2 * D * tail.capacity
                assert (segment["k_codes"], segment["v_codes"], segment["positions"], segment["n"]) == (
                    base + tail.k + head * row, base + tail.v + head * row, base + tail.positions, tail.capacity)
                parts[head].append((int(segment["part"]), int(segment["parts"])))
                continue
            for c in range(segment["n"]):
                at = head, int(segment["positions"]) + 4 * c
                assert at not in found
                found[at] = tuple(int(segment[name]) + c * size for name, size in zip(
                    ("k_codes", "k_meta", "v_codes", "v_meta"), sizes_of[int(segment["format"])], strict=True))
        assert found == expected
        assert all(sorted(mine) == [(i, len(mine)) for i in range(len(mine))] and mine for mine in parts)
