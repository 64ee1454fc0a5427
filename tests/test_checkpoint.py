"""Checkpoints: every way to store a model loads to the same bytes; whatever is wrong is said by a CheckpointError."""

from __future__ import annotations

import base64
import gc
import json
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint import Checkpoint, SafetensorsFile
from runtime.errors import CheckpointError
from runtime.weights import Weights, load_weights

ITEM = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, bytes


class HostBackend:
    """The two methods that load_weights calls; matrices are kept as given, as the CPU does."""

    def matrix(self, data: np.ndarray, dtype: str) -> np.ndarray:
        assert data.dtype == {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype]
        return data

    def vector(self, data: np.ndarray, dtype: str) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else data.astype(np.float32)


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 1, "eos_token_id": [2, 3],
    } | changes


def tiny_tensors(config: dict[str, Any], dtype: str = "F32", seed: int = 0) -> Stored:
    """Random finite tensors for the config, as transformers names and shapes them."""
    E, mlp, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], E),
                                          "model.norm.weight": (E,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], E)
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        shapes |= {base + "input_layernorm.weight": (E,), base + "post_attention_layernorm.weight": (E,)}
        for name, rows, columns in (("self_attn.q", H * D, E), ("self_attn.k", G * D, E), ("self_attn.v", G * D, E),
                                    ("self_attn.o", E, H * D), ("mlp.gate", mlp, E), ("mlp.up", mlp, E),
                                    ("mlp.down", E, mlp)):
            shapes[f"{base}{name}_proj.weight"] = (rows, columns)
            if config["mlp_bias" if "mlp" in name else "attention_bias"]:
                shapes[f"{base}{name}_proj.bias"] = (rows,)
    rng = np.random.default_rng(seed)
    return {name: (dtype, shape, values(rng, dtype, shape)) for name, shape in shapes.items()}


def values(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> bytes:
    x = rng.standard_normal(shape).astype(np.float32)
    return {"F32": x, "F16": x.astype(np.float16), "BF16": (x.view(np.uint32) >> 16).astype(np.uint16)}[dtype].tobytes()


def pack(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header_and_data(tensors: Stored, metadata: dict[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header, b"".join(data for _, _, data in tensors.values())


def write(path: Path, tensors: Stored, metadata: dict[str, str] | None = None, align: int = 8) -> Path:
    header, data = header_and_data(tensors, metadata)
    text = json.dumps(header).encode()
    path.write_bytes(pack(text + b" " * (-len(text) % align), data))
    return path


def write_folder(folder: Path, config: dict[str, Any], tensors: Stored, shards: int = 1) -> Path:
    """A Hugging Face folder. Returns the path of the file to open."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        return write(folder / "model.safetensors", tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def load(path: Path) -> Weights:
    with Checkpoint.open(path) as checkpoint:
        return load_weights(checkpoint, HostBackend())  # type: ignore[arg-type]


def loaded(weights: Weights) -> dict[str, np.ndarray | None]:
    """Weights by the names transformers gives them, written out independently of runtime.weights."""
    found: dict[str, np.ndarray | None] = {"model.embed_tokens.weight": weights.embed, "lm_head.weight": weights.head,
                                           "model.norm.weight": weights.norm}
    for index, layer in enumerate(weights.layers):
        base = f"model.layers.{index}."
        found |= {base + "input_layernorm.weight": layer.attn_norm, base + "self_attn.q_proj.weight": layer.wq,
                  base + "self_attn.k_proj.weight": layer.wk, base + "self_attn.v_proj.weight": layer.wv,
                  base + "self_attn.o_proj.weight": layer.wo, base + "self_attn.q_proj.bias": layer.bq,
                  base + "self_attn.k_proj.bias": layer.bk, base + "self_attn.v_proj.bias": layer.bv,
                  base + "self_attn.o_proj.bias": layer.bo, base + "post_attention_layernorm.weight": layer.mlp_norm,
                  base + "mlp.gate_proj.weight": layer.gate, base + "mlp.up_proj.weight": layer.up,
                  base + "mlp.down_proj.weight": layer.down, base + "mlp.gate_proj.bias": layer.gate_bias,
                  base + "mlp.up_proj.bias": layer.up_bias, base + "mlp.down_proj.bias": layer.down_bias}
    return found


def assert_holds(weights: Weights, tensors: Stored) -> None:
    """Every loaded array equals the stored bytes, and nothing is loaded that was not stored (a tied head apart)."""
    found = loaded(weights)
    for name, array in found.items():
        if array is None:
            assert name not in tensors
            continue
        dtype, shape, data = tensors.get(name) or tensors["model.embed_tokens.weight"]
        assert array.shape == shape, name
        if array.ndim == 1:  # a float32 vector
            view = np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
            data = HostBackend().vector(view, dtype).tobytes()
        assert array.tobytes() == data, name


# every way to store a model -------------------------------------------------------------------------------------

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


# what is wrong is said ------------------------------------------------------------------------------------------

def refused(path: Path | str, *words: str) -> None:
    """Opening and loading fails with all the words in the message."""
    with pytest.raises(CheckpointError) as info:
        load(path)  # type: ignore[arg-type]
    str(info.value).encode()  # printable
    for word in words:
        assert re.search(word, str(info.value)), f"{word!r} is not in {info.value}"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing", r"\[32, 16\]"]),
    (lambda t: t.update({"extra.weight": ("F32", (1,), bytes(4))}), ["1 of 22", "extra.weight"]),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": ("F32", (32,), bytes(128))}), ["q_proj.bias"]),
    (lambda t: t.update({"model.norm.weight": ("F32", (17,), bytes(68))}), [r"expected shape \[16\]", r"got \[17\]"]),
    (lambda t: t.update({"model.norm.weight": ("I64", (16,), bytes(128))}), ["expected F32 or F16 or BF16", "I64"]),
])
def test_a_tensor_that_does_not_fit(tmp_path: Path, change: Any, words: list[str]) -> None:
    tensors = tiny_tensors(tiny_config())
    change(tensors)
    refused(write_folder(tmp_path, tiny_config(), tensors), *words)


def test_harmless_left_overs(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = tiny_tensors(config)
    extra: Stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("I64", (4,), bytes(32)),
                     "lm_head.weight": ("F32", (32, 16), bytes(2048))}
    weights = load(write_folder(tmp_path, config, tensors | extra))
    assert_holds(weights, tensors)
    assert weights.head is weights.embed


def test_mapping_dtype_can_be_narrowed(tmp_path: Path) -> None:
    with Checkpoint.open(write_folder(tmp_path, tiny_config(), tiny_tensors(tiny_config()))) as checkpoint:
        assert checkpoint.names() == sorted(tiny_tensors(tiny_config()))
        with pytest.raises(CheckpointError, match="expected BF16, got F32"):
            checkpoint.read("model.norm.weight", (16,), ("BF16",))


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("content, words", [
    (b"", ["at least 8 bytes", "got 0"]),
    (b"1234567", ["got 7"]),
    (struct.pack("<Q", 1 << 63) + b"{}", ["truncated"]),
    (struct.pack("<Q", 0), ["not a safetensors"]),
    (pack(b" {}", b""), ["begins with"]),
    (pack(b"{}", b"x"), ["describes 0 bytes", "holds 1"]),
    (pack(b'{"a": 1}', b""), ["'a'", "dtype"]),
    (pack(b'{"a\xff": 1}', b""), ["JSON"]),
    (pack(b'{"a": 1, "a": 1}', b""), ["'a' appears twice"]),
    (pack(b'{"a":' + b"[" * 200_000, b""), ["nested too deep|JSON"]),
    (pack(b'{"a": ' + b"9" * 5000 + b"}", b""), ["JSON"]),
    (pack(b'{"__metadata__": {"a": 1}}', b""), ["__metadata__"]),
    (pack(b'{"__metadata__": []}', b""), ["__metadata__"]),
    ({"a": entry("F99", [1], 0, 4)}, ["F99"]),
    ({"a": entry("F32", [1], 0, 8)}, ["takes 4 bytes", "hold 8"]),
    ({"a": entry("F32", [-1], 0, 4)}, ["shape"]),
    ({"a": entry("F32", [True], 0, 4)}, ["shape"]),
    ({"a": entry("F32", [1.0], 0, 4)}, ["shape"]),  # type: ignore[list-item]
    ({"a": entry("F32", [0, 1 << 61], 0, 0)}, ["shape"]),
    ({"a": entry("F32", [1 << 61, 1 << 61], 0, 4)}, ["shape"]),
    ({"a": entry("F32", [1] * 9, 0, 4)}, ["shape"]),
    ({"a": entry("F32", [10**4000], 0, 4)}, ["shape"]),
    ({"a": entry("F32", [1], 4, 0)}, ["data_offsets"]),
    ({"a": entry("F4", [3], 0, 1)}, ["takes 1 bytes|F4"]),
    ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, ["'b'", "begin at 8", "got 4"]),
    ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, ["'b'", "begin at 4", "got 8"]),
    ({"a": entry("F32", [4], 0, 16)}, ["truncated", "16", "12"]),
    ({"a": entry("F32", [2], 0, 8)}, ["damaged", "8", "12"]),
])
def test_damaged_header(tmp_path: Path, content: Any, words: list[str]) -> None:
    if isinstance(content, dict):
        content = pack(json.dumps(content).encode(), bytes(12))
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    refused(path, "m.safetensors", *words)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/../../secret.safetensors",
                                  "link.safetensors", "..", "", "a\0.safetensors", "\ud800.safetensors", "config.json",
                                  "..\\secret.safetensors", "x" * 300 + ".safetensors", 7, None, ["a"]])
def test_an_index_cannot_lead_outside_its_folder(tmp_path: Path, name: Any) -> None:
    tensors = tiny_tensors(tiny_config())
    write(tmp_path / "secret.safetensors", tensors)
    folder = tmp_path / "model"
    index = write_folder(folder, tiny_config(), tensors, shards=2)
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    refused(index, "File name too long" if len(str(name)) > 255 else "index.json.*(expected|leads outside)")


def test_the_hugging_face_cache_is_such_a_folder(tmp_path: Path) -> None:
    """Its snapshots are folders of links into the repository's blobs: the one way out of a folder that is allowed."""
    tensors = tiny_tensors(tiny_config())
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    write_folder(snapshot, tiny_config(), tensors, shards=2)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert_holds(load(snapshot), tensors)
    other = tmp_path / "models--y" / "blobs"
    other.parent.mkdir()
    blobs.rename(other)
    for file in snapshot.iterdir():
        target = other / file.readlink().name
        file.unlink()
        file.symlink_to(target)
    refused(snapshot, "leads outside")


def test_an_index_and_its_shards_agree(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    index = write_folder(tmp_path, tiny_config(), tensors, shards=2)
    good = json.loads(index.read_text())
    first, second = sorted(set(good["weight_map"].values()))
    moved = next(name for name, file in good["weight_map"].items() if file == first)
    for change, words in (({moved: second}, ["is not in", second]), ({"ghost": first}, ["ghost", "is not in"]),
                          ({moved: "gone.safetensors"}, ["gone.safetensors", "no such file"])):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        refused(index, *words)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in good["weight_map"].items() if k != moved}}))
    refused(index, re.escape(moved), "does not name")
    for broken in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": []}', "{", ""):
        index.write_text(broken)
        refused(index, "index.json")


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "no such file")
    refused(tmp_path, "found none", "converters")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "a.gguf", "converters")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "pipe or device")
    (tmp_path / "pipe.safetensors").unlink()
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", tiny_tensors(tiny_config()))
    refused(tmp_path, "a.safetensors, b.safetensors", "name the file")
    refused("a\0b", "cannot be read")
    refused("x" * 5000, "cannot be read")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "loop")
    (tmp_path / "d" / "model.safetensors").mkdir(parents=True)
    refused(tmp_path / "d", "got a folder")
    (tmp_path / "e" / "config.json").mkdir(parents=True)
    write(tmp_path / "e" / "model.safetensors", tiny_tensors(tiny_config()))
    refused(tmp_path / "e", "config.json", "got a folder")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because tests may run as root, whom no permission bit stops."""
    path = write_folder(tmp_path, tiny_config(), tiny_tensors(tiny_config()))
    for method in ("open", "stat", "exists"):
        with monkeypatch.context() as patch:
            def deny(self: Path, *args: Any, **kwargs: Any) -> None:
                raise PermissionError(13, "Permission denied", str(self))
            patch.setattr(Path, method, deny)
            refused(path, "Permission denied")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "\ufeff{}", "9" * 5000, "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_damaged_config_files(tmp_path: Path, file: str, text: str) -> None:
    path = write_folder(tmp_path, tiny_config(), tiny_tensors(tiny_config()))
    (tmp_path / file).write_text(text)
    refused(path, re.escape(file))


def test_digest_names_the_checkpoint(tmp_path: Path) -> None:
    def digest(name: str, config: dict[str, Any], seed: int, shards: int = 1) -> str:
        path = write_folder(tmp_path / name, config, tiny_tensors(config, seed=seed), shards)
        return Checkpoint.open(path).digest

    base = digest("a", tiny_config(), 0)
    assert re.fullmatch("[0-9a-f]{16}", base)
    assert digest("moved", tiny_config(), 0) == base
    others = [digest("weights", tiny_config(), 1), digest("config", tiny_config(rope_theta=1e6), 0),
              digest("shards", tiny_config(), 0, shards=2)]
    assert len({base, *others}) == 4
