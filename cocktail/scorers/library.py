"""Similarity of sentence embeddings by sentence-transformers, any model it has. Needs the `encoders` extra, so torch.

For models that cocktail.scorers.encoder refuses; it is chosen by name, library:FOLDER, and never silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from cocktail.scorers.embeddings import EmbeddingScorer, Similarity
from cocktail.scorers.folder import encoder_path
from runtime.errors import ScorerError

BATCH = {"cpu": 64, "gpu": 256}  # chunks at a time; equal lengths go together


class LibraryScorer(EmbeddingScorer):
    """A folder, or a name that is already in the local Hugging Face cache: nothing is ever downloaded.

    Pooling, normalisation and prompts are the model's own (modules.json); a plain folder without one gets mean pooling.
    device None leaves the choice to sentence-transformers: a GPU where torch has one, the very one that CUDA prefill
    runs on. There the products are TF32, on a stream of high priority beside the prefill's. batch_size None: BATCH.
    """

    def __init__(self, model: str | None = None, similarity: Similarity = "cosine", batch_size: int | None = None,
                 device: str | None = None):
        if model is None:
            raise ScorerError("scorer library needs an encoder's folder or name in the local cache, as library:FOLDER")
        loaded = _load(model, device)
        on_gpu = loaded.device.type == "cuda"
        batch_size = batch_size or BATCH["gpu" if on_gpu else "cpu"]
        self._by = _Quick(loaded, batch_size) if _Quick.takes(loaded) else _Library(loaded, batch_size)
        self._beside = _gpu_stream(loaded.device) if on_gpu else nullcontext
        self._tokenizing = Lock()
        super().__init__(f"library:{model}", self.embed, similarity)

    def embed(self, texts: Sequence[str], queries: bool = False) -> npt.ArrayLike:
        """(N, size)."""
        # Queries and passages set the one tokenizer in different ways, and threads may score at once.
        with self._tokenizing, self._beside():
            return self._by(texts, queries)


class _Library:
    """sentence-transformers' own encode: whatever the model is made of."""

    def __init__(self, model: Any, batch_size: int):
        self._model, self._batch_size = model, batch_size

    def __call__(self, texts: Sequence[str], queries: bool) -> npt.ArrayLike:
        encode = self._model.encode_query if queries else self._model.encode_document
        with _keeping_the_end(self._model.tokenizer) if queries else nullcontext():
            found: npt.ArrayLike = encode(list(texts), batch_size=self._batch_size, show_progress_bar=False)
        return found


class _Quick:
    """The same embeddings of a plain text encoder with its tokenizer called directly: for a thousand chunks the library
    spends 200 ms around the tokenizer's 20, more than a GPU takes for all the rest."""

    def __init__(self, model: Any, batch_size: int):
        self._model, self._batch_size = model.eval(), batch_size
        self._torch = import_module("torch")

    @staticmethod
    def takes(model: Any) -> bool:
        """A transformer first, a tokenizer of the tokenizers library, no prompts and no lower-casing before it."""
        return (type(model).__name__ == "SentenceTransformer" and type(model[0]).__name__ == "Transformer"
                and hasattr(model.tokenizer, "backend_tokenizer") and not any(model.prompts.values())
                and not getattr(model[0], "do_lower_case", False) and model.max_seq_length is not None)

    def __call__(self, texts: Sequence[str], queries: bool) -> npt.ArrayLike:
        torch, tokenizer = self._torch, self._model.tokenizer.backend_tokenizer
        tokenizer.no_padding()
        # Of a query longer than the window the end is kept, as in _keeping_the_end.
        tokenizer.enable_truncation(self._model.max_seq_length, direction="left" if queries else "right")
        ids = [np.array(encoding.ids) for encoding in tokenizer.encode_batch([text.strip() for text in texts])]
        order = np.argsort([-len(row) for row in ids], kind="stable")
        found: list[Any] = []
        with torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                found.append(self._forward([ids[i] for i in order[start : start + self._batch_size]]))
            rows = torch.cat(found).float().cpu().numpy()
        embeddings: npt.NDArray[np.float32] = np.empty_like(rows)
        embeddings[order] = rows
        return embeddings

    def _forward(self, ids: Sequence[npt.NDArray[Any]]) -> Any:
        """(len(ids), size), on the model's device."""
        width, tokenizer = len(ids[0]), self._model.tokenizer
        padded = np.full((len(ids), width), tokenizer.pad_token_id or 0, np.int64)
        mask = np.zeros((len(ids), width), np.int64)
        for i, row in enumerate(ids):
            padded[i, : len(row)], mask[i, : len(row)] = row, 1
        features = {"input_ids": padded, "attention_mask": mask}
        if "token_type_ids" in tokenizer.model_input_names:
            features["token_type_ids"] = np.zeros_like(padded)
        device = self._model.device
        return self._model({name: self._torch.from_numpy(values).to(device) for name, values in features.items()})[
            "sentence_embedding"]


def _gpu_stream(device: Any) -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch works on a stream of its own with TF32 products: FP32's range, ten bits of mantissa."""
    torch = import_module("torch")
    torch.cuda.synchronize(device)  # the weights were copied on the default stream
    stream = torch.cuda.Stream(device, priority=-1)

    @contextmanager
    def beside() -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with torch.cuda.stream(stream):
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise ScorerError(f"the encoder has no memory on the GPU ({str(error).split('.')[0]}); "
                              "leave more to it, or give LibraryScorer device='cpu'") from error
        finally:
            torch.set_float32_matmul_precision(before)

    return beside


@contextmanager
def _keeping_the_end(tokenizer: Any) -> Iterator[None]:
    """A query longer than the encoder's window loses its beginning: the question itself usually comes last."""
    if not hasattr(tokenizer, "truncation_side"):  # static embeddings have no window
        yield
        return
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        yield
    finally:
        tokenizer.truncation_side = side


def _load(model: str, device: str | None) -> Any:
    folder = encoder_path(model)
    if folder is None:
        raise ScorerError(f"scorer library:{model}: there is no folder {model!r}")
    try:
        library = import_module("sentence_transformers")
        logging = import_module("transformers.utils.logging")
    except ImportError as error:
        raise ScorerError(f"scorer library:{model} needs sentence-transformers ({error}); "
                          "install it with: pip install 'cocktail-kv[encoders]'") from None
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for 0.1 s of loading would tear the caller's own output
    try:
        return library.SentenceTransformer(str(folder), device=device, local_files_only=True)
    except Exception as error:  # whatever transformers, torch or safetensors raise on a damaged model
        raise ScorerError(f"cannot load encoder {model}: {' '.join(str(error).split())[:200]}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
