"""Encoders as scorers: folders against sentence-transformers, what a folder says of its texts, threads, damage."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_files import hidden_rows, minilm, save_bert, with_modules, with_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cocktail.scorers import load_scorer
from cocktail.scorers.encoder import EncoderScorer
from cocktail.scorers.folder import EncoderFolder
from cocktail.scorers.llm_embedder import PASSAGE_PREFIX, QUERY_PREFIX
from converters import __main__ as converters
from kernels_c import available_isas
from runtime.encoder import _batches
from runtime.errors import ScorerError

TEXTS = ["The old mill stands by the river and grinds flour.", "Ana Torres designed the bridge; it opened in 1903.", "",
         "!!!", "日本の首都は東京です", " a  b\n", "long words " * 300, "naïve CAFÉ"]


@pytest.fixture(scope="module")
def own() -> EncoderScorer:
    return EncoderScorer(str(minilm()), device="cpu")


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm()), device="cpu")


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(max_size=40) | st.sampled_from(TEXTS), min_size=1, max_size=9), queries=st.booleans())
@example(texts=TEXTS, queries=False)
@example(texts=TEXTS, queries=True)
def test_minilm_equals_sentence_transformers(own: EncoderScorer, library: Any, texts: list[str],
                                             queries: bool) -> None:
    """Texts longer than its 256 ids among them: passages lose their end, queries their beginning."""
    library.tokenizer.truncation_side = "left" if queries else "right"
    encode = library.encode_query if queries else library.encode_document
    np.testing.assert_allclose(own.embed(texts, queries), encode(texts), atol=2e-6)  # 1e-3 is asked for


@pytest.mark.parametrize("pooling", [{"pooling_mode": "cls"}, {"pooling_mode": "mean"},
                                     {"pooling_mode_cls_token": True},
                                     {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}])
@pytest.mark.parametrize("normalize", [True, False])
def test_folders_equal_sentence_transformers(tmp_path: Path, pooling: dict[str, Any], normalize: bool) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    save_bert(tmp_path, vocab_size=30522)
    prompts = {"query": "Ask this: ", "document": "The text: "}
    with_modules(with_tokenizer(tmp_path, max_seq_length=24), pooling, normalize, prompts)
    library = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    own = EncoderScorer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(own.embed(TEXTS), library.encode_document(TEXTS), atol=2e-5)
    short = [text for text in TEXTS if len(text) < 60]
    np.testing.assert_allclose(own.embed(short, True), library.encode_query(short), atol=2e-5)


def test_an_overlong_query_keeps_the_prefix_and_its_end(tmp_path: Path) -> None:
    save_bert(tmp_path, vocab_size=30522)
    with_tokenizer(tmp_path, max_seq_length=16)
    scorer = EncoderScorer(str(tmp_path), device="cpu", query_prefix="query: ")
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    (ids,) = scorer._folder.queries([question])
    kept = scorer._folder.tokenizer.decode(ids, skip_special_tokens=False)
    assert kept == "[CLS] query : three four five six seven eight nine ten eleven twelve thirteen fourteen [SEP]"
    assert len(ids) <= 16


def test_a_long_prefix_leaves_half_of_the_window_to_the_query(tmp_path: Path) -> None:
    folder = EncoderFolder.open(with_tokenizer(tmp_path, max_seq_length=16))
    folder = replace(folder, query_prefix="one two three four five six seven eight nine ten eleven twelve thirteen: ")
    (ids,) = folder.queries(["what did the miller say about the river last summer"])
    kept = folder.tokenizer.decode(ids, skip_special_tokens=False)
    assert kept == "[CLS] one two three four five six seven miller say about the river last summer [SEP]"
    assert len(ids) == 16


@pytest.mark.parametrize("lower", [False, True])
def test_texts_are_lower_cased_where_the_folder_says_so(tmp_path: Path, lower: bool) -> None:
    with_tokenizer(tmp_path, max_seq_length=16, do_lower_case=lower)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    folder = EncoderFolder.open(tmp_path)
    mixed, plain = (list(folder.passages([text])) for text in ("A Mill", "a mill"))
    assert (mixed == plain) == lower
    assert list(folder.queries(["A Mill"])) == mixed


@given(lengths=st.lists(st.integers(1, 30), max_size=20), rows=st.integers(1, 40))
def test_batches_have_at_most_so_many_rows(lengths: list[int], rows: int) -> None:
    """In order and complete; a sequence longer than that is alone; none is cut off early."""
    sequences = [[i] * length for i, length in enumerate(lengths)]
    batches = list(_batches(sequences, rows))
    assert [row for batch in batches for row in batch] == sequences
    for batch in batches:
        assert len(batch) == 1 or sum(map(len, batch)) <= rows
    for batch, behind in pairwise(batches):
        assert sum(map(len, batch)) + len(behind[0]) > rows


def test_passages_take_the_prompt_of_either_name(tmp_path: Path) -> None:
    """sentence-transformers' own documents say so; its defaults hide "passage" behind an empty "document"."""
    save_bert(tmp_path, vocab_size=30522)
    with_modules(with_tokenizer(tmp_path), {"pooling_mode": "mean"}, prompts={"passage": "passage: "})
    (ids,) = EncoderScorer(str(tmp_path), device="cpu")._folder.passages(["a mill"])
    assert EncoderScorer(str(tmp_path))._folder.tokenizer.decode(ids) == "passage : a mill"


def test_plain_folder_is_mean_pooled_and_not_normalized(tmp_path: Path) -> None:
    """As Contriever's: config, weights and tokenizer, no modules.json."""
    model = save_bert(tmp_path, vocab_size=30522)
    scorer = EncoderScorer(str(with_tokenizer(tmp_path)), device="cpu")
    ids = next(scorer._folder.passages(TEXTS[:1]))
    np.testing.assert_allclose(scorer.embed(TEXTS[:1])[0], hidden_rows(model, ids).mean(0), atol=1e-5)


def test_llm_embedder_has_its_instructions_and_the_first_token(tmp_path: Path) -> None:
    model = save_bert(tmp_path, vocab_size=30522)
    with_tokenizer(tmp_path)
    scorer: Any = load_scorer(f"llm-embedder:{tmp_path}", device="cpu")
    assert scorer.name == f"llm-embedder:{tmp_path} [{available_isas()[-1]}]"
    for queries, prefix in ((True, "Represent this query for retrieving relevant documents: "),
                            (False, "Represent this document for retrieval: ")):
        ids = scorer._folder.tokenizer.encode(prefix + "a mill").ids
        np.testing.assert_allclose(scorer.embed(["a mill"], queries)[0], hidden_rows(model, ids)[0], atol=1e-5)
    assert (QUERY_PREFIX[-1], PASSAGE_PREFIX[-1]) == (" ", " ")


@pytest.mark.parametrize(("pooling", "message"), [
    ({"pooling_mode": "max"}, "pooling is"), ({"pooling_mode": ["cls", "mean"]}, "pooling is"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pooling is"),
    ({"pooling_mode": "mean", "include_prompt": False}, "leaves out the prompt"),
])
def test_what_only_the_library_runs_is_refused_with_its_name(tmp_path: Path, pooling: dict[str, Any],
                                                             message: str) -> None:
    save_bert(tmp_path, vocab_size=30522)
    with_modules(with_tokenizer(tmp_path), pooling)
    with pytest.raises(ScorerError, match=rf"{message}.*sentence-transformers may run it: library:"):
        EncoderScorer(str(tmp_path), device="cpu")


def test_another_family_is_refused_with_the_librarys_name(tmp_path: Path) -> None:
    save_bert(tmp_path, vocab_size=30522)
    with_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mpnet"}))
    with pytest.raises(ScorerError, match=r"'mpnet'.*library:"):
        load_scorer(str(tmp_path))


def test_where_the_c_kernels_are_not_built_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU nothing else needs them."""
    for name in ("isa", "arrays", "threads", "encoder"):
        monkeypatch.delitem(sys.modules, f"kernels_c.{name}")
    monkeypatch.setitem(sys.modules, "kernels_c._kernels", None)
    with pytest.raises(ScorerError, match=f"C kernels are not built .* or give library:{minilm()}"):
        load_scorer(str(minilm()))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_torch_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path, head: bool, sharded: bool,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """As in Contriever's and LLM-Embedder's repositories: pytorch_model.bin, a buffer of ids and a pooler in it."""
    import torch

    save_bert(tmp_path, head=head, vocab_size=30522)
    expected = EncoderScorer(str(with_tokenizer(tmp_path))).embed(TEXTS[:3])
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    state = {name: torch.from_numpy(values) for name, values in state.items()}
    state["bert." * head + "embeddings.position_ids"] = torch.arange(40)[None]
    state["bert." * head + "pooler.dense.bias"] = torch.zeros(48)
    parts = [dict(list(state.items())[i :: 2]) for i in range(2)] if sharded else [state]
    names = [f"pytorch_model-{i}.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name)
    if sharded:
        places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ScorerError, match="torch weights only; convert them once: python -m converters torch") as error:
        EncoderScorer(str(tmp_path))
    *_, command = str(error.value).partition("python -m converters ")
    assert converters.main(command.split()) == 0
    capsys.readouterr()
    np.testing.assert_array_equal(EncoderScorer(str(tmp_path)).embed(TEXTS[:3]), expected)


def test_a_torch_file_without_an_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    save_bert(tmp_path)
    torch.save({"cls.bias": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert converters.main(["torch", str(tmp_path), str(tmp_path / "out.safetensors")]) == 2
    assert "there is no tensor embeddings.* or encoder.*" in capsys.readouterr().err


def test_threads_may_score_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages are cut to the window while queries are not, by one tokenizer: threads change between the two."""
    encode = EncoderFolder._encode
    monkeypatch.setattr(EncoderFolder, "_encode", lambda folder, texts: (time.sleep(0.002), encode(folder, texts))[1])
    save_bert(tmp_path, vocab_size=30522)
    scorer = EncoderScorer(str(with_tokenizer(tmp_path)), device="cpu")
    chunks, queries = ["the ferry leaves at nine " * n for n in range(1, 20)], ["who " * n for n in range(1, 30)]
    expected = [scorer.score(chunks, query) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: scorer.score(chunks, query), queries))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("config.json", None, "no such file"), ("config.json", "{}", "model_type"), ("config.json", "no json", "not valid"),
    ("tokenizer.json", None, "no such file"), ("tokenizer.json", "{}", "cannot be read"),
    ("model.safetensors", None, "no such file"), ("model.safetensors", "x" * 64, "safetensors"),
    ("modules.json", "{}", "pooling|Transformer"), ("modules.json", '[{"type": 1}]', "list of modules"),
    ("modules.json", '[{"type": "a.Transformer", "path": "../.."}, {"type": "a.Pooling", "path": ""}]', "outside"),
    ("sentence_bert_config.json", '{"max_seq_length": 2}', "no text fits"),
    ("config_sentence_transformers.json", '{"prompts": [1]}', "prompts"),
])
def test_damaged_folders_are_scorer_errors(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    save_bert(tmp_path, vocab_size=30522)
    with_tokenizer(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ScorerError, match=message):
        load_scorer(str(tmp_path), device="cpu")
