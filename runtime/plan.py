"""Which chunk of the context keeps how many bits: Tier, DocumentShape, Layout, Plan. Data only; immutable; checked.

    DocumentShape   the sizes of one prompt in one model
    Layout          + how many chunks each tier has in each layer: sizes the arena to the byte
    Plan            + which chunk sits in which tier: what packing and decoding follow

A prompt is prefix | n_chunks * chunk | remainder | suffix; chunk i starts at position prefix + i * chunk.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from math import isfinite
from typing import Any

from runtime.errors import PlanError
from runtime.formats import FAMILIES
from runtime.formats import WIDTHS as FORMAT_WIDTHS

WIDTHS = (0, 2, 3, 4, 8, 16)  # bits; 0 only for K and V together
MIN_CHUNK, MAX_CHUNK, CHUNK_STEP = 8, 256, 8
VERSION = 3  # of the JSON form
_MAX = 2**31 - 1  # positions and counts are int32 on every device
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # one per tier in the JSON form; there are at most 26 distinct tiers


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
                raise PlanError(f"tier {name} is {_show(bits)}; expected one of {', '.join(map(str, WIDTHS))}")
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
            raise PlanError(f"tier {_show(text)} is not of the form K3V2 (K bits, V bits) or FP16")
        return cls(int(match[1]), int(match[2]))


FP16 = Tier(16, 16)
HIDDEN = Tier(0, 0)


@dataclass(frozen=True, kw_only=True)
class DocumentShape:
    """The sizes of one prompt in one model; tokens unless said otherwise.

    window is the model's sliding window (a key is visible when 0 <= query - key < window) or None.
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

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_kv_heads", "head_dim"):
            _integer(name, getattr(self, name), 1)
        for name in ("n_chunks", "prefix", "remainder", "suffix", "max_new"):
            _integer(name, getattr(self, name), 0)
        check_chunk_size(self.chunk)
        if self.remainder >= self.chunk and not self._keeps_whole_chunks:
            raise PlanError(f"remainder is {self.remainder}; expected less than one chunk of {self.chunk}")
        if self.window is not None:
            _integer("window", self.window, 1)
        _integer("prompt plus max_new", self.prompt_tokens + self.max_new, 0)

    @property
    def context_tokens(self) -> int:
        return self.n_chunks * self.chunk + self.remainder

    @property
    def prompt_tokens(self) -> int:
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
            if not isinstance(text, str) or not text.isprintable():
                raise PlanError(f"calibration {name} is {_show(text)}; expected one line of printable text")


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
            raise PlanError(f"layout tiers are {_show(self.tiers)}; expected a tuple of Tier")
        if not self.tiers or len(set(self.tiers)) != len(self.tiers):
            raise PlanError(f"layout tiers are ({', '.join(map(str, self.tiers))}); "
                            "expected at least one, each named once")
        object.__setattr__(self, "counts", _shared("counts", self.counts, self.n_layers))
        for layer, counts in _distinct(self.counts):
            if len(counts) != len(self.tiers):
                raise PlanError(f"layer {layer} has {len(counts)} counts; expected {len(self.tiers)}, one per tier")
            for tier, count in zip(self.tiers, counts, strict=True):
                _integer(f"count of {tier} in layer {layer}", count, 0)
            if sum(counts) != self.n_chunks:
                raise PlanError(f"counts of layer {layer} sum to {sum(counts)}; expected n_chunks = {self.n_chunks}")
        if self.in_place is not None:
            object.__setattr__(self, "in_place", _shared("in_place", self.in_place, self.n_layers))
            _check_assignment("in_place", self, self.in_place)
        self._check_formats()

    def _check_formats(self) -> None:
        if self.formats not in FAMILIES:
            raise PlanError(f"formats is {_show(self.formats)}; expected one of {', '.join(FAMILIES)}")
        widths = FORMAT_WIDTHS[self.formats]
        for tier in self.tiers:
            if not {tier.k_bits, tier.v_bits} <= {0, 16, *widths}:
                raise PlanError(f"there is no {tier} in the {self.formats} formats; their widths are "
                                f"{', '.join(map(str, widths))} and 16")
        if self.calibration is not None and self.formats != "kvquant":
            raise PlanError(f"the {self.formats} formats read no calibration; only kvquant does")
        if self.flush is not None:
            _integer("flush", self.flush, 0)
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
            raise PlanError(f"plan layout is {_show(self.layout)}; expected a Layout")
        object.__setattr__(self, "assignment", _shared("assignment", self.assignment, self.layout.n_layers))
        self.validate()

    def validate(self) -> None:
        """Raises PlanError unless every field fits the layout. The constructor calls it."""
        n = self.layout.n_chunks
        _check_assignment("assignment", self.layout, self.assignment)
        if self.layout.in_place not in (None, self.assignment):
            raise PlanError("the layout keeps its chunks in place, with another assignment; make a new plan")
        if self.layout.in_place is not None and self.permutation is not None:
            raise PlanError("the layout keeps its chunks in place; expected no permutation")
        if self.scores is not None:
            _tuple("scores", self.scores)
            if len(self.scores) != n:
                raise PlanError(f"plan has {len(self.scores)} scores; expected {n}, one per chunk")
            for chunk, score in enumerate(self.scores):
                if type(score) is not float or not isfinite(score):
                    raise PlanError(f"score of chunk {chunk} is {_show(score)}; expected a finite float")
        if self.permutation is not None:
            _indices("permutation", self.permutation, n, n)
            if len(set(self.permutation)) != n:
                raise PlanError("permutation names a chunk twice; expected every chunk once")
        _tuple("notes", self.notes)
        for name, text in (("policy", self.policy), ("scorer", self.scorer), *(("note", note) for note in self.notes)):
            if not isinstance(text, str) or not text.isprintable():
                raise PlanError(f"plan {name} is {_show(text)}; expected one line of printable text")

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
        distinct = dict.fromkeys(self.assignment)
        index = {assignment: i for i, assignment in enumerate(distinct)}
        return json.dumps({
            "version": VERSION,
            "policy": self.policy,
            "scorer": self.scorer,
            "notes": self.notes,
            "shape": {f.name: getattr(self.layout, f.name) for f in fields(DocumentShape)},
            "tiers": [str(tier) for tier in self.layout.tiers],
            "assignments": ["".join(_DIGITS[tier] for tier in assignment) for assignment in distinct],
            "layers": [index[assignment] for assignment in self.assignment],
            "scores": self.scores,
            "permutation": self.permutation,
            "in_place": self.layout.in_place is not None,
            "formats": self.layout.formats,
            "flush": self.layout.flush,
            "calibration": None if (file := self.layout.calibration) is None else [file.path, file.digest],
        }, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises PlanError on anything but what to_json writes; never another exception."""
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates)
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(f"plan is not valid JSON: {error}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is not int or version != VERSION:
            raise PlanError(f"plan version is {_show(version)}; expected {VERSION}; make a new plan")
        _keys("plan", data, {"version", "policy", "scorer", "notes", "shape", "tiers", "assignments", "layers",
                             "scores", "permutation", "in_place", "formats", "flush", "calibration"})
        _typed(data, "shape", dict)
        _keys("plan shape", data["shape"], {f.name for f in fields(DocumentShape)})
        _integer("n_layers", data["shape"]["n_layers"], 1)
        tiers = tuple(Tier.parse(tier) for tier in _strings(data, "tiers"))
        assignments = [_tier_indices(digits, len(tiers)) for digits in _strings(data, "assignments")]
        layers = _typed(data, "layers", list)
        _indices("plan layers", tuple(layers), data["shape"]["n_layers"], len(assignments))
        counts = []
        for assignment in assignments:
            found = Counter(assignment)
            counts.append(tuple(found[tier] for tier in range(len(tiers))))
        scores, permutation = data["scores"], data["permutation"]
        placed = tuple(assignments[i] for i in layers)
        calibration = None if data["calibration"] is None else _strings(data, "calibration")
        if calibration is not None and len(calibration) != 2:
            raise PlanError(f"plan calibration is {_show(calibration)}; expected a path and a digest")
        return cls(
            layout=Layout(**data["shape"], tiers=tiers, counts=tuple(counts[i] for i in layers),
                          in_place=placed if _typed(data, "in_place", bool) else None,
                          formats=_typed(data, "formats", str), flush=data["flush"],
                          calibration=None if calibration is None else CalibrationFile(*calibration)),
            assignment=placed, policy=data["policy"], scorer=data["scorer"],
            scores=None if scores is None else tuple(map(_float, _typed(data, "scores", list))),
            notes=tuple(_strings(data, "notes")),
            permutation=None if permutation is None else tuple(_typed(data, "permutation", list)))


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
        raise PlanError(f"chunk is {_show(chunk)}; expected a multiple of {CHUNK_STEP} "
                        f"from {MIN_CHUNK} to {MAX_CHUNK}")


# Checks. Values may come from hostile JSON, so types are exact (bool is no int) and messages are cut short.

def _show(value: object) -> str:
    # reprlib: a deeply nested value has no plain repr within the recursion limit; nor has an int of 4301 digits.
    return "a huge number" if type(value) is int and value.bit_length() > 256 else reprlib.repr(value)


def _integer(name: str, value: object, low: int, high: int = _MAX) -> None:
    if type(value) is not int or not low <= value <= high:
        raise PlanError(f"{name} is {_show(value)}; expected an integer from {low} to {high}")


def _tuple(name: str, value: object) -> None:
    if not isinstance(value, tuple):
        raise PlanError(f"plan {name} is {_show(value)}; expected a tuple")


def _indices(name: str, values: tuple[int, ...], length: int, bound: int) -> None:
    """`length` integers from 0 to bound - 1."""
    if len(values) != length:
        raise PlanError(f"{name} has {len(values)} entries; expected {length}")
    for value in set(values) if set(map(type, values)) <= {int} else values:
        _integer(f"an entry of {name}", value, 0, bound - 1)


def _check_assignment(name: str, layout: Layout, layers: tuple[tuple[int, ...], ...]) -> None:
    """Every layer's tier indices are valid and as many of each as the layout counts."""
    tiers = range(len(layout.tiers))
    checked: dict[int, tuple[int, ...]] = {}  # id of an assignment -> its chunks per tier
    for layer, (chunks, counts) in enumerate(zip(layers, layout.counts, strict=True)):
        if id(chunks) not in checked:
            _indices(f"{name} of layer {layer}", chunks, layout.n_chunks, len(tiers))
            found = Counter(chunks)
            checked[id(chunks)] = tuple(found[tier] for tier in tiers)
        if checked[id(chunks)] != counts:
            raise PlanError(f"{name} of layer {layer} has {checked[id(chunks)]} chunks per tier; "
                            f"the layout expects {counts}")


def _shared(name: str, layers: tuple[tuple[int, ...], ...], n_layers: int) -> tuple[tuple[int, ...], ...]:
    """The same value with equal layers being one object. Checks the shape but not the entries."""
    if not isinstance(layers, tuple) or not all(isinstance(layer, tuple) for layer in layers):
        raise PlanError(f"{name} is {_show(layers)}; expected one tuple per layer")
    if len(layers) != n_layers:
        raise PlanError(f"{name} has {len(layers)} layers; expected {n_layers}")
    for layer, values in _distinct(layers):
        if not set(map(type, values)) <= {int}:  # before hashing: True == 1 must not merge, a list has no hash
            raise PlanError(f"{name} of layer {layer} is {_show(values)}; expected integers")
    first: dict[tuple[int, ...], tuple[int, ...]] = {}
    return tuple(first.setdefault(layer, layer) for layer in layers)


def _distinct(layers: tuple[tuple[int, ...], ...]) -> Iterable[tuple[int, tuple[int, ...]]]:
    """(first layer, its tuple) for every distinct object."""
    seen: dict[int, tuple[int, tuple[int, ...]]] = {}
    for layer, values in enumerate(layers):
        seen.setdefault(id(values), (layer, values))
    return seen.values()


# Reading JSON.

def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a field appears twice")
    return data


def _keys(name: str, data: Mapping[str, Any], expected: set[str]) -> None:
    missing, extra = sorted(expected - data.keys()), sorted(data.keys() - expected)
    if missing or extra:
        raise PlanError(f"{name} lacks {_show(missing)} and has unknown fields {_show(extra)}")


def _typed(data: Mapping[str, Any], key: str, kind: type) -> Any:
    if type(data[key]) is not kind:
        raise PlanError(f"plan {key} is {_show(data[key])}; expected a {kind.__name__}")
    return data[key]


def _strings(data: Mapping[str, Any], key: str) -> list[str]:
    values = _typed(data, key, list)
    for value in values:
        if not isinstance(value, str):
            raise PlanError(f"an entry of plan {key} is {_show(value)}; expected a string")
    return list(values)


def _tier_indices(digits: str, n_tiers: int) -> tuple[int, ...]:
    known = {digit: tier for tier, digit in enumerate(_DIGITS[:n_tiers])}
    try:
        return tuple(known[digit] for digit in digits)
    except KeyError as error:
        raise PlanError(f"an assignment names tier {error}; expected digits of {n_tiers} tiers") from None


def _float(value: Any) -> Any:
    # A tool that rewrites JSON may turn 1.0 into 1; anything else is left for Plan.validate to refuse.
    return float(value) if type(value) is int and value.bit_length() <= 53 else value
