"""The embeddings endpoint against a server of this machine: order, batches, retries, and every way to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from cocktail.scorers import load_scorer
from cocktail.scorers.endpoint import EndpointScorer
from runtime.errors import ScorerError

Reply = tuple[int, bytes, dict[str, str]]


class Server:
    """Answers each request with answer(number of the request, its JSON) -> (status, body, headers)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Callable[[int, dict[str, Any]], Reply] = lambda number, body: embeddings(body)
        lock, owner = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # what a redirect that is followed comes to
                self.do_POST()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
                with lock:
                    owner.requests.append(body | {"path": self.path})
                    owner.headers.append(self.headers)
                    status, content, headers = owner.answer(len(owner.requests) - 1, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that no longer waits
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def vector(text: str) -> list[float]:
    """Something that tells texts apart."""
    return [float(len(text)), float(sum(map(ord, text)) % 97), 1.0]


def embeddings(body: dict[str, Any], **changes: Any) -> Reply:
    """As OpenAI answers, the last text first: only the index says whose an embedding is."""
    data = [{"object": "embedding", "index": i, "embedding": vector(text)} for i, text in enumerate(body["input"])]
    return 200, json.dumps({"object": "list", "data": data[::-1], **changes}).encode(), {}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the scorer would have slept."""
    found: list[float] = []
    monkeypatch.setattr("cocktail.scorers.endpoint.time.sleep", found.append)
    return found


def scorer(server: Server, **options: Any) -> EndpointScorer:
    return EndpointScorer("small", base_url=server.url, api_key="secret", **options)


def test_embeddings_come_in_the_order_of_the_texts(server: Server) -> None:
    texts = [f"text {'x' * i}" for i in range(11)]
    found = scorer(server, batch_size=3).embed(texts)
    assert found.tolist() == [vector(text) for text in texts]
    assert sorted(len(request["input"]) for request in server.requests) == [2, 3, 3, 3]
    assert {(request["path"], request["model"]) for request in server.requests} == {("/v1/embeddings", "small")}
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_scores_are_the_similarity_of_embeddings(server: Server, similarity: Any) -> None:
    chunks, query = ["one", "a longer one", ""], "which?"
    rows = np.array([vector(text or " ") for text in [query, *chunks]])
    if similarity == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert scorer(server, similarity=similarity).score(chunks, query) == pytest.approx(rows[1:] @ rows[0], rel=1e-6)


def test_url_model_and_key_come_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    monkeypatch.setenv("OPENAI_EMBEDDING_MODEL", "from-environment")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert load_scorer("endpoint").name == "endpoint:from-environment"
    load_scorer("endpoint:named").score(["chunk"], "query")
    assert {request["model"] for request in server.requests} == {"named"}
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    load_scorer("endpoint").score(["chunk"], "query")
    assert server.headers[-1]["Authorization"] == "Bearer from-environment"


def test_hybrid_takes_an_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert load_scorer("hybrid:endpoint:small").score(["a mill", "a bridge"], "bridge").argmax() == 1


@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "OPENAI_EMBEDDING_MODEL"])
def test_what_is_not_set_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("OPENAI_EMBEDDING_MODEL", "small")
    monkeypatch.delenv(variable)
    with pytest.raises(ScorerError, match=variable):
        load_scorer("endpoint")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "http://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ScorerError, match="base URL is"):
        EndpointScorer("small", base_url=url)


@pytest.mark.parametrize(("status", "headers", "waited"), [
    (429, {}, [0.5, 1.0]), (500, {}, [0.5, 1.0]), (503, {"Retry-After": "7"}, [7.0, 7.0]),
    (429, {"Retry-After": "9999"}, [60.0, 60.0]), (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, [0.5, 1.0]),
])
def test_what_may_pass_is_tried_again(server: Server, waits: list[float], status: int, headers: dict[str, str],
                                      waited: list[float]) -> None:
    server.answer = lambda number, body: embeddings(body) if number == 2 else (status, b"busy", headers)
    assert scorer(server).embed(["text"]).tolist() == [vector("text")]
    assert waits == waited and len(server.requests) == 3


def test_what_does_not_pass_ends_with_the_servers_words(server: Server, waits: list[float]) -> None:
    server.answer = lambda number, body: (502, b"<h1>bad\ngateway</h1>", {})
    with pytest.raises(ScorerError, match=r"/v1/embeddings: HTTP 502 .*<h1>bad gateway</h1>, after 5 attempts"):
        scorer(server).embed(["text"])
    assert waits == [0.5, 1.0, 2.0, 4.0] and len(server.requests) == 5


@pytest.mark.parametrize("status", [400, 401, 404, 301, 302, 303, 307, 308])
def test_what_will_not_pass_is_not_tried_again(server: Server, waits: list[float], status: int) -> None:
    """A redirect neither: it would carry the key elsewhere."""
    server.answer = lambda number, body: (status, b'{"error": "no"}', {"Location": server.url + "/elsewhere"})
    with pytest.raises(ScorerError, match=f"HTTP {status} .*error"):
        scorer(server).embed(["text"])
    assert not waits and len(server.requests) == 1


@pytest.mark.parametrize("body", [
    b"no json", b"{}", b'{"data": 3}', b'{"data": [{"embedding": [1.0]}]}', b'{"data": [{"index": 0}]}',
    b'{"data": [{"index": 0, "embedding": ["a"]}]}', b'{"data": [{"index": 0, "embedding": null}]}', b"[" * 100_000,
])
def test_an_answer_of_another_form_is_named(server: Server, waits: list[float], body: bytes) -> None:
    server.answer = lambda number, _: (200, body, {})
    with pytest.raises(ScorerError, match="not a list of embeddings"):
        scorer(server).embed(["text"])
    assert not waits


@pytest.mark.parametrize("indices", [[0], [0, 0], [0, 2], [0, 1, 2]])
def test_an_embedding_for_every_text_is_needed(server: Server, indices: list[int]) -> None:
    data = [{"index": i, "embedding": [1.0, 2.0]} for i in indices]
    server.answer = lambda number, body: (200, json.dumps({"data": data}).encode(), {})
    with pytest.raises(ScorerError, match=f"{len(indices)} embeddings for 2 texts"):
        scorer(server).embed(["a", "b"])


def test_embeddings_of_several_sizes_are_refused(server: Server) -> None:
    data = [{"index": 0, "embedding": [1.0, 2.0]}, {"index": 1, "embedding": [1.0]}]
    server.answer = lambda number, body: (200, json.dumps({"data": data[: len(body["input"])]}).encode(), {})
    with pytest.raises(ScorerError, match=r"embeddings of \[1, 2\] numbers"):
        scorer(server).embed(["a", "b"])


def test_a_silent_server_is_a_timeout(server: Server, waits: list[float]) -> None:
    done = threading.Event()
    server.answer = lambda number, body: (done.wait(10), embeddings(body))[1]
    try:
        with pytest.raises(ScorerError, match="timed out, after 2 attempts"):
            scorer(server, timeout=0.1, retries=1).embed(["text"])
    finally:
        done.set()
    assert waits == [0.5]


def test_no_server_is_named_with_its_address(waits: list[float]) -> None:
    with pytest.raises(ScorerError, match=r"http://127.0.0.1:9/v1/embeddings: .*refused, after 2 attempts"):
        EndpointScorer("small", base_url="http://127.0.0.1:9/v1", retries=1).embed(["text"])
    assert waits == [0.5]
