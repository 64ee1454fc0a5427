"""Hugging Face folders with torch weights: pytorch_model.bin, or pytorch_model.bin.index.json and its shards.

Language models become one file that describes itself. Of a BERT encoder (Contriever, LLM-Embedder) only the weights are
converted: the file belongs beside its folder's config.json and tokenizer.json, named model.safetensors.
"""

from __future__ import annotations

from pathlib import Path

from converters.model import Model, Source, assemble
from converters.originals import files_beside, read_object
from converters.torch_zip import LazyTensor, load
from runtime.errors import ConvertError


def read(folder: Path) -> Model:
    """Open the folder as a Model; its tensors stay in the memory map. Raises ConvertError."""
    if not folder.is_dir():
        raise ConvertError(f"{folder}: expected the folder that holds config.json and pytorch_model.bin")
    config = read_object(folder / "config.json")
    if config.get("model_type") == "bert":
        return Model(config, _encoder(folder))
    tied = config.get("tie_word_embeddings") is True
    tensors = {
        name: tensor for name, tensor in _tensors(folder).items()
        if not name.endswith(".rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }  # fmt: skip
    sources = assemble(folder, config, [tensor.source(name) for name, tensor in tensors.items()], interleaved=False)
    return Model(config, sources, files_beside(folder))


def _encoder(folder: Path) -> list[Source]:
    """What runtime.encoder reads, which also checks names and shapes; heads, poolers and buffers of ids stay behind."""
    kept = [tensor.source(name) for name, tensor in _tensors(folder).items()
            if name.removeprefix("bert.").startswith(("embeddings.", "encoder.")) and tensor.array.dtype.kind != "i"]
    if not kept:
        raise ConvertError(f"{folder}: config.json says bert, but there is no tensor embeddings.* or encoder.*")
    return kept


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
