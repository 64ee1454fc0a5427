"""Which chunk of the context keeps how many bits: Tier, DocumentShape, Layout, Plan. Data only; immutable; checked.

    DocumentShape   the sizes of one prompt in one model
    Layout          + how many chunks each tier has in each layer: sizes the arena to the byte
    Plan            + which chunk sits in which tier: what packing and decoding follow

A prompt is prefix | n_chunks * chunk | remainder | suffix; chunk i starts at position prefix + i * chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from math import isfinite

from runtime import plan_checks as checks
from runtime.errors import PlanError
from runtime.formats import FAMILIES
from runtime.formats import WIDTHS as FORMAT_WIDTHS

WIDTHS = (0, 2, 3, 4, 8, 16)  # bits; 0 only for K and V together
MIN_CHUNK, MAX_CHUNK, CHUNK_STEP = 8, 256, 8


@dataclass(frozen=True, slots=True)
class Tier:
    """Bits of a chunk's K and V: 2, 3, 4, 8 or 16 each, independently. Tier(0, 0) is not stored at all.

    Not storing loses nothing when a sliding window hides the chunk from every decoded token (hidden_chunks).
    """

    k_bits: int
    v_bits: int

    def __post_init__(self) -> None:
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if type(bits) is not int or bits not in WIDTHS:
                raise PlanError(f"tier {name} is {checks.show(bits)}; expected one of {', '.join(map(str, WIDTHS))}")
        if (self.k_bits == 0) != (self.v_bits == 0):
            raise PlanError(f"tier K{self.k_bits}V{self.v_bits} stores only half of a chunk; width 0 goes with width 0")

    def __str__(self) -> str:
        return "FP16" if self.k_bits == self.v_bits == 16 else f"K{self.k_bits}V{self.v_bits}"

    @classmethod
    def parse(cls, text: str) -> Tier:
        """The inverse of str(): 'K3V2', 'FP16' (also 'K16V16'), in any case. Raises PlanError."""
        if text.upper() == "FP16":
            return FP16
        match = re.fullmatch(r"K([0-9]{1,2})V([0-9]{1,2})", text.upper())
        if match is None:
            raise PlanError(f"tier {checks.show(text)} is not of the form K3V2 (K bits, V bits) or FP16")
        return cls(int(match[1]), int(match[2]))


FP16 = Tier(16, 16)
HIDDEN = Tier(0, 0)


@dataclass(frozen=True, kw_only=True)
class DocumentShape:
    """The sizes of one prompt in one model; tokens unless said otherwise.

    window is the model's sliding window (a key is visible when 0 <= query - key < window) or None. digest: of the
    context's ids, so that a plan is followed for its own document only; None where it was made for none in particular.
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    chunk: int
    n_chunks: int
    prefix: int
    remainder: int  # context tokens after the last whole chunk
    suffix: int
    max_new: int
    window: int | None
    digest: str | None = None

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_kv_heads", "head_dim"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("n_chunks", "prefix", "remainder", "suffix", "max_new"):
            checks.integer(name, getattr(self, name), 0)
        check_chunk_size(self.chunk)
        if self.remainder >= self.chunk and not self._keeps_whole_chunks:
            raise PlanError(f"remainder is {self.remainder}; expected less than one chunk of {self.chunk}")
        if self.window is not None:
            checks.integer("window", self.window, 1)
        if self.digest is not None:
            checks.line("digest", self.digest)
        checks.integer("prompt plus max_new", self.prompt_tokens + self.max_new, 0)

    @property
    def context_tokens(self) -> int:
        """Whole chunks and the remainder."""
        return self.n_chunks * self.chunk + self.remainder

    @property
    def prompt_tokens(self) -> int:
        """Prefix, context and suffix."""
        return self.prefix + self.n_chunks * self.chunk + self.remainder + self.suffix

    @property
    def tail_capacity(self) -> int:
        """Tokens that have a place in the tail: prefix, remainder, suffix and everything generated."""
        return self.prefix + self.remainder + self.suffix + self.max_new

    @property
    def _keeps_whole_chunks(self) -> bool:
        """Whether the remainder may be a chunk or longer."""
        return False

    def start(self, chunk: int) -> int:
        """Position of the first token of a chunk."""
        return self.prefix + chunk * self.chunk

    def hidden_chunks(self) -> range:
        """The leading chunks of which no decoded token (position >= prompt_tokens) sees any token; see below."""
        return hidden_chunks(self.prefix, self.chunk, self.n_chunks, self.prompt_tokens, self.window)

    def check(self, **expected: int | None) -> None:
        """Raises PlanError unless every named field has the given value: `plan.layout.check(n_layers=32, ...)`.

        For a plan from elsewhere: it only fits the model and the prompt that it was made for.
        """
        wrong = [f"{name} is {getattr(self, name)}, expected {value}"
                 for name, value in expected.items() if getattr(self, name) != value]
        if wrong:
            raise PlanError(f"the plan does not fit this model and prompt: {'; '.join(wrong)}; make a new plan")

    def layout(self, tiers: Iterable[Tier], counts: Iterable[int], formats: str = "rotated",
               flush: int | None = None, calibration: CalibrationFile | None = None) -> Layout:
        """A Layout in which every layer has the same counts, one per tier."""
        return Layout(**{f.name: getattr(self, f.name) for f in fields(DocumentShape)}, tiers=tuple(tiers),
                      counts=(tuple(counts),) * self.n_layers, formats=formats, flush=flush, calibration=calibration)


@dataclass(frozen=True, slots=True)
class CalibrationFile:
    """Which file a layout's formats read (runtime.calibration), and the digest of what it held."""

    path: str
    digest: str

    def __post_init__(self) -> None:
        for name, text in (("path", self.path), ("digest", self.digest)):
            checks.line(f"calibration {name}", text)


@dataclass(frozen=True, kw_only=True)
class Layout(DocumentShape):
    """A DocumentShape plus counts[layer][tier] chunks per tier (the sum is n_chunks in every layer).

    This alone sizes the arena (runtime.arena); which chunk goes where may be decided later. The order of tiers is
    the order of regions in the arena.

    in_place: None, or the tier index of every chunk, [layer][chunk]: then the chunks lie in document order with widths
    mixed, and the arena's bytes depend on where one width gives way to another (Plan.without_reordering).

    formats: the family of storage formats (runtime.formats) behind the widths below 16.

    flush: None, or how many tokens of the tail stay FP16 at least: whenever it holds a whole chunk more behind the
    prefix, the oldest chunk is packed, at the lowest tier, and read from there. Such a window may reach back into the
    context, so the remainder may then be longer than a chunk: all that stays FP16 at first is in the tail.

    calibration: the file that the kvquant formats read; None elsewhere.
    """

    tiers: tuple[Tier, ...]
    counts: tuple[tuple[int, ...], ...]
    in_place: tuple[tuple[int, ...], ...] | None = None
    formats: str = "rotated"
    flush: int | None = None
    calibration: CalibrationFile | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tiers, tuple) or not all(isinstance(tier, Tier) for tier in self.tiers):
            raise PlanError(f"layout tiers are {checks.show(self.tiers)}; expected a tuple of Tier")
        if not self.tiers or len(set(self.tiers)) != len(self.tiers):
            raise PlanError(f"layout tiers are ({', '.join(map(str, self.tiers))}); "
                            "expected at least one, each named once")
        object.__setattr__(self, "counts", checks.shared("counts", self.counts, self.n_layers))
        for layer, counts in checks.distinct(self.counts):
            if len(counts) != len(self.tiers):
                raise PlanError(f"layer {layer} has {len(counts)} counts; expected {len(self.tiers)}, one per tier")
            for tier, count in zip(self.tiers, counts, strict=True):
                checks.integer(f"count of {tier} in layer {layer}", count, 0)
            if sum(counts) != self.n_chunks:
                raise PlanError(f"counts of layer {layer} sum to {sum(counts)}; expected n_chunks = {self.n_chunks}")
        if self.in_place is not None:
            object.__setattr__(self, "in_place", checks.shared("in_place", self.in_place, self.n_layers))
            checks.assignment("in_place", self.in_place, self.counts)
        self._check_formats()

    def _check_formats(self) -> None:
        if self.formats not in FAMILIES:
            raise PlanError(f"formats is {checks.show(self.formats)}; expected one of {', '.join(FAMILIES)}")
        widths = FORMAT_WIDTHS[self.formats]
        for tier in self.tiers:
            if not {tier.k_bits, tier.v_bits} <= {0, 16, *widths}:
                raise PlanError(f"there is no {tier} in the {self.formats} formats; their widths are "
                                f"{', '.join(map(str, widths))} and 16")
        if self.calibration is not None and self.formats != "kvquant":
            raise PlanError(f"the {self.formats} formats read no calibration; only kvquant does")
        if self.flush is not None:
            checks.integer("flush", self.flush, 0)
            if self.lowest == FP16:
                raise PlanError("flush needs a tier below FP16 to pack the tail at; expected one, if of no chunk")

    @property
    def lowest(self) -> Tier:
        """The stored tier of the fewest bits: what a flushed tail is packed at."""
        stored = [tier for tier in self.tiers if tier != HIDDEN]
        return min(stored, key=lambda tier: (tier.k_bits + tier.v_bits, tier.k_bits), default=FP16)

    def flushed(self, generated: int) -> int:
        """How many chunks of the tail are packed once it holds so many generated tokens."""
        if self.flush is None:
            return 0
        return max(0, self.remainder + self.suffix + generated - self.flush) // self.chunk

    @property
    def _keeps_whole_chunks(self) -> bool:
        return self.flush is not None


@dataclass(frozen=True)
class Plan:
    """A Layout plus assignment[layer][chunk] = index into layout.tiers. Equal layers share one tuple.

    scores: the finite similarity per chunk (N,) that the policy ranked, None where none were used. permutation: the
    order in which chunks are stored, None for document order; attention does not depend on it beyond rounding.
    policy, scorer and notes are for people: one printable line each.
    """

    layout: Layout
    assignment: tuple[tuple[int, ...], ...]
    policy: str
    scorer: str
    scores: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    permutation: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Layout):
            raise PlanError(f"plan layout is {checks.show(self.layout)}; expected a Layout")
        object.__setattr__(self, "assignment", checks.shared("assignment", self.assignment, self.layout.n_layers))
        self.validate()

    def validate(self) -> None:
        """Raises PlanError unless every field fits the layout. The constructor calls it."""
        n = self.layout.n_chunks
        checks.assignment("assignment", self.assignment, self.layout.counts)
        if self.layout.in_place not in (None, self.assignment):
            raise PlanError("the layout keeps its chunks in place, with another assignment; make a new plan")
        if self.layout.in_place is not None and self.permutation is not None:
            raise PlanError("the layout keeps its chunks in place; expected no permutation")
        if self.scores is not None:
            checks.kind("plan scores", self.scores, tuple)
            if len(self.scores) != n:
                raise PlanError(f"plan has {len(self.scores)} scores; expected {n}, one per chunk")
            for chunk, score in enumerate(self.scores):
                if type(score) is not float or not isfinite(score):
                    raise PlanError(f"score of chunk {chunk} is {checks.show(score)}; expected a finite float")
        if self.permutation is not None:
            checks.indices("permutation", self.permutation, n, n)
            if len(set(self.permutation)) != n:
                raise PlanError("permutation names a chunk twice; expected every chunk once")
        checks.kind("plan notes", self.notes, tuple)
        for name, text in (("policy", self.policy), ("scorer", self.scorer), *(("note", note) for note in self.notes)):
            checks.line(f"plan {name}", text)

    def order(self, layer: int, tier: int) -> tuple[int, ...]:
        """The chunks of one layer and tier in the order in which their region holds them."""
        chunks = self.assignment[layer]
        return tuple(chunk for chunk in self.permutation or range(len(chunks)) if chunks[chunk] == tier)

    def stored(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The chunks of each span of the layer (ArenaLayout.spans), in the order in which the span holds them.

        A span is one tier's chunks; with Layout.in_place, one run of neighbours of equal width.
        """
        if self.layout.in_place is None:
            return tuple(self.order(layer, tier) for tier in range(len(self.layout.tiers)))
        chunks = iter(range(self.layout.n_chunks))
        return tuple(tuple(islice(chunks, n)) for _, n in runs(self.assignment[layer]))

    def without_reordering(self) -> Plan:
        """The same widths with every chunk left where the document has it (paper, Table V, without module II)."""
        return replace(self, layout=replace(self.layout, in_place=self.assignment), permutation=None)

    def table(self) -> str:
        """Plain text, one row per tier in use: bits of K and V, chunks, share."""
        layout = self.layout
        totals = [sum(counts[tier] for counts in layout.counts) for tier in range(len(layout.tiers))]
        same = len(set(layout.counts)) == 1
        rows = [("tier", "K bits", "V bits", "chunks" if same else "chunks, all layers", "share")]
        for tier, total in zip(layout.tiers, totals, strict=True):
            if total:
                rows.append(("not stored" if tier == HIDDEN else str(tier), str(tier.k_bits), str(tier.v_bits),
                             str(total // layout.n_layers if same else total),
                             f"{100 * total / (layout.n_chunks * layout.n_layers):.1f}%"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"policy {self.policy}, scorer {self.scorer}: {layout.n_chunks} chunks of {layout.chunk} tokens, "
                 f"{layout.n_layers} layers, {layout.tail_capacity} tokens of FP16 tail"
                 + (", widths mixed in place" if layout.in_place is not None else "")
                 + (f", {layout.formats} formats" if layout.formats != "rotated" else "")
                 + (f", but for the last {layout.flush} packed as they come" if layout.flush is not None else "")]
        lines += ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:],
                                                                                        strict=True))]) for row in rows]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def to_json(self) -> str:
        """Compact JSON; every distinct assignment once, one digit per chunk. from_json gives an equal Plan."""
        from runtime import plan_json

        return plan_json.write(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises PlanError on anything but what to_json writes; never another exception."""
        from runtime import plan_json

        return plan_json.read(text)


def hidden_chunks(prefix: int, chunk: int, n_chunks: int, prompt_tokens: int, window: int | None) -> range:
    """The chunks that no decode position (>= prompt_tokens) can see; a key is visible when 0 <= query - key < window.

    Positions grow with the chunk's index, so these are always the first ones. The nearest pair of a chunk is its last
    token, prefix + (i + 1) * chunk - 1, and the first decoded token, at prompt_tokens.
    """
    if window is None:
        return range(0)
    return range(min(max((prompt_tokens - window + 1 - prefix) // chunk, 0), n_chunks))


def runs(chunks: Sequence[int]) -> list[tuple[int, int]]:
    """(tier index, how many neighbours have it) along the document."""
    return [(tier, sum(1 for _ in group)) for tier, group in groupby(chunks)]


def check_chunk_size(chunk: int) -> None:
    """Raises PlanError unless it is a multiple of 8 from 8 to 256."""
    if type(chunk) is not int or chunk % CHUNK_STEP or not MIN_CHUNK <= chunk <= MAX_CHUNK:
        raise PlanError(f"chunk is {checks.show(chunk)}; expected a multiple of {CHUNK_STEP} "
                        f"from {MIN_CHUNK} to {MAX_CHUNK}")
