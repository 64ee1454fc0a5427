"""The tasks of bench.prompts: each turns a document of real paragraphs into a question whose answer is known.

    niah      invented facts are planted between the paragraphs; the question asks for the year in one of them.
              literal: in the fact's words. paraphrased: without any content word of it (checked here), so that words
              alone do not find the chunk.
    lookup    numbers under names, spread over the document; the question asks for one of them.
    copy      a sentence of the document is to be repeated; the question quotes its beginning.
    classify  the document is labelled examples of real text; one more is to be labelled, which the answer begins with
              as the examples do. No single chunk is needed.
    continue  the text goes on; there is no question. No single chunk is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Count = Callable[[str], int]  # tokens of a text


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
    Fact("The physician retired in {year}.", "In which year did the physician retire?",
         "When did the doctor stop working?"),
    Fact("The forest burned in {year}.", "In which year did the forest burn?",
         "When did fire destroy the woods?"),
    Fact("The painting vanished in {year}.", "In which year did the painting vanish?",
         "When did the picture disappear?"),
    Fact("The factory shut in {year}.", "In which year did the factory shut?",
         "When did the plant close?"),
    Fact("The teacher departed in {year}.", "In which year did the teacher depart?",
         "When did the instructor leave?"),
    Fact("The treaty was signed in {year}.", "In which year was the treaty signed?",
         "When did the nations agree on peace?"),
)
PLANTED = 2  # facts per document: the one asked for and others that are not
NIAH_QUERY = "According to the text above, {question} Answer with a year."
NIAH_LEAD = "The year is"

NAMES = ("falcon", "harbor", "cotton", "silver", "garden", "winter", "marble", "copper", "violet", "thunder", "meadow",
         "pepper", "canyon", "lantern", "orchard", "saddle")
RECORDS = 8  # per document
RECORD = "The number of {name} is {number}."
LOOKUP_QUERY = "According to the text above, what is the number of {name}?"
LOOKUP_LEAD = "The number of {name} is"

COPY_QUERY = 'Repeat word for word the sentence that begins with "{beginning}"'
QUOTED_WORDS = 6  # of a sentence to copy

CLASSES = {"rule": re.compile("::="), "console": re.compile("^ *>>> ", re.MULTILINE),
           "text": re.compile(r"\A(?!.*(?:::=|>>>))[A-Z][^\n]*\n[^\n]*", re.DOTALL)}
EXAMPLE = "Text:\n{text}\nCategory: {label}"
EXAMPLE_CHARACTERS = 240  # of its text, at most
CLASSIFY_QUERY = "Label one more text in the same way."
CLASSIFY_LEAD = "Text:\n{text}\nCategory:"

CONTINUED_WORDS = 24


@dataclass(frozen=True)
class Asked:
    """A question as its task makes it. lead: how the answer begins, which is given; answer: what is judged.

    needed: the character span of the context that holds the answer; None where no single place does.
    """

    context: str
    query: str
    lead: str
    answer: str
    needed: tuple[int, int] | None


def niah(document: list[str], paraphrased: bool, rng: np.random.Generator) -> Asked:
    facts = [FACTS[i] for i in rng.choice(len(FACTS), PLANTED, replace=False)]
    years = _numbers(document, range(1801, 2000), PLANTED, rng)
    planted = [fact.sentence.format(year=year) for fact, year in zip(facts, years, strict=True)]
    question = facts[0].paraphrased if paraphrased else facts[0].literal
    query = NIAH_QUERY.format(question=question[0].lower() + question[1:])
    if paraphrased and (shared := shared_words(query, planted[0])):
        raise ValueError(f"the paraphrase {query!r} shares {sorted(shared)} with {planted[0]!r}")
    context = _plant(document, planted, rng)
    return Asked(context, query, NIAH_LEAD, f" {years[0]}", _span(context, planted[0]))


def lookup(document: list[str], rng: np.random.Generator) -> Asked:
    names = [NAMES[i] for i in rng.choice(len(NAMES), RECORDS, replace=False)]
    numbers = _numbers(document, range(10000, 100000), RECORDS, rng)
    records = [RECORD.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)]
    context = _plant(document, records, rng)
    return Asked(context, LOOKUP_QUERY.format(name=names[0]), LOOKUP_LEAD.format(name=names[0]), f" {numbers[0]}",
                 _span(context, records[0]))


def copy(document: list[str], rng: np.random.Generator) -> Asked | None:
    """None where the document has no sentence to copy."""
    context = "\n\n".join(document)
    found = _sentences(context)
    if not found:
        return None
    sentence = found[int(rng.integers(len(found)))]
    beginning, whole = " ".join(_beginning(sentence[0]).split()), " ".join(sentence[0].split())
    return Asked(context, COPY_QUERY.format(beginning=beginning), beginning, whole[len(beginning):], sentence.span())


def classify(paragraphs: Sequence[str], size: int, count: Count, rng: np.random.Generator) -> Asked:
    """Examples in random order, every class equally often but for the last ones, from anywhere in the text."""
    labels = list(CLASSES)
    kept = {label: list(dict.fromkeys(_shortened(text) for text in paragraphs if CLASSES[label].search(text)))
            for label in labels}
    order = {label: [texts[i] for i in rng.permutation(len(texts))] for label, texts in kept.items()}
    asked = labels[int(rng.integers(len(labels)))]
    lead = CLASSIFY_LEAD.format(text=order[asked].pop())
    examples: list[str] = []
    tokens = 0
    while True:
        for i in rng.permutation(len(labels)):
            texts = order[labels[i]]
            if not texts:  # the largest documents use every example of a class
                continue
            example = EXAMPLE.format(text=texts.pop(), label=labels[i])
            tokens += count(example + "\n\n")
            if tokens > size:
                return Asked("\n\n".join(examples), CLASSIFY_QUERY, lead, f" {asked}", None)
            examples.append(example)


def continuation(document: list[str]) -> Asked | None:
    """The document up to the middle of its last long paragraph; None where that has too few words."""
    words = list(re.finditer(r"\S+", document[-1]))
    if len(words) < 2 * CONTINUED_WORDS:
        return None
    cut = words[len(words) - CONTINUED_WORDS].start()
    context = "\n\n".join([*document[:-1], document[-1][:cut].rstrip()])
    return Asked(context, "", "", " ".join(document[-1][cut:].split()), None)


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


def _numbers(document: Sequence[str], among: range, n: int, rng: np.random.Generator) -> list[str]:
    """n different ones that the document does not name."""
    said = set(re.findall(r"\d+", " ".join(document)))
    return [str(number) for number in rng.permutation(among) if str(number) not in said][:n]


def _plant(document: list[str], sentences: Sequence[str], rng: np.random.Generator) -> str:
    """The document with the sentences as paragraphs of their own."""
    document = list(document)
    # Neither the first nor the last paragraph: the sink and the recent tokens get attention anyway.
    for place, sentence in zip(rng.integers(1, len(document), len(sentences)), sentences, strict=True):
        document.insert(int(place), sentence)
    return "\n\n".join(document)


def _span(context: str, sentence: str) -> tuple[int, int]:
    begin = context.index(sentence)
    return begin, begin + len(sentence)


def _sentences(context: str) -> list[re.Match[str]]:
    """Plain sentences of 11 to 25 words whose beginning occurs once."""
    found = re.finditer(r"(?<=[.:] |\n\n)[A-Z][a-z]*(?:[ \n]+[\w',()-]+){10,24}\.(?=\s)", context)
    return [match for match in found if context.count(_beginning(match[0])) == 1 and "\n\n" not in match[0]]


def _beginning(sentence: str) -> str:
    """The first words as they stand in the text, line breaks included."""
    match = re.match(rf"(?:\S+\s+){{{QUOTED_WORDS - 1}}}\S+", sentence)
    return match[0] if match else sentence


def _shortened(text: str) -> str:
    """Whole lines, at most EXAMPLE_CHARACTERS where the first line is not longer."""
    lines = text.split("\n")
    kept = lines[:1]
    for line in lines[1:]:
        if len("\n".join([*kept, line])) > EXAMPLE_CHARACTERS:
            break
        kept.append(line)
    return "\n".join(kept)
