"""Questions about long documents of real text, by seed: what bench.quality asks.

Python's own reference text (pydoc_data.topics) is cut into documents of 1,500 to 6,000 model tokens. Two tasks:

    niah  invented facts are planted between the paragraphs; the question asks for the year in one of them.
          literal: the question repeats the fact's words. paraphrased: no content word of it (checked here), so that
          words alone do not find the chunk.
    copy  a sentence of the document is to be repeated; the question quotes its beginning. The small models this is for
          rarely repeat it unaided, so that the sentence itself is forced and each next token judged (bench.quality).

Everything is ASCII, so that chunk texts join to exactly the context and a character span tells which chunks are needed.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

MIN_TOKENS, MAX_TOKENS = 1500, 6000
PLANTED = 2  # facts per document: the one asked for and others that are not
TASKS = ("paraphrased", "copy", "paraphrased", "literal")  # repeated in this order: half the questions are paraphrased
PARAGRAPHS = re.compile(r"\n\s*\n")
DEBIAN = ("dpkg/spec/*.txt", "base-passwd/*.txt.gz", "debianutils/*.gz")  # plain-text manuals below /usr/share/doc


@dataclass(frozen=True)
class Fact:
    """A sentence with {year}, a question in its words and one that shares no content word with it."""

    sentence: str
    literal: str
    paraphrased: str


FACTS = (
    Fact("The king was crowned in {year}.", "In which year was the king crowned?",
         "When did the monarch get his throne?"),
    Fact("The ship sank in {year}.", "In which year did the ship sink?",
         "When did the boat go down?"),
    Fact("The baby was born in {year}.", "In which year was the baby born?",
         "When did the infant come into this world?"),
    Fact("The author passed away in {year}.", "In which year did the author pass away?",
         "When did the writer die?"),
    Fact("The war ended in {year}.", "In which year did the war end?",
         "When was the conflict over?"),
    Fact("The wedding took place in {year}.", "In which year did the wedding take place?",
         "When did the couple marry?"),
    Fact("The robbery happened in {year}.", "In which year did the robbery happen?",
         "When did thieves steal the money?"),
    Fact("The attorney was hired in {year}.", "In which year was the attorney hired?",
         "When did the lawyer get the job?"),
    Fact("The illness was cured in {year}.", "In which year was the illness cured?",
         "When did the disease go away?"),
    Fact("The bishop was slain in {year}.", "In which year was the bishop slain?",
         "When did they kill the priest?"),
    Fact("The car was purchased in {year}.", "In which year was the car purchased?",
         "When did they buy the automobile?"),
    Fact("The house was constructed in {year}.", "In which year was the house constructed?",
         "When did they build the home?"),
)
NIAH_QUERY = "According to the text above, {question} Answer with a year."
COPY_QUERY = 'Repeat word for word the sentence that begins with "{beginning}"'
QUOTED_WORDS = 6  # of a sentence to copy


@dataclass(frozen=True)
class Prompt:
    """task: "niah" or "copy". kind: "literal" or "paraphrased". answer: the year, or the sentence to repeat.

    needed: the character span of context that holds the answer. rivals: the other planted years.
    """

    task: str
    kind: str
    context: str
    query: str
    answer: str
    needed: tuple[int, int]
    rivals: tuple[str, ...] = ()

    def needed_chunks(self, chunk_texts: Sequence[str]) -> tuple[int, ...]:
        """Indices of the chunks that the needed span touches; the remainder after the last chunk belongs to none."""
        if not self.context.startswith("".join(chunk_texts)):
            raise ValueError("the chunk texts do not join to the context; this needs a byte-exact tokenizer")
        ends = list(accumulate(map(len, chunk_texts)))
        begin, end = self.needed
        return tuple(i for i, (stop, text) in enumerate(zip(ends, chunk_texts, strict=True))
                     if stop > begin and stop - len(text) < end)

    def found(self, text: str) -> bool:
        """niah: whether the text names the year and none of the other planted years."""
        said = set(re.findall(r"\d+", text))
        return self.answer in said and not said & set(self.rivals)


def build_prompts(count_tokens: Callable[[str], int], n: int = 24, seed: int = 0, debian: bool = False) -> list[Prompt]:
    """n prompts whose contexts have 1,500 to 6,000 tokens by count_tokens, spread evenly; the same for the same seed.

    debian adds the manuals of Debian's packages, where the machine has them, to the text. The sizes are drawn without
    the task, so every task meets every size.
    """
    rng = np.random.default_rng(seed)
    paragraphs = _paragraphs(debian)
    sizes = MIN_TOKENS + (MAX_TOKENS - MIN_TOKENS) * (rng.permutation(n) + 0.5) / max(n, 1)
    return [_build(TASKS[i % len(TASKS)], int(size), paragraphs, count_tokens, rng) for i, size in enumerate(sizes)]


def build_text(tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The beginning of the text, at most `tokens` tokens: for measurements where only its length matters."""
    words = re.findall(r"\S+\s*", "\n\n".join(_paragraphs(debian=False)))
    low, high = 0, tokens  # words are never fewer than one token each
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens("".join(words[:middle])) <= tokens else (low, middle - 1)
    return "".join(words[:low])


def shared_words(a: str, b: str) -> set[str]:
    """Content words of `a` that occur in `b` too, in any inflection: equal once reduced to a crude stem."""
    return {word for word in _content_words(a) if _stem(word) in set(map(_stem, _content_words(b)))}


# Words of any question, and function words: BM25's stop lists drop most of them.
_STOP = set(re.findall("[a-z]+", """
    a above according after all an and answer any are as at be been by did do does for from had has have he her his
    how i in into is it its no not of on or she so text than that the their them they this to up was we were what
    when where which who will with year you your
"""))


def _content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word not in _STOP]


def _stem(word: str) -> str:
    """Five letters without a final s: coarse on purpose, so that it errs towards finding a shared word."""
    return (word[:-1] if word.endswith("s") and len(word) > 3 else word)[:5]


def _paragraphs(debian: bool) -> list[str]:
    """Paragraphs of prose and code in their original order, without reStructuredText rules; ASCII only."""
    texts = [topics[name] for name in sorted(topics)]
    if debian:
        texts += [_read(path) for pattern in DEBIAN for path in sorted(Path("/usr/share/doc").glob(pattern))]
    plain = "\n\n".join(texts).encode("ascii", "ignore").decode()
    return [part.strip("\n") for part in PARAGRAPHS.split(plain) if len(part) > 80 and "****" not in part]


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "ignore")


def _build(kind: str, size: int, paragraphs: list[str], count_tokens: Callable[[str], int],
           rng: np.random.Generator) -> Prompt:
    while True:
        document = _excerpt(size, paragraphs, count_tokens, rng)
        if kind != "copy":
            return _niah(kind, document, rng)
        if sentences := _sentences("\n\n".join(document)):
            return _copy("\n\n".join(document), sentences[int(rng.integers(len(sentences)))])


def _excerpt(size: int, paragraphs: list[str], count_tokens: Callable[[str], int],
             rng: np.random.Generator) -> list[str]:
    """Consecutive paragraphs from a random one on (round the end), as many as stay below `size` tokens."""
    first, chosen, tokens = int(rng.integers(len(paragraphs))), [], 0
    for i in range(len(paragraphs)):
        paragraph = paragraphs[(first + i) % len(paragraphs)]
        tokens += count_tokens(paragraph + "\n\n")
        if tokens > size:
            break
        chosen.append(paragraph)
    return chosen


def _niah(kind: str, document: list[str], rng: np.random.Generator) -> Prompt:
    facts = [FACTS[i] for i in rng.choice(len(FACTS), PLANTED, replace=False)]
    years = [str(year) for year in rng.choice(np.arange(1801, 2000), PLANTED, replace=False)]
    planted = [fact.sentence.format(year=year) for fact, year in zip(facts, years, strict=True)]
    question = facts[0].literal if kind == "literal" else facts[0].paraphrased
    query = NIAH_QUERY.format(question=question[0].lower() + question[1:])
    if kind == "paraphrased" and (shared := shared_words(query, planted[0])):
        raise ValueError(f"the paraphrase {query!r} shares {sorted(shared)} with {planted[0]!r}")
    # Neither the first nor the last paragraph: the sink and the recent tokens get attention anyway.
    for place, sentence in zip(rng.integers(1, len(document), PLANTED), planted, strict=True):
        document.insert(int(place), sentence)
    context = "\n\n".join(document)
    begin = context.index(planted[0])
    return Prompt("niah", kind, context, query, years[0], (begin, begin + len(planted[0])), tuple(years[1:]))


def _sentences(context: str) -> list[re.Match[str]]:
    """Plain sentences of 11 to 25 words whose beginning occurs once."""
    found = re.finditer(r"(?<=[.:] |\n\n)[A-Z][a-z]*(?:[ \n]+[\w',()-]+){10,24}\.(?=\s)", context)
    return [match for match in found if context.count(_beginning(match[0])) == 1]


def _copy(context: str, sentence: re.Match[str]) -> Prompt:
    query = COPY_QUERY.format(beginning=" ".join(_beginning(sentence[0]).split()))
    return Prompt("copy", "literal", context, query, " ".join(sentence[0].split()), sentence.span())


def _beginning(sentence: str) -> str:
    """The first words as they stand in the text, line breaks included."""
    match = re.match(rf"(?:\S+\s+){{{QUOTED_WORDS - 1}}}\S+", sentence)
    return match[0] if match else sentence
