"""What the page shows, computed: chunks, heat, layers, bytes, times. Plain data; the template only places it."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from cocktail.mix import SCALE, Step, chunk_bits, layers_differ, legend, step, tier_bits, tier_name
from cocktail.report.sizes import Part, parts, total
from runtime.plan import Plan, Tier

if TYPE_CHECKING:
    from cocktail.answer import Answer, Stats

HEAT_CELLS = 512  # in a row of the heat map, at most: of longer documents neighbours share a cell
BEST = 8  # chunks that the table beside the heat map names per question
# Pages light and dark: (background, the share of a step's colour in the shade behind text, by the step's place).
PAGES = {"light": ("#ffffff", 0.10, 0.52), "dark": ("#14171c", 0.10, 0.50)}


@dataclass(frozen=True)
class Chunk:
    """One chunk of the document. level: index into SCALE; about: what hovering over it says."""

    number: int
    level: int
    text: str
    about: str
    bits: float
    score: float | None


@dataclass(frozen=True)
class Bar:
    """A named row of segments, each (label, class of its colour, bytes or seconds)."""

    name: str
    segments: tuple[tuple[str, str, float], ...]

    @property
    def sum(self) -> float:
        return sum(value for *_, value in self.segments)


@dataclass(frozen=True)
class Question:
    """One question's part of the page; answer and stats are None where only a plan is shown."""

    text: str
    plan: Plan
    answer: Answer | None
    chunks: tuple[Chunk, ...]
    rest: str  # the context behind its last chunk
    legend: list[tuple[Step, str, int]]
    layers: tuple[tuple[tuple[int, int], ...], ...]  # per layer, runs of (level, chunks); () where all are alike
    tiers: Bar  # one segment per tier, the tail, positions and padding: the whole arena
    regions: tuple[Bar, ...]
    per_layer: tuple[Bar, ...]
    times: Bar | None

    @property
    def stats(self) -> Stats | None:
        return None if self.answer is None else self.answer.stats

    @property
    def download(self) -> str:
        """The plan's JSON as a data URL."""
        return "data:application/json;base64," + base64.b64encode(self.plan.to_json().encode()).decode()


@dataclass(frozen=True)
class Heat:
    """One question's row. cells: per cell (from 0, the row's lowest score, to 1; what hovering says); none where no
    chunk was scored. best: (chunk, score), highest first."""

    text: str
    cells: tuple[tuple[float, str], ...]
    best: tuple[tuple[int, float], ...]


def question(text: str, plan: Plan, answer: Answer | None, passages: Sequence[str]) -> Question:
    """passages: the text of every chunk of the document, and of what is left over.

    A layout may have fewer chunks than the document, where a policy keeps the last ones in the tail.
    """
    bits, found = chunk_bits(plan), parts(plan)
    return Question(
        text=text, plan=plan, answer=answer,
        chunks=tuple(Chunk(i, SCALE.index(step(value)), passages[i], _about(plan, i), value,
                           None if plan.scores is None else plan.scores[i]) for i, value in enumerate(bits)),
        rest="".join(passages[plan.layout.n_chunks :]), legend=legend(plan, bits),
        layers=tuple(_runs(plan)) if layers_differ(plan) else (),
        tiers=_tiers(found), regions=tuple(_regions(found)), per_layer=tuple(_per_layer(found)),
        times=None if answer is None else _times(answer.stats))


def heat(text: str, plan: Plan) -> Heat:
    """The row is scaled by itself: what one scorer gives different questions, or two scorers, compares only in shape.

    A cell of several chunks shows the highest of their scores.
    """
    scores = plan.scores
    if not scores:
        return Heat(text, (), ())
    low, high = min(scores), max(scores)
    width = -(-len(scores) // HEAT_CELLS)
    cells = []
    for first in range(0, len(scores), width):
        some = scores[first : first + width]
        last = first + len(some) - 1
        name = f"chunk {first}" if first == last else f"chunks {first} to {last}"
        cells.append(((max(some) - low) / (high - low or 1), f"{name}: {max(some):.3g}"))
    best = sorted(enumerate(scores), key=lambda scored: -scored[1])[:BEST]
    return Heat(text, tuple(cells), tuple(best))


def shades(page: str) -> list[str]:
    """The background behind a chunk's text, per step of SCALE, as "#rrggbb": more colour the more bits."""
    background, least, most = PAGES[page]
    shares = [least + (most - least) * i / (len(SCALE) - 1) for i in range(len(SCALE))]
    return [_mixed(one.colour, share, background) for one, share in zip(SCALE, shares, strict=True)]


def size(nbytes: float) -> str:
    """With a unit, and three digits that count."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}" if nbytes < 1000 * factor else f"{nbytes / factor:,.0f} {unit}"
    return f"{nbytes:.0f} bytes"


def _about(plan: Plan, chunk: int) -> str:
    layout = plan.layout
    start = layout.start(chunk)
    tiers = Counter(layout.tiers[layer[chunk]] for layer in plan.assignment)
    kept = ", ".join(f"{tier_name(tier)} in {count} layers" for tier, count in tiers.most_common())
    mean = sum(tier_bits(tier) * count for tier, count in tiers.items()) / layout.n_layers
    what = tier_name(next(iter(tiers))) if len(tiers) == 1 else f"{mean:.2f} bits on average: {kept}"
    score = "" if plan.scores is None else f"; score {plan.scores[chunk]:.4g}"
    return f"chunk {chunk}, tokens {start} to {start + layout.chunk - 1}: {what}{score}"


def _runs(plan: Plan) -> Iterator[tuple[tuple[int, int], ...]]:
    levels = [SCALE.index(step(tier_bits(tier))) for tier in plan.layout.tiers]
    for layer in plan.assignment:
        yield tuple((level, len(list(same))) for level, same in groupby(levels[tier] for tier in layer))


def _tiers(found: Sequence[Part]) -> Bar:
    """What each tier's chunks take, metadata and positions included; then what no tier has."""
    by_tier: dict[Tier, int] = {}
    for part in found:
        if part.tier is not None:
            by_tier[part.tier] = by_tier.get(part.tier, 0) + part.nbytes
    ranked = sorted(by_tier, key=lambda tier: (tier.k_bits + tier.v_bits, tier.k_bits), reverse=True)
    others = [part for part in found if part.tier is None]
    tail = total(part for part in others if part.kind)
    return Bar("tiers", (
        *((str(tier), f"s{SCALE.index(step(tier_bits(tier)))}", by_tier[tier]) for tier in ranked),
        ("tail", "tail", tail), ("positions, padding", "rest", total(others) - tail)))


def _regions(found: Sequence[Part]) -> Iterator[Bar]:
    """Codes and metadata of each region, the layers' regions of one kind and width taken together."""
    def bar(name: str, some: Sequence[Part], colour: str) -> Bar:
        sums = {what: total(part for part in some if part.what == what) for what in dict.fromkeys(p.what for p in some)}
        return Bar(name, tuple((what, "meta" if what == "metadata" else colour, nbytes)
                               for what, nbytes in sums.items()))

    stored = [part for part in found if part.tier is not None and part.kind]
    for kind, bits in sorted({(part.kind, part.bits) for part in stored}):
        yield bar(f"{kind}, {bits} bits", [part for part in stored if (part.kind, part.bits) == (kind, bits)],
                  f"s{SCALE.index(step(bits))}")
    for kind in ("K", "V"):
        yield bar(f"{kind}, tail", [part for part in found if part.tier is None and part.kind == kind], "tail")
    yield bar("positions, padding", [part for part in found if not part.kind], "rest")


def _per_layer(found: Sequence[Part]) -> Iterator[Bar]:
    layers: dict[int | None, list[Part]] = {}
    for part in found:
        layers.setdefault(part.layer, []).append(part)
    names: Mapping[str, str] = {"K codes": "k", "K metadata": "kmeta", "V codes": "v", "V metadata": "vmeta",
                                "tail": "tail", "rest": "rest"}
    for layer, some in layers.items():
        sums = dict.fromkeys(names, 0)
        for part in some:
            sums[_name(part)] += part.nbytes
        yield Bar("all layers" if layer is None else f"layer {layer}",
                  tuple((name, names[name], nbytes) for name, nbytes in sums.items() if nbytes))


def _name(part: Part) -> str:
    if part.kind and part.tier is not None:
        return f"{part.kind} {part.what}"
    return "tail" if part.kind else "rest"


def _times(stats: Stats) -> Bar:
    """TTFT in its parts, then decoding."""
    first = stats.ttft_s - stats.score_wait_s - stats.prefill_s
    decode = stats.tpot_s * max(stats.generated_tokens - 1, 0)
    return Bar("time", tuple((name, colour, max(value, 0.0)) for name, colour, value in (
        ("score", "t0", stats.score_wait_s), ("prefill", "t1", stats.prefill_s - stats.pack_s),
        ("pack", "t2", stats.pack_s), ("first token", "t3", first), ("decode", "t4", decode))))


def _mixed(colour: str, share: float, background: str) -> str:
    def parsed(text: str) -> Iterable[int]:
        return bytes.fromhex(text[1:])

    return "#" + bytes(round(share * a + (1 - share) * b)
                       for a, b in zip(parsed(colour), parsed(background), strict=True)).hex()
