"""Questions about long documents of real text, by seed: what bench.quality asks.

Python's own reference text (pydoc_data.topics) is cut into documents of 1,500 to 6,000 model tokens, and each is turned
into a question of one of five tasks (bench.prompts_tasks). Everything is ASCII, so that chunk texts join to exactly the
context and a character span tells which chunks are needed.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from bench.prompts_tasks import Asked, Count, classify, continuation, copy, lookup, niah

MIN_TOKENS, MAX_TOKENS = 1500, 6000
KINDS = ("paraphrased", "copy", "lookup", "literal", "classify", "continue")  # repeated in this order
PARAGRAPHS = re.compile(r"\n\s*\n")
DEBIAN = ("dpkg/spec/*.txt", "base-passwd/*.txt.gz", "debianutils/*.gz")  # plain-text manuals below /usr/share/doc


@dataclass(frozen=True)
class Prompt:
    """kind: one of KINDS; paraphrased and literal are the two kinds of niah. lead: how the answer begins, which is
    given; answer: what is judged. needed: the character span of context that holds the answer, None where no single
    place does.
    """

    kind: str
    context: str
    query: str
    lead: str
    answer: str
    needed: tuple[int, int] | None

    @property
    def exact(self) -> bool:
        """Whether every token of the answer must be right, or the share that is counts."""
        return self.kind not in ("copy", "continue")

    @property
    def dictated(self) -> bool:
        """Whether the given answer is all there is to say: small models neither repeat nor continue unaided, and what
        is to be labelled stands in the lead."""
        return self.kind in ("copy", "classify", "continue")

    def needed_chunks(self, chunk_texts: Sequence[str]) -> tuple[int, ...]:
        """Indices of the chunks that the needed span touches; the remainder after the last chunk belongs to none."""
        if not self.context.startswith("".join(chunk_texts)):
            raise ValueError("the chunk texts do not join to the context; this needs a byte-exact tokenizer")
        if self.needed is None:
            return ()
        ends = list(accumulate(map(len, chunk_texts)))
        begin, end = self.needed
        return tuple(i for i, (stop, text) in enumerate(zip(ends, chunk_texts, strict=True))
                     if stop > begin and stop - len(text) < end)


def build_prompts(count_tokens: Count, n: int = 72, seed: int = 0, debian: bool = False,
                  longest: int = MAX_TOKENS) -> list[Prompt]:
    """n prompts whose contexts have 1,500 to `longest` tokens by count_tokens, spread evenly; the same for the same
    seed.

    debian adds the manuals of Debian's packages, where the machine has them, to the text. The sizes are drawn without
    the task, so every task meets every size.
    """
    rng = np.random.default_rng(seed)
    paragraphs = _paragraphs(debian)
    sizes = MIN_TOKENS + (longest - MIN_TOKENS) * (rng.permutation(n) + 0.5) / max(n, 1)
    return [_build(KINDS[i % len(KINDS)], int(size), paragraphs, count_tokens, rng) for i, size in enumerate(sizes)]


def build_text(tokens: int, count_tokens: Count) -> str:
    """The beginning of the text, at most `tokens` tokens: for measurements where only its length matters."""
    words = re.findall(r"\S+\s*", "\n\n".join(_paragraphs(debian=False)))
    low, high = 0, tokens  # words are never fewer than one token each
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens("".join(words[:middle])) <= tokens else (low, middle - 1)
    return "".join(words[:low])


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


def _build(kind: str, size: int, paragraphs: list[str], count_tokens: Count, rng: np.random.Generator) -> Prompt:
    asked: Asked | None = None
    while asked is None:  # a few documents have nothing to copy or to continue
        if kind == "classify":
            asked = classify(paragraphs, size, count_tokens, rng)
            break
        document = _excerpt(size, paragraphs, count_tokens, rng)
        if kind == "copy":
            asked = copy(document, rng)
        elif kind == "continue":
            asked = continuation(document)
        elif kind == "lookup":
            asked = lookup(document, rng)
        else:
            asked = niah(document, kind == "paraphrased", rng)
    return Prompt(kind, **vars(asked))


def _excerpt(size: int, paragraphs: list[str], count_tokens: Count, rng: np.random.Generator) -> list[str]:
    """Consecutive paragraphs from a random one on (round the end), as many as stay below `size` tokens."""
    first, chosen, tokens = int(rng.integers(len(paragraphs))), [], 0
    for i in range(len(paragraphs)):
        paragraph = paragraphs[(first + i) % len(paragraphs)]
        tokens += count_tokens(paragraph + "\n\n")
        if tokens > size:
            break
        chosen.append(paragraph)
    return chosen
