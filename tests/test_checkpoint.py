"""Checkpoints: every way to store a model loads to the same bytes, which are views of the file."""

from __future__ import annotations

import base64
import gc
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from checkpoint_files import (
    ITEM,
    Stored,
    assert_holds,
    load,
    loaded,
    tiny_config,
    tiny_tensors,
    values,
    write,
    write_folder,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint import Checkpoint, SafetensorsFile
from runtime.errors import CheckpointError


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied, attention_bias, mlp_bias", [(False, False, False), (True, True, False),
                                                            (False, True, True)])
@pytest.mark.parametrize("shards", [1, 3])
def test_loads_what_is_stored(tmp_path: Path, dtype: str, tied: bool, attention_bias: bool, mlp_bias: bool,
                              shards: int) -> None:
    config = tiny_config(tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias)
    tensors = tiny_tensors(config, dtype)
    path = write_folder(tmp_path, config, tensors, shards)
    for way in (path, path.parent, str(path.parent)):
        weights = load(way)  # type: ignore[arg-type]
        assert_holds(weights, tensors)
        assert (weights.head is weights.embed) == tied
        assert weights.nbytes == sum(len(data) if len(shape) == 2 else 4 * shape[0]
                                     for _, shape, data in tensors.values())


@pytest.mark.parametrize("architecture, changes, torch_dtype", [
    ("Llama", {"attention_bias": True, "mlp_bias": True}, "float32"),
    ("Llama", {"tie_word_embeddings": True}, "bfloat16"),
    ("Mistral", {"head_dim": 32}, "float16")])
def test_loads_what_transformers_saves(tmp_path: Path, architecture: str, changes: dict[str, Any],
                                       torch_dtype: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = getattr(transformers, architecture + "Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **changes)
    model = getattr(transformers, architecture + "ForCausalLM")(config).to(getattr(torch, torch_dtype))
    for folder, size in (("one", "5GB"), ("shards", "20KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=size)
        found = loaded(load(tmp_path / folder))
        state = model.state_dict()
        assert {name for name, array in found.items() if array is not None} == set(state)
        for name, tensor in state.items():
            array = found[name]
            assert array is not None
            expected = tensor.float() if array.dtype == np.float32 else tensor
            assert bytes(expected.contiguous().view(torch.uint8).numpy()) == array.tobytes(), name
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_self_describing_file_is_complete(tmp_path: Path) -> None:
    config, model = tiny_config(), bytes(range(256))
    carried = {"config.json": json.dumps(config), "tokenizer.json": '{"é": 1}', "format": "pt",
               "tokenizer.model": base64.b64encode(model).decode(),
               "generation_config.json": '{"eos_token_id": [3, 4], "temperature": 0.5}'}
    path = write(tmp_path / "m.safetensors", tiny_tensors(config), carried)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # another model's: not to be mixed in
    (tmp_path / "tokenizer.json").write_text("{}")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.config.eos_ids == (2, 3, 4)
        assert checkpoint.config.generation == {"temperature": 0.5}
        assert checkpoint.file("tokenizer.json") == '{"é": 1}'.encode()
        assert checkpoint.file("tokenizer.model") == model
        assert checkpoint.file("tokenizer_config.json") is None
        with pytest.raises(ValueError):
            checkpoint.file("../secret")
    assert_holds(load(tmp_path), tiny_tensors(config))


def test_files_beside_are_used_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", tiny_tensors(tiny_config()), {"format": "pt", "tokenizer.json": "in file"})
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "tokenizer.json").write_text("beside")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.file("tokenizer.json") == b"beside"
        assert checkpoint.file("chat_template.jinja") is None


@pytest.mark.parametrize("key, text", [("tokenizer.model", "not base64!"), ("tokenizer.json", "\ud800")])
def test_damaged_metadata(tmp_path: Path, key: str, text: str) -> None:
    carried = {"config.json": json.dumps(tiny_config()), key: text}
    path = write(tmp_path / "m.safetensors", tiny_tensors(tiny_config()), carried)
    with Checkpoint.open(path) as checkpoint, pytest.raises(CheckpointError, match=key):
        checkpoint.file(key)


# the mapping ----------------------------------------------------------------------------------------------------

def test_tensors_are_views_that_outlive_the_checkpoint(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = tiny_tensors(config, "BF16")
    path = write_folder(tmp_path, config, tensors)
    checkpoint = Checkpoint.open(path)
    held = {name: checkpoint.read(name, shape).data for name, (_, shape, _) in tensors.items()}
    for array in held.values():
        assert not array.flags.writeable and array.flags.aligned
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)  # no copy
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("lm_head.weight", (32, 16))
    del checkpoint
    gc.collect()
    path.unlink()
    assert {name: array.tobytes() for name, array in held.items()} == {name: t[2] for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_misaligned_tensor_alone_is_copied(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    tensors: Stored = {"a": (dtype, (4, 3), values(rng, dtype, (4, 3))), "odd": ("U8", (1,), b"\1"),
                       "b": (dtype, (4, 3), values(rng, dtype, (4, 3)))}
    file = SafetensorsFile(write(tmp_path / "m.safetensors", tensors))
    for name in "ab":
        data = file.tensor(name).data
        assert data.flags.aligned and not data.flags.writeable and data.tobytes() == tensors[name][2]
    assert file.tensor("a").data.base is not None and file.tensor("b").data.flags.owndata


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(ITEM)), st.lists(st.integers(0, 5), max_size=4)), max_size=6),
       st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3), st.integers(1, 9), st.randoms())
def test_header_agrees_with_the_safetensors_library(tmp_path_factory: Any, kinds: list[tuple[str, list[int]]],
                                                    metadata: dict[str, str], align: int, random: Any) -> None:
    tensors: Stored = {f"t{i}é": (dtype, tuple(shape), random.randbytes(int(np.prod(shape, dtype=int)) * ITEM[dtype]))
                       for i, (dtype, shape) in enumerate(kinds)}
    path = write(tmp_path_factory.mktemp("h") / "m.safetensors", tensors, metadata, align)
    file = SafetensorsFile(path)
    assert file.metadata == metadata
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert set(theirs) == set(file.entries)
    for name, entry in file.entries.items():
        assert (entry.dtype, list(entry.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert file.raw(name).tobytes() == bytes(theirs[name]["data"])
        if entry.dtype in ("F32", "F16", "BF16"):
            assert file.tensor(name).data.tobytes() == bytes(theirs[name]["data"])
        else:
            with pytest.raises(CheckpointError, match=entry.dtype):
                file.tensor(name)
