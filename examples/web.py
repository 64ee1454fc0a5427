"""Cocktail behind a small web application: one document, many users at once, answers that stream as they are made.

    pip install starlette uvicorn
    python examples/web.py MODEL DOCUMENT
    curl -N localhost:8000/ask -d "What is the name of the ferry?"

The requests share the model: one event loop, one scheduler, and up to 16 answers in a pass over the weights. Who goes
away ends his answer, and its memory is free for others. http://localhost:8000/stats says what is going on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import cocktail


def application(document: cocktail.Document) -> Starlette:
    """POST /ask: a question as plain text, its answer streamed. GET /stats: the scheduler's numbers as JSON."""

    async def ask(request: Request) -> Response:
        question = (await request.body()).decode("utf-8", "replace")
        if not question.strip():
            return PlainTextResponse("error: the question is empty\n", 400)
        try:
            answer = document.submit(question, kv_bits=3.5, max_tokens=64, deadline=300)
        except cocktail.OutOfMemory as error:  # it can never fit; what fits later waits
            return PlainTextResponse(f"error: {error}\n", 413)
        except cocktail.CocktailError as error:
            return PlainTextResponse(f"error: {error}\n", 400)
        return StreamingResponse(pieces(answer), media_type="text/plain; charset=utf-8")

    async def stats(request: Request) -> Response:
        return JSONResponse(asdict(document.model.scheduler.stats()))

    return Starlette(routes=[Route("/ask", ask, methods=["POST"]), Route("/stats", stats)])


async def pieces(answer: cocktail.Submission) -> AsyncIterator[str]:
    try:
        async for piece in answer:
            yield piece
        yield "\n"
    except cocktail.CocktailError as error:  # the status is sent already
        yield f"\nerror: {error}\n"
    finally:
        answer.cancel()  # the user went away; after the last piece it does nothing


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help=".safetensors file or Hugging Face folder")
    parser.add_argument("document", help="UTF-8 text")
    parser.add_argument("--limit", type=int, help="bytes for all caches together (default: most of what is free)")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        model = cocktail.load(arguments.model)
        text = Path(arguments.document).read_text(encoding="utf-8")
        with model.read(text, keep=True) as document, model.serve(limit=arguments.limit):
            print(f"reading {arguments.document}", file=sys.stderr)
            document.prefill()  # before the first user comes
            uvicorn.run(application(document), port=arguments.port, log_level="info")
    except (cocktail.CocktailError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
