"""Converters: the same tensors and configuration come out, whatever layout they went in with."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from model_files import CONFIG, put_tokenizer, save_meta, save_mistral, save_torch, spm, weights, write_gguf

from converters import convert, meta
from converters.__main__ import main
from converters.model import Model, Source, half_split_rows, tensor_shapes
from converters.originals import Params
from converters.writer import write
from runtime.checkpoint import Checkpoint
from runtime.config import ModelConfig
from runtime.errors import ConvertError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check(path: Path, expected: dict[str, np.ndarray], dtype: str = "F16") -> Checkpoint:
    """The file holds exactly `expected`, in the names and order the runtime reads."""
    checkpoint = Checkpoint.open(path)
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name, array.shape, (dtype,)).data, array, err_msg=name)
    checkpoint.finish()
    return checkpoint


def test_half_split_order_keeps_the_scores() -> None:
    """q.k after RoPE is the same whichever pairs are rotated, if rows follow: the property the permutation is for."""
    rng, heads, dim = np.random.default_rng(1), 3, 8
    q, k = rng.standard_normal((2, heads * dim))
    angle = rng.standard_normal(dim // 2)

    def rotate(x: np.ndarray, real: Any, imaginary: Any) -> np.ndarray:
        x, out = x.reshape(heads, dim), np.empty((heads, dim))
        turned = (x[:, real] + 1j * x[:, imaginary]) * np.exp(1j * angle)
        out[:, real], out[:, imaginary] = turned.real, turned.imag
        return out

    order = half_split_rows(heads, dim)
    pairs, halves = (slice(0, None, 2), slice(1, None, 2)), (slice(0, dim // 2), slice(dim // 2, None))
    score = (rotate(q, *pairs) * k.reshape(heads, dim)).sum(1)
    np.testing.assert_allclose((rotate(q[order], *halves) * k[order].reshape(heads, dim)).sum(1), score, rtol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_gives_back_every_tensor(tmp_path: Path, tied: bool) -> None:
    config = CONFIG | {"tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
    tensors = weights(config)
    source = write_gguf(tmp_path / "m.gguf", tensors, config)
    convert("gguf", source, tmp_path / "m.safetensors")
    c = check(tmp_path / "m.safetensors", tensors).config
    assert (c.tie_embeddings, c.attention_bias, c.mlp_bias, c.head_dim, c.n_kv_heads) == (tied, True, True, 16, 2)
    assert (c.rms_norm_eps, c.rope.theta, c.max_positions, c.eos_ids) == (1e-5, 10000.0, 512, (2,))


def _dequantizable() -> list[gguf.GGMLQuantizationType]:
    from gguf.quants import _type_traits  # what the package registers

    return sorted(_type_traits, key=lambda kind: kind.name)


@pytest.mark.parametrize("kind", _dequantizable(), ids=lambda kind: kind.name)
def test_gguf_dequantizes_every_type(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng, tensors = np.random.default_rng(2), weights(config)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = rng.integers(0, 60, (256, 256 // block * size), dtype=np.uint8)  # below 60: no NaN in any scale
    write_gguf(tmp_path / "m.gguf", tensors, config, raw={name: kind})
    convert("gguf", tmp_path / "m.gguf", tmp_path / "m.safetensors", dtype="F32")
    expected = gguf.quants.dequantize(tensors[name], kind)
    data = Checkpoint.open(tmp_path / "m.safetensors").read(name, (256, 256), ("F32",)).data
    np.testing.assert_array_equal(data, expected)
    assert np.isfinite(expected).all()
    assert expected.any()


def test_gguf_sliding_window_means_mistral(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", weights(), sliding_window=64)
    convert("gguf", tmp_path / "m.gguf", tmp_path / "m.safetensors")
    config = Checkpoint.open(tmp_path / "m.safetensors").config
    assert (config.architecture, config.sliding_window) == ("MistralForCausalLM", 64)


def test_gguf_llama3_frequencies(tmp_path: Path) -> None:
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    divisors = []
    for wavelength in 2 * np.pi / frequencies:  # Llama 3.1's rule, wavelength by wavelength
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / 8 + smooth))
    assert len(set(divisors)) > 2  # all three branches
    factors = np.array(divisors, np.float32)
    write_gguf(tmp_path / "m.gguf", {**weights(), "rope_freqs.weight": factors})
    convert("gguf", tmp_path / "m.gguf", tmp_path / "m.safetensors")
    rope = Checkpoint.open(tmp_path / "m.safetensors").config.rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("llama3", 8.0, 8192)
    factors[3] *= 1.01
    write_gguf(tmp_path / "bad.gguf", {**weights(), "rope_freqs.weight": factors})
    with pytest.raises(ConvertError, match="rope_freqs"):
        convert("gguf", tmp_path / "bad.gguf", tmp_path / "bad.safetensors")


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    for kind in (gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN):
        source = write_gguf(tmp_path / f"{kind.value}.gguf", weights(), rope_scaling_type=kind, rope_scaling_factor=4.0,
                            rope_scaling_orig_ctx_len=128)  # fmt: skip
        convert("gguf", source, tmp_path / f"{kind.value}.safetensors")
        rope = Checkpoint.open(tmp_path / f"{kind.value}.safetensors").config.rope
        assert (rope.kind, rope.factor) == (kind.value, 4.0)
    assert rope.original_max_positions == 128
    write_gguf(tmp_path / "m.gguf", weights(), rope_scaling_type=gguf.RopeScalingType.LONGROPE, rope_scaling_factor=4.0)
    with pytest.raises(ConvertError, match="longrope"):
        convert("gguf", tmp_path / "m.gguf", tmp_path / "m.safetensors")


@pytest.mark.parametrize(("keys", "message"), [
    ({"expert_count": 8}, "mixture"), ({"logit_scale": 2.0}, r"llama\.logit_scale"),
    ({"pre": "deepseek-llm"}, "deepseek-llm"),
    ({"pre": None}, "pre-tokenizer None"), ({"rope_dimension_count": 8}, r"rope\.dimension_count"),
])  # fmt: skip
def test_gguf_refuses_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", weights(), **keys)
    with pytest.raises(ConvertError, match=message):
        convert("gguf", tmp_path / "m.gguf", tmp_path / "m.safetensors")
    assert names(tmp_path) == ["m.gguf"]


def test_gguf_big_endian_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConvertError, match="big-endian"):
        convert("gguf", tmp_path / "m.gguf", tmp_path / "m.safetensors")


def test_damaged_gguf_never_gives_a_traceback(tmp_path: Path) -> None:
    header = len(write_gguf(tmp_path / "empty.gguf", {}).read_bytes())
    full = write_gguf(tmp_path / "full.gguf", weights()).read_bytes()
    rng, outcomes = random.Random(3), {"error": 0, "fine": 0}
    for i in range(120):
        data = bytearray(full)
        if i % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:  # most of the damage in keys and tensor descriptions
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(header if i % 3 == 1 else 600)] = rng.randrange(256)
        (tmp_path / "bad.gguf").write_bytes(data)
        try:
            convert("gguf", tmp_path / "bad.gguf", tmp_path / "bad.safetensors", force=True)
            outcomes["fine"] += 1
        except ConvertError as error:
            assert "\n" not in str(error).strip()
            outcomes["error"] += 1
    assert outcomes["error"] > 40, outcomes
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_mistral_gives_back_every_tensor(tmp_path: Path) -> None:
    tensors = weights()
    save_mistral(tmp_path, tensors, sliding_window=128)
    (tmp_path / "tokenizer.model").write_bytes(spm())
    convert("mistral", tmp_path, tmp_path / "m.safetensors")
    checkpoint = check(tmp_path / "m.safetensors", tensors)
    assert (checkpoint.config.sliding_window, checkpoint.config.rope.theta) == (128, 1e6)
    assert checkpoint.file("tokenizer.model") == spm()
    save_mistral(tmp_path, tensors, moe={"num_experts": 8})
    with pytest.raises(ConvertError, match="moe"):
        convert("mistral", tmp_path, tmp_path / "n.safetensors")


@pytest.mark.parametrize(("parts", "axis"), [(1, 0), (2, 0), (2, 1)])
def test_meta_joins_its_parts(tmp_path: Path, parts: int, axis: int) -> None:
    tensors = weights()
    save_meta(tmp_path, tensors, parts, embedding_axis=axis)
    put_tokenizer(tmp_path)
    convert("meta", tmp_path, tmp_path / "m.safetensors", dtype="F32")
    for name, array in tensors.items():
        expected = torch.from_numpy(array).to(torch.bfloat16).float().numpy()
        dtype, checkpoint = "F32" if array.ndim == 2 else "BF16", Checkpoint.open(tmp_path / "m.safetensors")
        data = checkpoint.read(name, array.shape, (dtype,)).data
        data = data if dtype == "F32" else (data.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(data, expected, err_msg=name)
    if parts == 2:
        (tmp_path / "consolidated.00.pth").unlink()
        with pytest.raises(ConvertError, match=r"not consolidated\.00\.pth"):
            convert("meta", tmp_path, tmp_path / "n.safetensors")


@pytest.mark.parametrize(("params", "vocab_size", "positions", "scaling"), [
    ({"dim": 4096, "norm_eps": 1e-6}, 32000, 2048, None),  # Llama 1
    ({"dim": 4096, "norm_eps": 1e-5}, 32000, 4096, None),  # 2
    ({"dim": 4096, "rope_theta": 1e6}, 32016, 16384, None),  # Code Llama
    ({"dim": 4096, "rope_theta": 5e5}, 128256, 8192, None),  # 3
    ({"dim": 4096, "rope_theta": 5e5, "use_scaled_rope": True}, 128256, 131072, 8),  # 3.1
    ({"dim": 2048, "rope_theta": 5e5, "use_scaled_rope": True}, 128256, 131072, 32),  # 3.2, 1B
    ({"dim": 3072, "rope_theta": 5e5, "use_scaled_rope": True}, 128256, 131072, 32),  # 3.2, 3B
    ({"dim": 3072, "rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 4}, 128256, 131072, 4),
])
def test_meta_knows_what_only_its_code_says(tmp_path: Path, params: dict[str, Any], vocab_size: int, positions: int,
                                            scaling: float | None) -> None:
    (tmp_path / "params.json").write_text(json.dumps({"n_heads": 32, "n_layers": 1, **params}))
    shapes = {"model.embed_tokens.weight": (vocab_size, params["dim"]),
              "model.layers.0.mlp.gate_proj.weight": (11008, params["dim"])}
    sources = {name: Source(name, shape, "F16", lambda index: np.empty(0)) for name, shape in shapes.items()}
    config = meta._config(Params(tmp_path), sources)
    assert (config["max_position_embeddings"], config["intermediate_size"]) == (positions, 11008)
    assert config.get("rope_scaling", {}).get("factor") == scaling
    assert config["eos_token_id"] == ([128001, 128008, 128009] if vocab_size == 128256 else 2)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_gives_back_every_tensor(tmp_path: Path, sharded: bool) -> None:
    tensors = weights()
    save_torch(tmp_path, tensors, sharded)
    convert("torch", tmp_path, tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors", tensors)


def test_torch_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    save_torch(tmp_path, weights(), True)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-0.bin", "../pytorch_model-0.bin"))
    with pytest.raises(ConvertError, match=r"\.\./pytorch_model-0"):
        convert("torch", tmp_path, tmp_path / "m.safetensors")


class _Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("value", [_Evil(), {"a": _Evil()}, {"a": 1}, [1]])
def test_torch_never_runs_a_pickle(tmp_path: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_torch(tmp_path, weights(), False)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, 2))
    with pytest.raises(ConvertError):
        convert("torch", tmp_path, tmp_path / "m.safetensors")
    assert not (tmp_path / "evil").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(value))  # the layout before torch 1.6
    with pytest.raises(ConvertError, match="zip"):
        convert("torch", tmp_path, tmp_path / "m.safetensors")


def test_damaged_torch_never_gives_a_traceback(tmp_path: Path) -> None:
    save_torch(tmp_path, weights(), False)
    path = tmp_path / "pytorch_model.bin"
    good, rng, errors = path.read_bytes(), random.Random(4), 0
    start = good.index(b"data.pkl")
    for i in range(150):
        data = bytearray(good)
        if i % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(data)) if i % 2 else start + rng.randrange(4000)
            data[min(place, len(data) - 1)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            convert("torch", tmp_path, tmp_path / "m.safetensors", force=True)
        except ConvertError:
            errors += 1
    assert errors > 40


# The output file


def test_narrowing_is_correct_or_refused(tmp_path: Path) -> None:
    values = np.array([[1.0, -1.00390625, 3.3895314e38, np.inf, np.nan, 65504.0, 1e-40, -0.0]], np.float32)
    bits = torch.from_numpy(values).to(torch.bfloat16)
    model = Model(CONFIG, [Source("w", values.shape, "F32", values.__getitem__)])
    write(model, tmp_path / "b.safetensors", "BF16")
    back = safetensors.torch.load_file(tmp_path / "b.safetensors")["w"]
    assert torch.equal(back.isnan(), bits.isnan())
    assert torch.equal(back.nan_to_num(), bits.nan_to_num())
    with pytest.raises(ConvertError, match="65504"):
        write(model, tmp_path / "h.safetensors", "F16")
    assert not (tmp_path / "h.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ConvertError, MemoryError])
def test_failure_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(index: Any) -> np.ndarray:
        assert [name for name in names(tmp_path) if name.endswith(".part")]
        raise error("stop")

    first = Source("a", (4,), "F32", np.ones(4, np.float32).__getitem__)
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(error):
        write(Model(CONFIG, [first, Source("b", (4,), "F32", fail)]), target)
    assert names(tmp_path) == ["m.safetensors"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["gguf", "mistral", "meta", "torch"])
def test_wrong_inputs_are_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"GGUF")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("folder", "file", "empty", "absent"):
        with pytest.raises(ConvertError, match=name):
            convert(kind, tmp_path / name, tmp_path / "m.safetensors")


def test_never_overwrites_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_gguf(tmp_path / "m.gguf", weights()), tmp_path / "m.safetensors"
    assert main(["gguf", str(source), str(target)]) == 0
    assert main(["gguf", str(source), str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["gguf", str(source), str(target), "--force"]) == 0
    save_mistral(tmp_path, weights())
    (tmp_path / "m.safetensors").unlink()
    before = (tmp_path / "consolidated.safetensors").read_bytes()
    assert main(["mistral", str(tmp_path), str(tmp_path / "consolidated.safetensors"), "--force"]) == 2
    assert "one of the input files" in capsys.readouterr().err
    assert (tmp_path / "consolidated.safetensors").read_bytes() == before
    for bad in (str(tmp_path / "no" / "m.safetensors"), str(tmp_path / "m.bin")):
        assert main(["gguf", str(source), bad]) == 2
    assert main(["gguf", str(tmp_path / "none.gguf"), str(target)]) == 2
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    """Peak resident memory grows by far less than the model while it is converted."""
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8192}
    shapes = tensor_shapes(ModelConfig.from_json(config))
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    total, largest = sum(a.nbytes for a in tensors.values()), max(a.nbytes for a in tensors.values())
    write_gguf(tmp_path / "m.gguf", tensors, config)
    script = (
        "import re, sys, gguf, converters.gguf, converters\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "converters.convert('gguf', sys.argv[1], sys.argv[2])\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "m.gguf"), str(tmp_path / "m.safetensors")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert total > 80 << 20
    assert grown < largest + (16 << 20), f"{grown / 2**20:.0f} MiB for a model of {total / 2**20:.0f} MiB"
