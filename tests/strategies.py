"""What hypothesis draws for the cache operations: shapes, widths, layouts and hostile values.

COCKTAIL_EXAMPLES (default 120) is the number of examples per property and instruction set. Values come from a drawn
seed and a drawn kind, so that an example is small and its arrays are not. What the properties tried is counted here and
printed at the end of a run (conftest.py).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from runtime import formats
from runtime.backend import FormatData
from runtime.plan import FP16, HIDDEN, Layout, Tier, hidden_chunks

EXAMPLES = int(os.environ.get("COCKTAIL_EXAMPLES", "120"))
LONG = 8192  # tokens; at least one case in twenty is longer
WIDTHS = (2, 3, 4, 8, 16)
KINDS = ("normal", "constant", "outliers", "denormals", "zeros", "largest", "one token", "steps")

SHARDS = 32  # tests that a property is spread over, so that several processes can share its examples

#: (property, "examples"), (property, "long") and (property, "cell", value of each of its axes) -> examples.
TRIED: Counter[tuple[Any, ...]] = Counter()
NOTES: dict[str, str] = {}  # title -> text, printed after the tests

several = settings(max_examples=EXAMPLES, deadline=None,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def spread(*drawn: st.SearchStrategy[Any], examples: int,
           **named: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """hypothesis.given as up to SHARDS tests that draw different examples, `examples` in all, the same in every run."""
    shards = max(1, min(SHARDS, examples // 8))  # the first example that hypothesis draws is always the smallest

    def decorate(check: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("shard", range(shards))
        def test(shard: int) -> None:
            share = settings(several, max_examples=-(-(examples - shard) // shards), database=None)
            seed(shard)(share(given(*drawn, **named)(check)))()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def count(name: str, cells: Iterable[tuple[Any, ...]], tokens: int) -> None:
    """Enter one example of a property: what it covered (a value per axis, see conftest.py) and its length."""
    TRIED[name, "examples"] += 1
    TRIED[name, "long"] += tokens > LONG
    for cell in cells:
        TRIED[name, "cell", *cell] += 1

def tiers_of(family: str) -> st.SearchStrategy[Tier]:
    """Any widths of K and V that the family of formats has, 16 among them."""
    widths = st.sampled_from((*formats.WIDTHS[family], 16))
    return st.builds(Tier, widths, widths)


tiers = tiers_of("rotated")
real_head_dims = st.sampled_from((64, 80, 96, 128, 256))
head_dims = st.one_of(real_head_dims, st.integers(1, 9).map(lambda i: 8 * i))
chunk_sizes = st.one_of(st.sampled_from((8, 16, 32, 64)), st.integers(1, 32).map(lambda i: 8 * i))
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)


def values(kind: str, seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """Finite float16 of shape (..., tokens, channels)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "constant":  # every channel the same over all tokens, far from zero
        x = np.broadcast_to(100 * x[..., :1, :], shape).copy()
    elif kind == "outliers":
        x[..., rng.integers(shape[-1])] += 1e4
        x[rng.random(shape) < 0.01] = -1e4
    elif kind == "denormals":
        x *= 2.0**-22
    elif kind == "zeros":
        x *= rng.random(shape) < 0.1
    elif kind == "largest":
        x = 65504.0 * rng.choice((-1, 0, 1), shape)
    elif kind == "one token":  # of all, one differs from zero
        x *= np.arange(shape[-2])[:, None] == rng.integers(shape[-2])
    elif kind == "steps":  # few distinct values: ties in every rounding
        x = np.rint(2 * x) / 2
    return np.clip(x, -65504, 65504).astype(np.float16)


def format_data(seed: int, tokens: int, heads: int, head_dim: int) -> FormatData:
    """Tables of every family as host arrays: any angles, levels and ranges, a few of the latter zero."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 6.3, (tokens, head_dim // 2))
    levels = [np.sort(rng.uniform(-1, 1, (2, 2**bits)), axis=1) for bits in (2, 3, 4)]
    k, v = np.concatenate(levels, axis=1).astype(np.float32)
    half = rng.uniform(0.5, 2.5, (heads, head_dim)) * (rng.random((heads, head_dim)) > 0.05)
    return FormatData(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), k, v,
                      rng.standard_normal((heads, head_dim)).astype(np.float32), half.astype(np.float32))


@dataclass(frozen=True)
class Case:
    """One sequence in one layer, and the token that attends to it."""

    layout: Layout
    order: tuple[int, ...]  # the chunks, in the order in which regions hold them
    assignment: tuple[int, ...]  # chunk -> tier
    group: int
    new: int  # tokens decoded before this one; its slot is the next
    k_kind: str
    v_kind: str
    q_scale: float
    seed: int

    @property
    def heads(self) -> int:
        return self.group * self.layout.n_kv_heads

    @property
    def tokens(self) -> int:
        """Tokens up to and including the one that attends."""
        return self.layout.prompt_tokens + self.new + 1

    @property
    def flushed(self) -> int:
        """Chunks of the tail that are packed when this token is decoded."""
        return self.layout.flushed(self.new)

    def data(self) -> FormatData | None:
        """Host tables of the layout's formats."""
        layout = self.layout
        if layout.formats not in formats.PRE_ROPE:
            return None
        return format_data(self.seed, self.tokens, layout.n_kv_heads, layout.head_dim)

    def chunks(self, tier: int) -> list[int]:
        return [chunk for chunk in self.order if self.assignment[chunk] == tier]

    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """q (H, D), k and v (G, tokens, D); scores stay within a few thousand so that the bound means something."""
        layout = self.layout
        shape = layout.n_kv_heads, self.tokens, layout.head_dim
        k, v = values(self.k_kind, self.seed, shape), values(self.v_kind, self.seed + 1, shape)
        q = np.random.default_rng(self.seed + 2).standard_normal((self.heads, layout.head_dim))
        return (self.q_scale * q / max(1.0, float(np.abs(k).max()) / 8)).astype(np.float32), k, v


@st.composite
def cases(draw: st.DrawFn, only: Tier | None = None, families: tuple[str, ...] = ("rotated",),
          flush: bool = False) -> Case:
    """Any mix of tiers, or `only` one tier in document order. About one in eight is longer than LONG tokens.

    flush: the tail may hold some chunks, and gives them up (Layout.flush) except in one case of four.
    """
    long = draw(st.integers(0, 7)) == 5  # LONG tokens more; hypothesis draws the ends of a range too often
    head_dim = draw(st.sampled_from((8, 64, 80))) if long else draw(head_dims)
    chunk = draw(st.sampled_from((32, 64, 256))) if long else draw(chunk_sizes)
    kv_heads = 1 if long else draw(st.integers(1, 3))
    group = draw(st.integers(1, 3)) if long else draw(st.one_of(st.sampled_from((1, 3, 4, 8)), st.integers(1, 17)))
    n_chunks = draw(st.one_of(st.integers(1, 6), st.integers(0, 6))) + long * LONG // chunk
    family, kept = draw(st.sampled_from(families)), None
    if flush:
        kept = draw(st.sampled_from((None, 0, 24, 128)))
    flushes = kept is not None
    prefix, remainder = draw(st.integers(0, 40)), draw(st.integers(0, (4 if flushes else 1) * chunk - 1))
    suffix, max_new = draw(st.integers(0, 40)), draw(st.integers(1, 2 * chunk if flushes else 5))
    tokens = prefix + n_chunks * chunk + remainder + suffix
    window = draw(st.one_of(st.none(), st.integers(1, tokens + 8)))
    hidden = hidden_chunks(prefix, chunk, n_chunks, tokens, window) if draw(st.booleans()) else range(0)
    chosen = [only] if only else draw(st.lists(tiers_of(family), min_size=1, max_size=4, unique=True))
    if flushes and set(chosen) == {FP16}:
        chosen.append(Tier(4, 4))  # of no chunk, perhaps: what the tail is packed at
    rng = np.random.default_rng(draw(seeds))
    assignment = [int(i) for i in rng.integers(len(chosen), size=n_chunks)]
    for i in hidden:
        assignment[i] = len(chosen)
    order = list(range(n_chunks))
    if not only and draw(st.booleans()):
        rng.shuffle(order)
    stored = [*chosen, HIDDEN]  # a tier without a chunk gives an empty span
    layout = Layout(
        n_layers=1, n_kv_heads=kv_heads, head_dim=head_dim, chunk=chunk, n_chunks=n_chunks, prefix=prefix,
        remainder=remainder, suffix=suffix, max_new=max_new, window=window, tiers=tuple(stored),
        counts=(tuple(assignment.count(tier) for tier in range(len(stored))),), formats=family, flush=kept)
    return Case(layout, tuple(order), tuple(assignment), group, draw(st.integers(0, max_new - 1)), draw(kinds),
                draw(kinds), draw(st.sampled_from((0.0, 0.3, 1.0, 4.0))), draw(seeds))


dense_cases = cases(only=FP16)



def cells(case: Case) -> list[tuple[int, int, int, int]]:
    """(K bits, V bits, head_dim, group) of every kind of chunk that the case reads."""
    layout = case.layout
    return [(tier.k_bits, tier.v_bits, layout.head_dim, case.group)
            for tier, n in zip(layout.tiers, layout.counts[0], strict=True) if n and tier != HIDDEN]
