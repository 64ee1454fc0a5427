"""Hugging Face folders with torch weights: pytorch_model.bin, or pytorch_model.bin.index.json and its shards."""

from __future__ import annotations

from pathlib import Path

from converters.model import Model, assemble
from converters.originals import files_beside, read_object
from converters.torch_zip import LazyTensor, load
from runtime.errors import ConvertError


def read(folder: Path) -> Model:
    """Open the folder as a Model; its tensors stay in the memory map. Raises ConvertError."""
    if not folder.is_dir():
        raise ConvertError(f"{folder}: expected the folder that holds config.json and pytorch_model.bin")
    config = read_object(folder / "config.json")
    tied = config.get("tie_word_embeddings") is True
    tensors = {
        name: tensor for name, tensor in _tensors(folder).items()
        if not name.endswith(".rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }  # fmt: skip
    sources = assemble(folder, config, [tensor.source(name) for name, tensor in tensors.items()], interleaved=False)
    return Model(config, sources, files_beside(folder))


def _tensors(folder: Path) -> dict[str, LazyTensor]:
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if single.is_file():
        return load(single)
    if not index.is_file():
        raise ConvertError(f"{folder}: there is neither {single.name} nor {index.name}")
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ConvertError(f"{index}: expected weight_map, an object from tensor to file name")
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ConvertError(f"{index}: {shard!r:.80} is not a file in {folder}")
        for name, tensor in load(folder / shard).items():
            if name in tensors or places.get(name) != shard:
                raise ConvertError(f"{folder / shard}: holds tensor {name!r:.80}, which the index puts elsewhere")
            tensors[name] = tensor
    if missing := sorted(places.keys() - tensors.keys()):
        raise ConvertError(f"{index}: tensor {missing[0]!r:.80} is not in {places[missing[0]]}, as it says")
    return tensors
