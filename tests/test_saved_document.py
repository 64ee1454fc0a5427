"""A document in a file: it answers as the one that was saved, and what is damaged or another's is refused."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy_backend import NumpyBackend
from safetensors import safe_open
from tiny_model import HANDBOOK

import cocktail
from runtime.checkpoint import Checkpoint
from runtime.errors import CocktailError, DocumentError
from runtime.model import Model as Engine
from runtime.weights import load_weights

TEXT = HANDBOOK[:3000]
QUESTION = "Who mended the cracked iron pan?"
ANSWER = [5, 70, 9, 301, 8]


@pytest.fixture(scope="module")
def doc(model):
    return model.read(TEXT, chunk=16, system="Be brief.")


@pytest.fixture(scope="module")
def saved(doc, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "handbook.kv"
    assert doc.save(path) == path.stat().st_size > doc.nbytes
    return path


def test_an_opened_document_is_the_saved_one(doc, saved, model):
    again = cocktail.open_document(saved, model)
    for name in ("context", "chunk", "system", "prefix_ids", "context_ids", "chunk_texts", "digest", "nbytes"):
        assert getattr(again, name) == getattr(doc, name)
    for options in ({"policy": "fp16"}, {"kv_bits": 6}, {"kv_bits": 6, "scorer": "attention"}, {"policy": "kivi"}):
        np.testing.assert_array_equal(again.logits(QUESTION, ANSWER, **options),
                                      doc.logits(QUESTION, ANSWER, **options))
    assert again.ask(QUESTION, max_tokens=3).stats.reused_tokens == len(doc.prefix_ids) + len(doc.context_ids)


def test_another_backend_opens_it(doc, saved, path):
    backend = NumpyBackend()
    with Checkpoint.open(path) as checkpoint:
        engine = Engine(checkpoint.config, load_weights(checkpoint, backend), backend)
    other = cocktail.Model(engine, doc.model.tokenizer, doc.model.template)
    again = cocktail.open_document(saved, other)
    np.testing.assert_allclose(again.logits(QUESTION, ANSWER, policy="fp16"),
                               doc.logits(QUESTION, ANSWER, policy="fp16"), atol=2e-3)
    assert again.nbytes == doc.nbytes


def test_any_tool_can_read_it(doc, saved):
    with safe_open(saved, "np") as file:
        assert set(file.keys()) == {"kv", "ids", "text", "sha256"}
        assert file.get_tensor("text").tobytes().decode() == TEXT
        assert file.get_tensor("ids").tolist() == [*doc.prefix_ids, *doc.context_ids]


def test_saving_reads_a_document_that_was_not_asked_yet(model, tmp_path):
    doc = model.read(TEXT[:300])
    doc.save(tmp_path / "a.kv")
    assert doc.nbytes
    opened = cocktail.open_document(tmp_path / "a.kv", model)
    opened.save(tmp_path / "a.kv")  # over the file that it is mapped from
    assert opened.ask(QUESTION, max_tokens=4).ids == doc.ask(QUESTION, max_tokens=4).ids
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.kv"]
    opened.close()
    assert opened.ask(QUESTION, max_tokens=4).stats.reused_tokens == 0


def regions(path):
    """Where each part of the file begins and ends."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    ends = {name: [8 + length + end for end in entry["data_offsets"]] for name, entry in header.items()
            if name != "__metadata__"}
    return {"length": (0, 8), "header": (8, 8 + length), **ends}


@pytest.mark.parametrize("region", ["length", "header", "kv", "ids", "text", "sha256"])
def test_a_flipped_bit_anywhere_is_found_before_an_answer(doc, saved, model, tmp_path, region):
    """At the latest by the question that needs it; what changes nothing that is read may pass."""
    data, (begin, end) = saved.read_bytes(), regions(saved)[region]
    rng = np.random.default_rng(0)
    expected = doc.ask(QUESTION, max_tokens=3).ids
    refused, places = 0, {begin, end - 1, *(int(at) for at in rng.integers(begin, end, 12))}
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "damaged.kv").write_bytes(damaged)
        try:
            answer = cocktail.open_document(tmp_path / "damaged.kv", model).ask(QUESTION, max_tokens=3)
        except DocumentError as error:
            assert "damaged.kv" in str(error)
            refused += 1
        else:
            assert region == "header"  # a blank that became a tab
            assert answer.ids == expected
    assert refused > len(places) / 2


@pytest.mark.parametrize("size", [0, 5, 8, 200, 5000, -1])
def test_a_file_that_was_cut_off_is_refused(saved, model, tmp_path, size):
    (tmp_path / "cut.kv").write_bytes(saved.read_bytes()[:size])
    with pytest.raises(DocumentError, match=r"cut\.kv"):
        cocktail.open_document(tmp_path / "cut.kv", model)


def test_a_damaged_layer_is_refused_by_every_question(saved, model, tmp_path):
    data = bytearray(saved.read_bytes())
    data[regions(saved)["kv"][1] - 1] ^= 1  # the last layer
    (tmp_path / "d.kv").write_bytes(data)
    doc = cocktail.open_document(tmp_path / "d.kv", model)
    for _ in range(2):
        with pytest.raises(DocumentError, match="layer 1 is damaged"):
            doc.ask(QUESTION, max_tokens=2)
    with pytest.raises(DocumentError, match="layer 1 is damaged"):
        doc.save(tmp_path / "again.kv")  # with checksums that would say that all is well
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.kv"]


def rewritten(saved, target, **changes):
    """The file with another description, its checksum mended: as another writer would have it."""
    from cocktail.saved import _checksum

    parts, data = regions(saved), saved.read_bytes()
    header = json.loads(data[slice(*parts["header"])])
    about = json.loads(header["__metadata__"]["cocktail-document"]) | changes
    said = json.dumps({name: value for name, value in about.items() if value != "absent"})
    header["__metadata__"]["cocktail-document"] = said
    text = json.dumps(header).encode()
    body = bytearray(data[parts["header"][1] :])
    ids, words = (data[slice(*parts[name])] for name in ("ids", "text"))
    at = parts["sha256"][0] - parts["header"][1]
    body[at : at + 32] = _checksum(said.encode(), ids, words).tobytes()
    target.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return target


@pytest.mark.parametrize(("changes", "message"), [
    ({"version": 2}, "version 2; expected 1"), ({"model": "0" * 16}, "another model: its digest is 0000"),
    ({"tokenizer": "0" * 16}, "another tokenizer"), ({"template": "none"}, "another chat template"),
    ({"prefix": 3}, "its ids are not those of its text"), ({"prefix": -1}, "description .* damaged"),
    ({"chunk": "32"}, "description .* damaged"), ({"chunk": "absent"}, "description .* damaged: KeyError"),
    ({"system": 5}, "description .* damaged"), ({"chunk": 33}, "chunk"),
])
def test_what_belongs_elsewhere_is_refused_by_name(saved, model, tmp_path, changes, message):
    target = rewritten(saved, tmp_path / "other.kv", **changes)
    with pytest.raises(CocktailError, match=message):
        cocktail.open_document(target, model)


def test_other_models_and_tokenizers_are_told_apart(saved, path, model, tmp_path):
    """A fine-tune of a single matrix, another base of RoPE, another template; not another cut into files."""
    from safetensors.numpy import load_file, save_file

    with safe_open(path, "np") as file:
        metadata = file.metadata()

    def variant(name, change=lambda tensors: None, **files):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, tmp_path / name, metadata=metadata | files)
        return cocktail.load(tmp_path / name, backend="cpu", threads=1)

    def tuned(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"] += np.float32(0.01)

    config = json.loads(metadata["config.json"])
    tokenizer, template = json.loads(metadata["tokenizer.json"]), json.loads(metadata["tokenizer_config.json"])
    template["chat_template"] = "{{ '' }}" + template["chat_template"]
    for other, what in (
            (variant("tuned.safetensors", tuned), "model"),
            (variant("rope.safetensors", **{"config.json": json.dumps(config | {"rope_theta": 5000.0})}), "model"),
            (variant("words.safetensors", **{"tokenizer.json": json.dumps(tokenizer, indent=1)}), "tokenizer"),
            (variant("chat.safetensors", **{"tokenizer_config.json": json.dumps(template)}), "chat template")):
        with pytest.raises(DocumentError, match=f"another {what}"):
            cocktail.open_document(saved, other)
    assert cocktail.open_document(saved, variant("same.safetensors", note="a copy")).nbytes


def test_files_that_are_no_saved_document_are_refused(path, model, tmp_path):
    with pytest.raises(DocumentError, match="no such file"):
        cocktail.open_document(tmp_path / "missing.kv", model)
    with pytest.raises(DocumentError, match="expected a file, got a folder"):
        cocktail.open_document(tmp_path, model)
    with pytest.raises(DocumentError, match="no saved document"):
        cocktail.open_document(path, model)


def test_a_failed_save_leaves_what_was_there(doc, model, tmp_path, monkeypatch):
    target = tmp_path / "a.kv"
    target.write_text("before")

    def fail(descriptor):
        raise OSError(28, os.strerror(28))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DocumentError, match=r"a\.kv: cannot be written: No space left"):
            doc.save(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.kv"]
    assert target.read_text() == "before"
    with pytest.raises(DocumentError, match=r"missing/a\.kv: cannot be written: No such file"):
        doc.save(tmp_path / "missing/a.kv")
    with pytest.raises(DocumentError, match="not kept between questions"):
        model.read(TEXT[:300], keep=False).save(target)


def test_several_threads_ask_an_opened_document(doc, saved, model, tmp_path):
    shutil.copy(saved, tmp_path / "a.kv")
    again = cocktail.open_document(tmp_path / "a.kv", model)
    questions = [f"What is said about {word}?" for word in ("ferry", "pan", "keys", "bread")]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: again.ask(query, max_tokens=5).ids, questions))
    assert found == [doc.ask(query, max_tokens=5).ids for query in questions]
