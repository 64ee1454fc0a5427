"""Embeddings from an OpenAI-compatible endpoint: POST {base URL}/embeddings with {"model", "input"}.

    OPENAI_BASE_URL          such as https://api.openai.com/v1 or http://localhost:8000/v1; nothing is sent anywhere
                             that is not named
    OPENAI_API_KEY           sent as a bearer token; local servers often want none
    OPENAI_EMBEDDING_MODEL   the model, unless it is given: endpoint:MODEL
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import numpy.typing as npt

from cocktail.scorers.embeddings import EmbeddingScorer, Similarity
from runtime.errors import ScorerError

logger = logging.getLogger(__name__)

AT_ONCE = 4  # requests
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
MAX_ANSWER = 256 * 2**20  # bytes


class EndpointScorer(EmbeddingScorer):
    """Answers 429 and 5xx, timeouts and broken connections are tried again `retries` times, after .5, 1, 2, ... seconds
    or as long as Retry-After asks; anything else is a ScorerError at once. batch_size: texts of one request."""

    def __init__(self, model: str | None = None, similarity: Similarity = "cosine", base_url: str | None = None,
                 api_key: str | None = None, batch_size: int = 128, timeout: float = 60.0, retries: int = 4):
        model = model or os.environ.get("OPENAI_EMBEDDING_MODEL")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not base_url or urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).hostname:
            raise ScorerError(f"scorer endpoint: its base URL is {base_url!r}; set OPENAI_BASE_URL, such as "
                              "https://api.openai.com/v1")
        if not model:
            raise ScorerError("scorer endpoint needs a model: endpoint:MODEL, or set OPENAI_EMBEDDING_MODEL")
        if batch_size < 1 or timeout <= 0 or retries < 0:
            raise ScorerError(f"scorer endpoint: batch_size {batch_size}, timeout {timeout} and retries {retries}; "
                              "expected at least 1, more than 0 and at least 0")
        self._model, self._batch_size, self._timeout, self._retries = model, batch_size, timeout, retries
        self._url = base_url.rstrip("/") + "/embeddings"
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "cocktail-kv",
                         **({"Authorization": f"Bearer {key}"} if key else {})}
        super().__init__(f"endpoint:{model}", self.embed, similarity)

    def embed(self, texts: Sequence[str], queries: bool = False) -> npt.NDArray[np.float64]:
        """(N, size), in the order of the texts. Queries and passages are sent alike."""
        batches = [texts[i : i + self._batch_size] for i in range(0, len(texts), self._batch_size)]
        with ThreadPoolExecutor(min(AT_ONCE, len(batches))) as pool:
            rows = [row for batch in pool.map(self._request, batches) for row in batch]
        if len({len(row) for row in rows}) != 1:
            raise ScorerError(f"{self._url}: embeddings of {sorted({len(row) for row in rows})} numbers; expected one "
                              "size for all")
        return np.array(rows, np.float64)

    def _request(self, texts: Sequence[str]) -> list[list[float]]:
        # OpenAI refuses an empty text; a space is as little.
        body = {"model": self._model, "input": [text or " " for text in texts], "encoding_format": "float"}
        request = Request(self._url, json.dumps(body).encode(), self._headers)
        for attempt in range(self._retries + 1):
            wait = min(0.5 * 2**attempt, LONGEST_WAIT)
            try:
                with _OPENER.open(request, timeout=self._timeout) as response:
                    answer = response.read(MAX_ANSWER + 1)
                return self._rows(answer, len(texts))
            except HTTPError as error:
                with error:
                    problem = f"HTTP {error.code} {error.reason}{_said(error)}"
                if error.code != 429 and error.code < 500:
                    raise ScorerError(f"{self._url}: {problem}") from None
                wait = max(wait, _asked_wait(error.headers))
            except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
                problem = str(getattr(error, "reason", None) or error) or type(error).__name__
            if attempt < self._retries:
                logger.info("%s: %s; again in %g s", self._url, problem, wait)
                time.sleep(wait)
        raise ScorerError(f"{self._url}: {problem}, after {self._retries + 1} attempts")

    def _rows(self, answer: bytes, n: int) -> list[list[float]]:
        """The embeddings in the order of the texts: each says its index."""
        if len(answer) > MAX_ANSWER:
            raise ScorerError(f"{self._url}: the answer is longer than {MAX_ANSWER} bytes; lower batch_size")
        try:
            data = json.loads(answer)["data"]
            rows = {item["index"]: [float(value) for value in item["embedding"]] for item in data}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ScorerError(f"{self._url}: the answer is not a list of embeddings ({type(error).__name__}: {error}): "
                              f"{answer[:80]!r}") from None
        if len(data) != n or rows.keys() != set(range(n)):
            raise ScorerError(f"{self._url}: {len(data)} embeddings for {n} texts, or not one for each")
        return [rows[i] for i in range(n)]


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would take the key and the texts to where the user did not send them."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirect)


def _said(error: HTTPError) -> str:
    """The beginning of the server's own words, on one line."""
    try:
        text = " ".join(error.read(2000).decode(errors="replace").split())
    except (OSError, HTTPException):
        return ""
    return f": {text[:200]}" if text else ""


def _asked_wait(headers: Message) -> float:
    """Seconds of Retry-After, LONGEST_WAIT at most; 0 for a date or nothing."""
    asked = headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0
