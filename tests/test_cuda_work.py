"""Decode attention's division of work, which needs no GPU: each chunk and tail slot of a layer once, at its address."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from kernels_cu.layout import chunk_bytes
from kernels_cu.work import POINTERS, TAIL, divide, join
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


def chains(work):
    """Of each block its segments in order."""
    assert work.large <= work.blocks <= len(work.segments)
    found = []
    for block in range(work.blocks):
        chain, at = [], block
        while at >= 0:
            chain.append(work.segments[at])
            at = int(work.segments[at]["next"])
        found.append(chain)
    assert sum(map(len, found)) == len(work.segments)
    return found


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 300), min_size=4, max_size=4), min_size=1, max_size=5),
    G=st.integers(1, 3),
    blocks=st.sampled_from([1, 7, 132]),
)
def test_a_batch_is_its_sequences_blocks(counts, G, blocks):
    """join keeps each sequence's blocks and results as they are: only their places and the sequence's number change."""
    works = []
    for b, each in enumerate(counts):
        shape = DocumentShape(n_layers=1, n_kv_heads=G, head_dim=64, chunk=32, n_chunks=sum(each), prefix=3,
                              remainder=2, suffix=5, max_new=9, window=None)
        sizes = ArenaLayout(shape.layout(TIERS, each))
        works.append(divide(b << 32, [span for span in sizes.spans(0) if span.n], sizes.tail(0), G, 64, 32, blocks))
    joined = join(works)
    expected, results = set(), set()
    for b, work in enumerate(works):
        for chain in chains(work):
            expected.add(tuple((b, *(segment[name].item() for name in (*POINTERS, "format", "n", "part", "parts")),
                                int(segment["head"]), int(segment["result"])) for segment in chain))
        for head, (first, rotated, n) in enumerate(work.results.tolist()):
            results |= {(b, head, i, i < rotated, first + i) for i in range(n)}
        assert len(results) == sum(one.n_results for one in works[: b + 1])
    starts = [sum(work.n_results for work in works[:b]) for b in range(len(works))]
    found = {tuple((int(segment["sequence"]),
                    *(segment[name].item() for name in (*POINTERS, "format", "n", "part", "parts")),
                    int(segment["head"]) - G * int(segment["sequence"]),
                    max(-1, int(segment["result"]) - starts[int(segment["sequence"])])) for segment in chain)
             for chain in chains(joined)}  # fmt: skip
    assert found == expected
    assert {(row // G, row % G, i, i < rotated, first + i - starts[row // G])
            for row, (first, rotated, n) in enumerate(joined.results.tolist()) for i in range(n)} == results
    assert joined.large == sum(work.large for work in works)
