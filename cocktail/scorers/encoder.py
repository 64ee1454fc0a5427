"""Similarity of sentence embeddings by a BERT encoder on this runtime's own kernels (runtime.encoder)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cocktail.scorers import SCORERS
from cocktail.scorers.embeddings import EmbeddingScorer, Similarity
from cocktail.scorers.folder import EncoderFolder, encoder_path
from runtime.encoder import Encoder, Pooling, load_encoder_backend
from runtime.errors import BackendError, CheckpointError, CocktailError, ScorerError, UnsupportedEncoder


class EncoderScorer(EmbeddingScorer):
    """A folder, or a name that is already in the local Hugging Face cache: nothing is ever downloaded.

    Pooling, normalisation and prompts are the folder's own; pooling and the prefixes before every query and every
    passage can be given instead. device: "cpu" or "cuda"; None is CUDA where CuPy and a GPU are there, on a stream of
    high priority beside the prefill's. threads: of the CPU's process-wide pool; None: as it is. The name says which
    kernels run. What they refuse, sentence-transformers may run: cocktail.scorers.library.
    """

    def __init__(self, model: str, similarity: Similarity = "cosine", device: Literal["cpu", "cuda"] | None = None,
                 threads: int | None = None, query_prefix: str | None = None, passage_prefix: str | None = None,
                 pooling: Pooling | None = None):
        path = encoder_path(model)
        if path is None:
            raise ScorerError(f"scorer {model!r} is neither one of {', '.join(SCORERS)} nor a folder with an encoder")
        try:
            folder, self._backend = EncoderFolder.open(path), load_encoder_backend(device, threads)
            given: dict[str, Any] = {"query_prefix": query_prefix, "passage_prefix": passage_prefix,
                                     "pooling": pooling}
            self._folder = replace(folder, **{name: value for name, value in given.items() if value is not None})
            self._encoder = Encoder(folder.weights, self._backend)
            self._tokenizing = Lock()
        except UnsupportedEncoder as error:
            raise ScorerError(f"encoder {model}: {error}; sentence-transformers may run it: library:{model}") from error
        except BackendError as error:
            raise ScorerError(f"cannot load encoder {model}: {error}; or give library:{model}, which "
                              "sentence-transformers runs") from error
        except CocktailError as error:
            raise ScorerError(f"cannot load encoder {model}: {error}") from error
        super().__init__(f"{model} [{self._backend.architecture}]", self.embed, similarity)

    def embed(self, texts: Sequence[str], queries: bool = False) -> npt.NDArray[np.float32]:
        """(N, E): what sentence-transformers' encode_query or encode_document gives, to 1e-3."""
        ids = self._folder.queries(texts) if queries else self._folder.passages(texts)
        try:
            # Queries and passages set the one tokenizer in different ways, and threads may score at once.
            with self._tokenizing, self._backend.beside():
                # On a GPU the next texts are tokenized while these are embedded: nothing is waited for until the end.
                batches = list(self._encoder.embed(ids, self._folder.pooling))
                rows = np.concatenate([self._backend.download(batch) for batch in batches])
        except (CheckpointError, MemoryError, RuntimeError) as error:  # RuntimeError: whatever a GPU's library raises
            raise ScorerError(f"encoder {self.name}: {error}; device='cpu' or another encoder may do") from error
        if self._folder.normalize:
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows
