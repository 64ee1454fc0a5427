"""Scorers: finite scores of the right shape, the relevant chunk first, clear errors. All without a network."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from encoder_files import minilm
from hypothesis import given, settings
from hypothesis import strategies as st

from cocktail.chunks import cut
from cocktail.scorers import Scorer, finite_scores, load_scorer
from cocktail.scorers.embeddings import EmbeddingScorer
from cocktail.scorers.hybrid import z_scores
from cocktail.scorers.library import LibraryScorer, _Library, _Quick
from runtime.errors import PlanError, ScorerError

CHUNKS = ["The old mill stands by the river and grinds flour.", "Ana Torres designed the bridge; it opened in 1903.",
          "Whales feed on krill, which they filter from the sea.", "", "!!!", "日本の首都は東京です"]
BRIDGE, WHALES, TOKYO = 1, 2, 5


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a scorer reached for the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def encoder() -> Scorer:
    return load_scorer(str(minilm()))


@pytest.fixture(scope="module")
def library() -> LibraryScorer:
    return LibraryScorer(str(minilm()), device="cpu")


@pytest.fixture(scope="module")
def hybrid() -> Scorer:
    return load_scorer(f"hybrid:{minilm()}")


# All scorers.

@settings(max_examples=15, deadline=None)
@given(chunks=st.lists(st.text(max_size=30), max_size=5), query=st.text(max_size=30))
@pytest.mark.parametrize("name", ["bm25", "random", "none", "encoder", "library", "hybrid"])
def test_scores_are_finite_and_reproducible(name: str, encoder: Scorer, library: Scorer, hybrid: Scorer,
                                            chunks: list[str], query: str) -> None:
    scorer = {"encoder": encoder, "library": library, "hybrid": hybrid}.get(name) or load_scorer(name)
    scores = scorer.score(chunks, query)
    assert scores.dtype == np.float32 and scores.shape == (len(chunks),) and np.isfinite(scores).all()
    assert (scorer.score(chunks, query) == scores).all()


@pytest.mark.parametrize(("name", "message"), [
    ("bm52", "neither one of bm25, hybrid, .* nor a folder"), ("", "folder"), ("./nowhere", "folder"),
    ("/etc/hostname", "folder"), ("nobody/nothing", "not in the local Hugging Face cache"), ("hybrid", "an encoder"),
    ("random:x", "seed"), ("hybrid:./nowhere", "folder"), ("library", "library:FOLDER"),
    ("library:./nowhere", "no folder"), ("library:nobody/nothing", "not in the local Hugging Face cache"),
    ("llm-embedder", "llm-embedder:FOLDER"), ("llm-embedder:./nowhere", "folder"),
])
def test_unknown_scorer_is_refused(name: str, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        load_scorer(name)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ScorerError, match="no option stemmer; it has stem, stopwords"):
        load_scorer("bm25", stemmer="english")


@settings(deadline=None)
@given(scores=st.lists(st.floats(width=32), max_size=8))
def test_finite_scores_puts_nan_lowest(scores: list[float]) -> None:
    finite = [score for score in scores if np.isfinite(score)]
    if len(finite) == len(scores):
        result = finite_scores(scores, "test")
    else:
        with pytest.warns(UserWarning, match="not finite"):
            result = finite_scores(scores, "test")
    lowest = min(finite, default=0.0)
    assert result.tolist() == [score if np.isfinite(score) else lowest for score in scores]


# bm25.

def test_bm25_finds_the_chunk_that_shares_words() -> None:
    assert load_scorer("bm25").score(CHUNKS, "When did the bridge open?").argmax() == BRIDGE


def test_bm25_stems_unless_told_not_to() -> None:
    assert load_scorer("bm25").score(CHUNKS, "designers")[BRIDGE] > 0
    assert not load_scorer("bm25", stem=None).score(CHUNKS, "designers").any()


def test_bm25_ignores_stop_words_unless_told_not_to() -> None:
    assert not load_scorer("bm25").score(CHUNKS, "the of and").any()
    assert load_scorer("bm25", stopwords=None).score(CHUNKS, "the of and").any()


def test_bm25_matches_single_digits_and_unspaced_scripts() -> None:
    scores = load_scorer("bm25").score(["phase 1 began", "phase 2 began", *CHUNKS], "phase 2")
    assert scores.argmax() == 1
    assert load_scorer("bm25").score(CHUNKS, "東京はどこですか").argmax() == TOKYO


@pytest.mark.parametrize(("chunks", "query"), [(CHUNKS, "zebra"), (CHUNKS, ""), (["", " "], "word"), ([], "word")])
def test_bm25_without_common_words_is_all_zero(chunks: list[str], query: str) -> None:
    assert load_scorer("bm25").score(chunks, query).tolist() == [0.0] * len(chunks)


@pytest.mark.parametrize("options", [{"stem": "klingon"}, {"stopwords": "klingon"}])
def test_bm25_refuses_unknown_languages(options: dict[str, str]) -> None:
    with pytest.raises(ScorerError, match=r"bm25 has no stemmer|bm25 has no stop words"):
        load_scorer("bm25", **options)


# Encoders.

def test_encoder_finds_a_paraphrase(encoder: Scorer) -> None:
    assert encoder.score(CHUNKS, "What do large marine mammals eat?").argmax() == WHALES


@pytest.mark.parametrize("name", ["encoder", "library"])
def test_encoder_query_longer_than_its_window_keeps_its_end(name: str, request: pytest.FixtureRequest) -> None:
    encoder: Scorer = request.getfixturevalue(name)
    noise = "the weather report says rain and wind over the northern hills today " * 60
    question = "who was the architect of the bridge?"
    assert encoder.score(CHUNKS, noise + question).argmax() == BRIDGE
    assert (encoder.score(CHUNKS, question + noise) == encoder.score(CHUNKS, noise)).all()
    # and chunks keep their beginning
    assert encoder.score([question + noise, noise + question], question).argmax() == 0


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(max_size=40) | st.sampled_from([*CHUNKS, " a  b\n", "long words " * 300]), min_size=1,
                      max_size=9), queries=st.booleans(), batch=st.sampled_from([1, 3, 64]))
def test_tokenizing_directly_changes_no_embedding(library: LibraryScorer, texts: list[str], queries: bool,
                                                  batch: int) -> None:
    quick = library._by
    assert isinstance(quick, _Quick)
    found, expected = _Quick(quick._model, batch)(texts, queries), _Library(quick._model, 64)(texts, queries)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_encoder_of_another_kind_goes_through_the_librarys_own_encode() -> None:
    prompted = LibraryScorer(str(minilm()), device="cpu")._by._model
    assert _Quick.takes(prompted)
    prompted.prompts = {"query": "query: ", "document": ""}
    assert not _Quick.takes(prompted)
    assert not _Quick.takes(SimpleNamespace(tokenizer=None))


def test_both_ways_to_run_an_encoder_agree_and_are_named(encoder: Scorer, library: LibraryScorer) -> None:
    query = "What do large marine mammals eat?"
    assert encoder.score(CHUNKS, query) == pytest.approx(library.score(CHUNKS, query), abs=1e-3)
    assert encoder.name.startswith(f"{minilm()} [") and library.name == f"library:{minilm()}"


def stubbed(query: list[float], chunks: list[list[float]], **options: Any) -> Scorer:
    """An encoder that gives the query and chunk number i these embeddings."""
    return EmbeddingScorer("stub", lambda texts, queries: np.array([query] if queries else chunks, np.float32),
                           **options)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("broken", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_zero_or_nan_embedding_scores_lowest_with_a_warning(broken: list[float], similarity: str) -> None:
    scorer = stubbed([1.0, 0.0], [[1.0, 0.0], broken, [-1.0, 1.0]], similarity=similarity)
    with pytest.warns(UserWarning, match="1 of 3 scores"):
        scores = scorer.score(["a", "b", "c"], "q")
    assert scores[1] == scores[2] == scores.min() < scores[0]


def test_broken_query_embedding_makes_all_scores_equal() -> None:
    scorer = stubbed([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.warns(UserWarning, match="2 of 2 scores"):
        assert scorer.score(["a", "b"], "q").tolist() == [0.0, 0.0]


def test_cosine_ignores_length_and_dot_does_not() -> None:
    query, chunks = [1.0, 0.0], [[1.0, 0.0], [3.0, 4.0]]
    assert stubbed(query, chunks).score(["a", "b"], "q") == pytest.approx([1.0, 0.6])
    assert stubbed(query, chunks, similarity="dot").score(["a", "b"], "q").tolist() == [1.0, 3.0]


def test_embeddings_of_another_number_or_size_are_refused() -> None:
    for chunks in ([[1.0, 0.0]], [[1.0], [2.0]]):
        with pytest.raises(ScorerError, match=r"have shape .*; expected \(2, 2\)"):
            stubbed([1.0, 0.0], chunks).score(["a", "b"], "q")


def test_no_thread_goes_on_when_the_scores_are_there() -> None:
    """BLAS's threads spin behind a product of this size, on cores that the tokenizer and the prefill want."""
    script = (
        "import time\n"
        "import numpy as np\n"
        "from cocktail.scorers.embeddings import EmbeddingScorer\n"
        "embeddings = np.random.default_rng(0).standard_normal((1025, 768), np.float32)\n"
        "scorer = EmbeddingScorer('fixed', lambda texts, queries: embeddings[1024 * queries :][: len(texts)])\n"
        "np.ones((1024, 768)) @ np.ones(768)  # the threads are there\n"
        "time.sleep(0.5)\n"
        "begin = time.process_time() - time.thread_time()\n"
        "scorer.score([''] * 1024, '')\n"
        "time.sleep(0.1)\n"
        "print(time.process_time() - time.thread_time() - begin)\n")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.01, "seconds of other threads"


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_damaged_folder_is_a_scorer_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    for name in (str(tmp_path), f"library:{tmp_path}"):
        with pytest.raises(ScorerError, match="cannot load encoder"):
            load_scorer(name)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "sentence_transformers":
            raise ImportError("no such module")
        return real(name, package)

    monkeypatch.setattr("cocktail.scorers.library.import_module", without)
    with pytest.raises(ScorerError, match=r"pip install 'cocktail-kv\[encoders\]'"):
        load_scorer(f"library:{minilm()}")


# hybrid, random, none.

def test_hybrid_finds_words_and_paraphrase(hybrid: Scorer) -> None:
    assert hybrid.score(CHUNKS, "When did the bridge open?").argmax() == BRIDGE
    assert hybrid.score(CHUNKS, "What do large marine mammals eat?").argmax() == WHALES


def test_hybrid_is_the_encoder_alone_where_no_word_matches(encoder: Scorer, hybrid: Scorer) -> None:
    query = "architect"
    assert hybrid.score(CHUNKS, query) == pytest.approx(z_scores(encoder.score(CHUNKS, query)))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=20).map(lambda x: np.array(x, np.float32)))
def test_z_scores_keep_the_order_and_constant_scores_give_zeros(scores: np.ndarray) -> None:
    z = z_scores(scores)
    if scores.size == 0 or (scores == scores[0]).all():
        assert z.tolist() == [0.0] * scores.size
    else:
        assert (np.diff(z[np.argsort(scores, kind="stable")]) >= 0).all()
        assert abs(z.mean()) < 1e-3 and z.std() == pytest.approx(1, abs=1e-3)


def test_random_depends_on_the_seed_only() -> None:
    assert (load_scorer("random", seed=3).score(CHUNKS, "a") == load_scorer("random:3").score(CHUNKS, "b")).all()
    assert (load_scorer("random", seed=4).score(CHUNKS, "a") != load_scorer("random:3").score(CHUNKS, "a")).any()


def test_none_is_all_equal() -> None:
    assert load_scorer("none").score(CHUNKS, "whales").tolist() == [0.0] * len(CHUNKS)


# Chunks.

class Bytes:
    """A tokenizer whose ids are UTF-8 bytes."""

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


@settings(deadline=None)
@given(text=st.text(max_size=80), size=st.sampled_from([8, 16]))
def test_chunks_cover_the_context(text: str, size: int) -> None:
    ids = text.encode()
    chunks, texts, remainder = cut(Bytes(), ids, size)
    assert len(chunks) == len(texts) == len(ids) // size and remainder == len(ids) % size
    assert b"".join(map(bytes, chunks)) + ids[len(ids) - remainder:] == ids


def test_characters_split_at_a_border_are_stripped() -> None:
    _, texts, _ = cut(Bytes(), "abcdefg€hijklmno".encode() + b"x" * 6, 8)
    assert texts == ["abcdefg", "hijklm", "noxxxxxx"]


@pytest.mark.parametrize("size", [0, 12, 264, -8])
def test_impossible_chunk_size_is_refused(size: int) -> None:
    with pytest.raises(PlanError, match="multiple of 8"):
        cut(Bytes(), b"text", size)


def test_bm25_wakes_no_jax(tmp_path):
    """bm25s would import it where it is installed, and JAX takes most of a GPU's memory when it is imported."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("print('awake')")
    (tmp_path / "jax/lax.py").write_text("def top_k(values, n): return None")
    script = ("from cocktail.scorers import load_scorer\nload_scorer('bm25').score(['a ship', 'b'], 'ship')\n"
              "print('scored')\nimport jax")
    paths = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    run = subprocess.run([sys.executable, "-c", script], env=os.environ | paths, capture_output=True, text=True,
                         check=True)
    assert run.stdout.split() == ["scored", "awake"]
