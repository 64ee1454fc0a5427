"""LongBench's metrics (Bai et al. 2023), number for number: (prediction, reference, class names) -> 0 to 1.

Two of them are not what their names suggest, and a table is comparable only with what they are:

rouge_l     is the `rouge` package's: words as they stand (case and punctuation count), sentences cut at full stops, the
            union of the longest common subsequences over all pairs of sentences, and each distinct word counted once.
            Google's rouge-score gives other numbers: "the cat sat on the mat" against "the cat is on the mat" is 5 of 6
            words there (.833) and 4 of 5 distinct words here (.8). So it is that package that runs, its end at the
            recursion limit included.
code_sim    is fuzzywuzzy's ratio, a whole per cent. With python-Levenshtein installed, that is the indel similarity,
            which rapidfuzz computes too and which is used here; without, it is difflib's ratio ("tide" and "diet": 50
            against 25). LongBench does not say which its published figures have, so compare those of the two code
            datasets within one table only.

Where the benchmark's own loop would leave a class name in because it stands right behind a dropped one, it is dropped
here. None of TREC's 50 names contains another, so no score of LongBench's data depends on it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz import fuzz
from rouge import Rouge

Metric = Callable[[str, str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE = Rouge(metrics=["rouge-l"], stats=["f"])


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the two bags of words, without case, punctuation and articles; 0 where they share none."""
    found, wanted = _words(prediction), _words(reference)
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The rouge package's ROUGE-L F; 0 where either text has no sentence."""
    try:
        return float(_ROUGE.get_scores(prediction, reference)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # what the package does with empty texts and very long sentences
        return 0.0


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / the number of class names that the prediction contains, if the right one is among them; else 0.

    A name inside the right one does not count: whoever says "Other number" did not also say "number".
    """
    found = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(found) if reference in found else 0.0


def code_sim(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the reference and the first line that is neither Markdown nor a comment, in whole per cent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, reference)) / 100


def first_line(prediction: str) -> str:
    """The first line after leading newlines: all that few-shot tasks are judged by; models write further examples."""
    return prediction.lstrip("\n").split("\n")[0]


def _words(text: str) -> list[str]:
    """Punctuation goes before articles do, so "a.n" is an article: that is the benchmark's order."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
