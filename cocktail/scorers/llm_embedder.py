"""LLM-Embedder (Zhang et al., Retrieve Anything To Augment Large Language Models): a BERT trained with instructions."""

from __future__ import annotations

from typing import Literal

from cocktail.scorers.embeddings import Similarity
from cocktail.scorers.encoder import EncoderScorer
from runtime.errors import ScorerError

# Of its task "qa", from the model card of BAAI/llm-embedder; the space at the end belongs to each.
QUERY_PREFIX = "Represent this query for retrieving relevant documents: "
PASSAGE_PREFIX = "Represent this document for retrieval: "


class LlmEmbedderScorer(EncoderScorer):
    """The first token's embedding, with the published prefixes for retrieval; its folder need not name either."""

    def __init__(self, model: str | None = None, similarity: Similarity = "cosine",
                 device: Literal["cpu", "cuda"] | None = None, threads: int | None = None):
        if model is None:
            raise ScorerError("scorer llm-embedder needs the model's folder, or its name in the local cache, as "
                              "llm-embedder:FOLDER")
        super().__init__(model, similarity, device, threads, QUERY_PREFIX, PASSAGE_PREFIX, "cls")
        self.name = f"llm-embedder:{self.name}"
