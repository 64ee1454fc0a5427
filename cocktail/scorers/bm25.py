"""BM25 over the chunks of one document, through bm25s (Lucene's variant, k1 = 1.5, b = 0.75)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from threading import Lock

import numpy as np
import Stemmer

from cocktail.scorers import Scores, finite_scores
from runtime.errors import ScorerError

# bm25s imports JAX where there is one, for a selection that is not used here, and JAX takes three quarters of the GPU's
# memory at once: here bm25s finds none.
_hidden = "jax" not in sys.modules
if _hidden:
    sys.modules["jax"] = None  # type: ignore[assignment]
try:
    import bm25s
finally:
    if _hidden:
        del sys.modules["jax"]

# A run of letters and digits is a word, single ones included ("phase 2"); scripts that write without spaces (kana, Han,
# Hangul) count every character, since a whole clause would never match another.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = rf"(?u)[{_UNSPACED}]|[^\W{_UNSPACED}]+"


class Bm25Scorer:
    """Lower-cased words; English stop words (Lucene's 33) dropped and Snowball's English stemmer applied by default.

    Other languages: stem="german" (any Snowball algorithm) or None; stopwords a language of bm25s, a list, or None.
    The stemmer matters because questions inflect what documents say: "who designed it" asks for "the designer".
    """

    name = "bm25"

    def __init__(self, stem: str | None = "english", stopwords: str | list[str] | None = "english"):
        try:
            self._stemmer = None if stem is None else Stemmer.Stemmer(stem)
        except KeyError:
            raise ScorerError(f"bm25 has no stemmer '{stem}'; it has {', '.join(Stemmer.algorithms())}") from None
        self._stopwords = stopwords or []
        self._stemming = Lock()  # PyStemmer wants a stemmer to itself; several threads may ask one document
        try:
            self._words([""])
        except ValueError as error:
            raise ScorerError(f"bm25 has no stop words for {stopwords!r}: {error}") from None

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        """All zero where the query shares no word with any chunk."""
        words, wanted = self._words(chunks), self._words([query])[0]
        if not wanted or not any(words):  # bm25s indexes no empty vocabulary
            return np.zeros(len(chunks), np.float32)
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        return finite_scores(index.get_scores_from_ids(index.get_tokens_ids(wanted)), self.name)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        with self._stemming:
            words: list[list[str]] = bm25s.tokenize(list(texts), token_pattern=_WORD, stopwords=self._stopwords,
                                                    stemmer=self._stemmer, return_ids=False, show_progress=False)
        return words
