"""Cut the context into chunks of C token ids, and give scorers their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from runtime.plan import check_chunk_size

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

DEFAULT_CHUNK = 32  # paper, section IV-B and Table III: smaller gains nothing, larger loses accuracy


class Decoder(Protocol):
    """The part of runtime.tokenizer.Tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...


def cut(tokenizer: Decoder, ids: Sequence[int],
        size: int = DEFAULT_CHUNK) -> tuple[list[Sequence[int]], list[str], int]:
    """The ids of each whole chunk, its text, and how many ids are left over (those stay FP16; paper, section III-A).

    The text is for scoring only: a character whose bytes lie on both sides of a border decodes to U+FFFD and is
    stripped. Raises PlanError for a size that no chunk can have.
    """
    check_chunk_size(size)
    whole = len(ids) // size * size
    chunks = [ids[start:start + size] for start in range(0, whole, size)]
    return chunks, [tokenizer.decode(chunk).strip("\ufffd") for chunk in chunks], len(ids) - whole


def passages(tokenizer: Tokenizer, ids: Sequence[int], size: int = DEFAULT_CHUNK) -> list[str]:
    """The text of each whole chunk and of what is left over ("" if nothing): joined, the text of all ids.

    For showing. A character that a border cuts is in the later chunk.
    """
    check_chunk_size(size)
    stream, whole = tokenizer.stream(), len(ids) // size * size
    texts = ["".join(map(stream.push, ids[start:start + size])) for start in range(0, whole, size)]
    return [*texts, "".join(map(stream.push, ids[whole:])) + stream.finish()]
