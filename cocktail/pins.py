"""Texts that a user wants kept whatever the scores say: which chunks of the document hold them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from runtime.errors import PlanError

if TYPE_CHECKING:
    from cocktail.document import Document

LIKELY = 60.0  # of 100: below it the nearest passage has too little in common with the text to be worth showing


def chunks_with(document: Document, texts: Sequence[str]) -> tuple[int, ...]:
    """The chunks that hold one of the texts or a part of one, in order; the remainder behind them is exact anyway.

    Every place counts where a text occurs, as it is written except that any white space stands for any other (documents
    break their lines where they like). Bytes are compared, since a border may cut a character in two. Raises PlanError
    where a text occurs nowhere, with the nearest passage.
    """
    if isinstance(texts, str):
        raise PlanError("pin is one text; expected a list of texts")
    found: set[int] = set()
    pieces = [document.model.tokenizer.token_bytes(token) for token in document.context_ids]
    whole, ends = b"".join(pieces), list(accumulate(map(len, pieces)))
    for text in texts:
        words = [re.escape(word.encode()) for word in text.split()]
        if not words:
            raise PlanError("a text to pin is empty; expected words that occur in the document")
        places = [match.span(1) for match in re.finditer(rb"(?=(" + rb"\s+".join(words) + rb"))", whole)]
        if not places:
            raise PlanError(f"the text to pin does not occur in the document: {text!r}{_nearest(text, whole)}")
        for begin, end in places:
            first, last = (bisect_right(ends, byte) // document.chunk for byte in (begin, end - 1))
            found.update(range(first, last + 1))
    return tuple(sorted(chunk for chunk in found if chunk < document.n_chunks))


def _nearest(text: str, whole: bytes) -> str:
    from rapidfuzz.fuzz import partial_ratio_alignment

    passages = whole.decode(errors="replace")
    likely = partial_ratio_alignment(text, passages, score_cutoff=LIKELY)
    return f"; the nearest passage is {passages[likely.dest_start:likely.dest_end]!r}" if likely else ""
