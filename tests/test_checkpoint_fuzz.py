"""2,000 damaged checkpoints: each ends as a CheckpointError or as a correct load, never otherwise, each within seconds.

A load is correct when the safetensors library, an independent reader, also accepts the damaged files and every weight
equals, bit for bit, what it reads there: then the damage touched values only, or put equals in each other's place.
"""

from __future__ import annotations

import base64
import json
import random
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import safetensors
from checkpoint_files import HostBackend, Stored, assert_holds, pack, tiny_config, tiny_tensors, write, write_folder

from runtime.checkpoint import FILES, Checkpoint
from runtime.errors import CheckpointError
from runtime.rope import rope_tables
from runtime.weights import load_weights

CASES = 2000
SEED = 20240611
SECONDS = 5.0  # for one case; the slowest takes milliseconds
MEMORY = 64 << 20  # bytes allocated in one case, mapping apart; the files have about 30 KB
INDEX = "model.safetensors.index.json"

Files = dict[str, bytes]  # file name -> content
Damage = Callable[[random.Random, Files], str]  # changes the files in place, says how


class TookTooLong(BaseException):
    """Not an Exception, so that no handler in the code under test can swallow it."""


def test_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(SEED)
    originals = [undamaged(tmp_path / str(variant), variant) for variant in range(3)]
    outcomes: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {}
    slowest = 0.0

    def expired(signum: int, frame: FrameType | None) -> None:
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, expired)
    tracemalloc.start()
    try:
        for case in range(CASES):
            files = dict(originals[case % len(originals)])
            damage = DAMAGES[case // len(originals) % len(DAMAGES)]
            how = damage(rng, files)
            folder = tmp_path / f"case{case}"
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            tracemalloc.reset_peak()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            start = time.perf_counter()
            try:
                outcome = load_and_compare(folder)
            except (Exception, TookTooLong) as error:
                raise AssertionError(f"case {case} ({how}) ended with {type(error).__name__}: {error}") from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - start)
            assert tracemalloc.get_traced_memory()[1] < MEMORY, f"case {case} ({how}) allocated too much"
            if damage in HARMLESS:
                assert outcome == "correct load", f"case {case} ({how}) must load: {outcome}"
            outcomes[outcome.split(":")[0]] += 1
            by_kind.setdefault(damage.__name__, Counter())[outcome.split(":")[0]] += 1
            for file in folder.iterdir():
                file.unlink()
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, previous)

    with capsys.disabled():
        print(f"\n{CASES} damaged checkpoints (seed {SEED}): {dict(outcomes)}, slowest {slowest * 1e3:.0f} ms")
        for kind, counts in sorted(by_kind.items()):
            print(f"  {kind:18} {dict(counts)}")
    assert set(outcomes) == {"CheckpointError", "correct load"}
    assert sum(outcomes.values()) == CASES
    assert min(outcomes.values()) > CASES // 20  # both endings are really exercised


def undamaged(folder: Path, variant: int) -> Files:
    """A plain file with its config beside it, a self-describing one, shards; every dtype, with and without biases."""
    config = tiny_config(tie_word_embeddings=variant == 1, attention_bias=variant == 2, mlp_bias=variant == 2,
                         rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    tensors = tiny_tensors(config, ("F32", "BF16", "F16")[variant])
    folder.mkdir()
    if variant == 1:
        write(folder / "m.safetensors", tensors, {"config.json": json.dumps(config), "tokenizer.json": "{}",
                                                  "tokenizer.model": base64.b64encode(b"binary").decode()})
    else:
        write_folder(folder, config, tensors, shards=1 + variant // 2)
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5], "top_k": 50, "temperature": 0.7}')
    assert load_and_compare(folder) == "correct load"
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def load_and_compare(folder: Path) -> str:
    """ "correct load", or "CheckpointError: ..."; AssertionError for a wrong load."""
    try:
        with Checkpoint.open(folder) as checkpoint:
            weights = load_weights(checkpoint, HostBackend())  # type: ignore[arg-type]
            for name in FILES:
                checkpoint.file(name)
            with np.errstate(all="ignore"):
                assert np.isfinite(rope_tables(checkpoint.config, 3, 5)).all()
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000
        message.encode()  # printable
        return f"CheckpointError: {message}"
    tensors: Stored = {}
    used = {checkpoint.path}
    if checkpoint.path.name == INDEX:
        used = {folder / name for name in json.loads(checkpoint.path.read_bytes())["weight_map"].values()}
    for file in used:
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            assert name not in tensors
            tensors[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    if weights.head is weights.embed:
        tensors.pop("lm_head.weight", None)
    assert_holds(weights, tensors)
    return "correct load"


# damages --------------------------------------------------------------------------------------------------------

def some_weights(rng: random.Random, files: Files) -> str:
    return rng.choice([name for name in files if name.endswith(".safetensors")])


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:end])
    return header, content[end:]


def flip(rng: random.Random, content: bytes, begin: int, end: int) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_anywhere(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    files[name] = flip(rng, files[name], 0, len(files[name]))
    return f"bits flipped in {name}"


def flip_header(rng: random.Random, files: Files) -> str:
    name = some_weights(rng, files)
    files[name] = flip(rng, files[name], 0, 8 + int.from_bytes(files[name][:8], "little"))
    return f"bits flipped in the header of {name}"


def flip_data(rng: random.Random, files: Files) -> str:
    name = some_weights(rng, files)
    begin = 8 + int.from_bytes(files[name][:8], "little")
    files[name] = flip(rng, files[name], begin, len(files[name]))
    return f"bits flipped in the data of {name}"


def flip_json(rng: random.Random, files: Files) -> str:
    name = rng.choice([name for name in files if name.endswith(".json")] or sorted(files))
    files[name] = flip(rng, files[name], 0, len(files[name]))
    return f"bits flipped in {name}"


def cut(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    length = rng.choice([0, 7, 8, 9, len(files[name]) - 1, rng.randrange(len(files[name]))])
    files[name] = files[name][:length]
    return f"{name} cut to {length} bytes"


def splice(rng: random.Random, files: Files) -> str:
    """Garbage at the end, a hole of zeros, or a repeated piece."""
    name = rng.choice(sorted(files))
    content = files[name]
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    files[name] = rng.choice([content + rng.randbytes(rng.randrange(1, 40)),
                              content[:begin] + bytes(end - begin) + content[end:],
                              content[:end] + content[begin:]])
    return f"{name} spliced at {begin}:{end}"


def header_length(rng: random.Random, files: Files) -> str:
    name = some_weights(rng, files)
    length = int.from_bytes(files[name][:8], "little")
    wrong = rng.choice([0, 1, 2, length - 1, length + 1, length + 8, len(files[name]) - 8, len(files[name]), 10**8,
                        2**31, 2**32 + length, 2**63, 2**64 - 1, rng.getrandbits(64)])
    files[name] = wrong.to_bytes(8, "little") + files[name][8:]
    return f"header of {name} announced as {wrong} bytes"


def exchange(rng: random.Random, files: Files) -> str:
    """Two tensors swap a field, or all of them: a swap of equals is a valid file with other contents."""
    name = some_weights(rng, files)
    header, data = split(files[name])
    first, second = rng.sample([key for key in header if key != "__metadata__"], 2)
    fields = rng.choice([("dtype",), ("shape",), ("data_offsets",), ("dtype", "shape", "data_offsets")])
    for field in fields:
        header[first][field], header[second][field] = header[second][field], header[first][field]
    files[name] = pack(json.dumps(header).encode(), data)
    return f"{fields} of {first} and {second} exchanged"


def header_value(rng: random.Random, files: Files) -> str:
    """A field of a tensor replaced, removed or misnamed; offsets and sizes also by near misses."""
    name = some_weights(rng, files)
    header, data = split(files[name])
    tensor = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    choice = rng.randrange(6)
    if choice == 0:
        entry[rng.choice(list(entry))] = hostile(rng)
    elif choice == 1:
        which = rng.choice(["shape", "data_offsets"])
        entry[which][rng.randrange(len(entry[which]))] += rng.choice([-4, -2, -1, 1, 2, 4, 2**31, 2**63, 10**300])
    elif choice == 2:
        entry["dtype"] = rng.choice(["F32", "F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "f32", ""])
    elif choice == 3:
        entry["shape"] = rng.choice([entry["shape"][::-1], [], [*entry["shape"], 1], [0, *entry["shape"]]])
    elif choice == 4:
        names = ["x" * 1000, "\ud800", "", "lm_head.weight", tensor + "\0", "__metadata__"]
        header[rng.choice(names)] = header.pop(tensor)
    else:
        del header[rng.choice([tensor, *(["__metadata__"] if "__metadata__" in header else [])])]
    files[name] = pack(json.dumps(header).encode(), data)
    return f"choice {choice} on {tensor}"


def header_text(rng: random.Random, files: Files) -> str:
    """Valid or invalid JSON that a strict reader must not trip over."""
    name = some_weights(rng, files)
    header, data = split(files[name])
    text = json.dumps(header)
    deep = rng.choice([100, 5000, 200_000])
    tensor = json.dumps(rng.choice(list(header)))
    choices = {
        "twice": text[:-1] + f',{tensor}:{{"dtype":"F32","shape":[],"data_offsets":[0,4]}}}}',
        "deep list": text[:-1] + ',"x":' + "[" * deep + "]" * deep + "}",
        "deep object": text[:-1] + ',"x":' + '{"a":' * deep + "1" + "}" * deep + "}",
        "long": text + " " * 3000,
        "digits": text.replace("[0,", "[" + "9" * rng.choice([20, 4000, 5000]) + ",", 1),
        "nan": text.replace("[0,", "[NaN,", 1),
        "list": f"[{text}]",
        "nothing": "{}",
        "leading space": " " + text,
    }
    kind = rng.choice(sorted(choices))
    files[name] = pack(choices[kind].encode(), data)
    return f"header text: {kind}"


def config_value(rng: random.Random, files: Files) -> str:
    """One or two values of config.json or generation_config.json replaced or removed, wherever the files are kept."""
    names = [name for name in ("config.json", "generation_config.json") if name in files]
    name = rng.choice(names or ["config.json"])
    weights = some_weights(rng, files)
    config = json.loads(files[name] if names else split(files[weights])[0]["__metadata__"][name])
    how = []
    for _ in range(rng.choice([1, 1, 2])):
        nested = config["rope_parameters"] if "rope_parameters" in config and rng.random() < 0.3 else config
        if not isinstance(nested, dict) or not nested:
            continue
        key = rng.choice([*nested, "sliding_window", "rope_scaling"])
        how.append(key)
        if rng.random() < 0.2:
            nested.pop(key, None)
        else:
            nested[key] = hostile(rng)
    text = json.dumps(config)
    if names:
        files[name] = text.encode()
    else:
        header, data = split(files[weights])
        header["__metadata__"][name] = text
        files[weights] = pack(json.dumps(header).encode(), data)
    return f"{name}: {how}"


def index_value(rng: random.Random, files: Files) -> str:
    """An index that names other files, other tensors or none; without one, a missing or a surplus file."""
    if INDEX not in files:
        name = rng.choice(sorted(files))
        if rng.random() < 0.5:
            del files[name]
            return f"{name} missing"
        files["other-" + name] = files[name]
        return f"{name} twice"
    index = json.loads(files[INDEX])
    weight_map = index["weight_map"]
    tensor = rng.choice(sorted(weight_map))
    choice = rng.randrange(5)
    if choice == 0:
        weight_map[tensor] = rng.choice([
            *sorted(set(weight_map.values())), "../m.safetensors", "/dev/zero", "/dev/stdin", "config.json", ".", "",
            "a\0.safetensors", "\ud800.safetensors", hostile(rng)])
    elif choice == 1:
        del weight_map[tensor]
    elif choice == 2:
        weight_map[rng.choice(["ghost", "\ud800", "x" * 2000])] = weight_map.pop(tensor)
    elif choice == 3:
        index["weight_map"] = hostile(rng)
    else:
        index["metadata"] = hostile(rng)
    files[INDEX] = json.dumps(index).encode()
    return f"index: choice {choice} on {tensor}"


def hostile(rng: random.Random) -> Any:
    return rng.choice([
        None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 2**40, 2**63, 2**64, 10**300, 0.5, -0.0, 1e-300, 1e300,
        float("nan"), float("inf"), "", "1", "yarn", "dynamic", "longrope", "\ud800", "\0", "x" * 5000, [], [[]],
        [1, 2], [0, 0], [2**62, 2**62], [-1], [None], ["LlamaForCausalLM"], ["MistralForCausalLM"], {}, {"a": 1},
        {"rope_type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 0}, rng.randrange(64), rng.random()])


DAMAGES: list[Damage] = [flip_anywhere, flip_header, flip_data, flip_json, cut, splice, header_length, exchange,
                         header_value, header_text, config_value, index_value]
HARMLESS = [flip_data]  # must load: the weights' values are nobody's business
