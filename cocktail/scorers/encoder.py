"""Similarity of sentence embeddings: any sentence-transformers model. Needs the `encoders` extra (and so torch)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cocktail.scorers import SCORERS, Scores, finite_scores
from runtime.errors import ScorerError

if TYPE_CHECKING:
    from collections.abc import Iterator


class EncoderScorer:
    """Cosine (the paper, Eq. 1) or dot product of the query's and each chunk's embedding.

    model is a folder, or a name that is already in the local Hugging Face cache: nothing is ever downloaded. Pooling,
    normalisation and prompts are the model's own (modules.json); a plain BERT folder without one, such as Contriever's,
    gets mean pooling. Contriever was trained with the dot product, the paper scores it by cosine: that is the default.
    device None leaves the choice to sentence-transformers.
    """

    def __init__(self, model: str, similarity: Literal["cosine", "dot"] = "cosine", batch_size: int = 64,
                 device: str | None = None):
        if similarity not in ("cosine", "dot"):
            raise ScorerError(f"encoder similarity is {similarity!r}; expected 'cosine' or 'dot'")
        self.name = model
        self._model = _load(model, device)
        self._cosine = similarity == "cosine"
        self._batch_size = batch_size

    def score(self, chunks: Sequence[str], query: str) -> Scores:
        """A chunk whose embedding is zero or not finite gets the lowest score, with a warning."""
        if not chunks:
            return np.zeros(0, np.float32)
        with _keeping_the_end(self._model.tokenizer):
            wanted = self._prepared(self._model.encode_query([query], show_progress_bar=False))[0]
        found = self._prepared(self._model.encode_document(list(chunks), batch_size=self._batch_size,
                                                           show_progress_bar=False))
        return finite_scores(found @ wanted, f"encoder {self.name}")

    def _prepared(self, embeddings: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(N, size), of unit length for cosine; NaN rows where the embedding is zero or not finite."""
        rows = np.array(embeddings, np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows[~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)] = np.nan
        return rows / norms if self._cosine else rows


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
    folder = Path(model).expanduser()
    is_folder = bool(model) and folder.is_dir()
    if not is_folder and (model.count("/") != 1 or model[0] in "/.~" or folder.exists()):
        raise ScorerError(f"scorer {model!r} is neither one of {', '.join(SCORERS)} nor a folder with an encoder")
    try:
        library = import_module("sentence_transformers")
        logging = import_module("transformers.utils.logging")
    except ImportError as error:
        raise ScorerError(f"scorer {model} needs sentence-transformers ({error}); "
                          "install it with: pip install 'cocktail-kv[encoders]'") from None
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for 0.1 s of loading would tear the caller's own output
    try:
        return library.SentenceTransformer(str(folder) if is_folder else model, device=device, local_files_only=True)
    except Exception as error:  # whatever transformers, torch or safetensors raise on a damaged or missing model
        if not is_folder and isinstance(error, OSError):
            raise ScorerError(f"encoder {model} is not in the local Hugging Face cache, and nothing is downloaded; "
                              "give its folder") from error
        raise ScorerError(f"cannot load encoder {model}: {' '.join(str(error).split())[:200]}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
