"""Checkpoints: whatever is wrong is said by a CheckpointError that names it; what does no harm is left alone."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Stored, assert_holds, load, pack, tiny_config, tiny_tensors, write, write_folder

from runtime.checkpoint import Checkpoint
from runtime.errors import CheckpointError


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
