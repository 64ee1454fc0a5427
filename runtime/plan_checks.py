"""Checks of a plan's fields, which may come from hostile JSON: types are exact (bool is no int), messages cut short."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from runtime.errors import PlanError

_MAX = 2**31 - 1  # positions and counts are int32 on every device


def show(value: object) -> str:
    """A value as an error message has it: never long, never another exception."""
    # reprlib: a deeply nested value has no plain repr within the recursion limit; nor has an int of 4301 digits.
    return "a huge number" if type(value) is int and value.bit_length() > 256 else reprlib.repr(value)


def integer(name: str, value: object, low: int, high: int = _MAX) -> None:
    """Raises PlanError unless it is an integer from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise PlanError(f"{name} is {show(value)}; expected an integer from {low} to {high}")


def kind(name: str, value: object, expected: type) -> Any:
    """The value. Raises PlanError unless its type is exactly the expected one."""
    if type(value) is not expected:
        raise PlanError(f"{name} is {show(value)}; expected a {expected.__name__}")
    return value


def line(name: str, text: object) -> None:
    """Raises PlanError unless it is one line of printable text."""
    if not isinstance(text, str) or not text.isprintable():
        raise PlanError(f"{name} is {show(text)}; expected one line of printable text")


def indices(name: str, values: tuple[int, ...], length: int, bound: int) -> None:
    """Raises PlanError unless these are `length` integers from 0 to bound - 1."""
    if len(values) != length:
        raise PlanError(f"{name} has {len(values)} entries; expected {length}")
    for value in set(values) if set(map(type, values)) <= {int} else values:
        integer(f"an entry of {name}", value, 0, bound - 1)


def assignment(name: str, layers: tuple[tuple[int, ...], ...], counts: tuple[tuple[int, ...], ...]) -> None:
    """Raises PlanError unless layers[layer][chunk] are tier indices, as many of each as counts[layer][tier] says."""
    found: dict[int, tuple[int, ...]] = {}  # id of a layer's tuple -> its chunks per tier
    for layer, (chunks, expected) in enumerate(zip(layers, counts, strict=True)):
        if id(chunks) not in found:
            indices(f"{name} of layer {layer}", chunks, sum(expected), len(expected))
            found[id(chunks)] = per_tier(chunks, len(expected))
        if found[id(chunks)] != expected:
            raise PlanError(f"{name} of layer {layer} has {found[id(chunks)]} chunks per tier; "
                            f"the layout expects {expected}")


def per_tier(chunks: tuple[int, ...], n_tiers: int) -> tuple[int, ...]:
    """How many of the tier indices name each tier."""
    found = Counter(chunks)
    return tuple(found[tier] for tier in range(n_tiers))


def shared(name: str, layers: tuple[tuple[int, ...], ...], n_layers: int) -> tuple[tuple[int, ...], ...]:
    """The same value with equal layers being one object. Checks the shape but not the entries."""
    if not isinstance(layers, tuple) or not all(isinstance(layer, tuple) for layer in layers):
        raise PlanError(f"{name} is {show(layers)}; expected one tuple per layer")
    if len(layers) != n_layers:
        raise PlanError(f"{name} has {len(layers)} layers; expected {n_layers}")
    for layer, values in distinct(layers):
        if not set(map(type, values)) <= {int}:  # before hashing: True == 1 must not merge, a list has no hash
            raise PlanError(f"{name} of layer {layer} is {show(values)}; expected integers")
    first: dict[tuple[int, ...], tuple[int, ...]] = {}
    return tuple(first.setdefault(layer, layer) for layer in layers)


def distinct(layers: tuple[tuple[int, ...], ...]) -> Iterable[tuple[int, tuple[int, ...]]]:
    """(first layer, its tuple) for every distinct object."""
    seen: dict[int, tuple[int, tuple[int, ...]]] = {}
    for layer, values in enumerate(layers):
        seen.setdefault(id(values), (layer, values))
    return seen.values()
