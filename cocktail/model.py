"""A loaded model: reads documents, completes prompts, chats."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Literal, overload

from cocktail.answer import Answer, AnswerStream, Job, check_positions
from cocktail.document import Document, Keep
from cocktail.serving import Submission
from runtime.backend import Backend, load_backend
from runtime.chat import ChatTemplate, encode_messages
from runtime.checkpoint import Checkpoint
from runtime.config import ModelConfig
from runtime.errors import (
    BackendError,
    CheckpointError,
    OutOfMemory,
    PromptError,
    SchedulerError,
    TokenizerError,
)
from runtime.model import Model as Engine
from runtime.plan import FP16, DocumentShape, Plan
from runtime.sampler import SamplingParams
from runtime.scheduler import Scheduler
from runtime.tokenizer import Tokenizer
from runtime.weights import load_weights

logger = logging.getLogger(__name__)

Message = dict[str, str]  # {"role": "user", "content": "..."}


def load(path: str | Path, *, backend: str = "auto", threads: int | None = None, graph: bool = True) -> Model:
    """Load a model: LlamaForCausalLM or MistralForCausalLM in F32, F16 or BF16, with its tokenizer.

    path: a .safetensors file, the .index.json of a sharded one, or a Hugging Face folder. backend: "auto" (CUDA where
    CuPy and a GPU are there), "cpu" or "cuda". threads: of the CPU backend, None for a measured choice.
    graph: whether CUDA captures decode steps. Raises CheckpointError, TokenizerError, BackendError, OutOfMemory.
    """
    begin = time.perf_counter()
    with open_model(path, backend, threads, graph) as (checkpoint, tokenizer, template, chosen):
        config = checkpoint.config
        try:
            weights = load_weights(checkpoint, chosen)
        except MemoryError as error:
            raise OutOfMemory(f"the weights do not fit: {error}") from error
        logger.info("%s: %d layers, %.1f MiB of weights, backend %s (%s), %.2f s", path, config.n_layers,
                    weights.nbytes / 2**20, chosen.name, ", ".join(dict.fromkeys(chosen.kernels().values())),
                    time.perf_counter() - begin)
        return Model(Engine(config, weights, chosen), tokenizer, template)


@contextmanager
def open_model(path: str | Path, backend: str, threads: int | None, graph: bool = True,
               ) -> Iterator[tuple[Checkpoint, Tokenizer, ChatTemplate | None, Backend]]:
    """What `load` makes of a checkpoint before it reads the weights; arguments and errors are those of load."""
    with _named(path), Checkpoint.open(path) as checkpoint:
        tokenizer, config = Tokenizer.from_checkpoint(checkpoint), checkpoint.config
        if tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(f"the tokenizer has {tokenizer.vocab_size} ids but the model only "
                                 f"{config.vocab_size}; they do not belong together")
        template, chosen = ChatTemplate.from_checkpoint(checkpoint), load_backend(backend, threads, graph)
        try:
            chosen.check_model(config.n_heads, config.n_kv_heads, config.head_dim)
        except RuntimeError as error:
            raise BackendError(f"backend {chosen.name} cannot run this model: {error}") from error
        yield checkpoint, tokenizer, template, chosen


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """What is wrong with a model names it: a file out of its metadata, such as config.json, lies nowhere else."""
    try:
        yield
    except (CheckpointError, TokenizerError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


class Model:
    """What `load` returns. Reading a document or generating keeps no state in it; it may have one open scheduler.

    tokenizer: text to ids and back. template: the chat template, None where the checkpoint has none. engine: the model
    as the runtime sees it; no part of the stable API.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None):
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self._scheduler: Scheduler | None = None
        self._opening = RLock()

    @property
    def config(self) -> ModelConfig:
        """Layers, heads, positions, ...: the checkpoint's config.json, validated."""
        return self.engine.config

    @property
    def backend(self) -> Backend:
        """What runs the kernels; `backend.name` is "cpu" or "cuda"."""
        return self.engine.backend

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as they lie on the device."""
        return self.engine.weights.nbytes

    def read(self, context: str, *, chunk: int = 32, system: str | None = None, keep: Keep = None) -> Document:
        """A document to ask about, cut into chunks of `chunk` tokens: a multiple of 8 from 8 to 256.

        system: the system message of the chat template, None for the template's own.
        keep: whether the first question, or Document.prefill, keeps the document's exact K and V in FP16, so that later
        questions need no prefill of it. "file" keeps them in a temporary file that is mapped into memory, in the
        folder that TMPDIR names, else /var/tmp; "memory" in the host's memory; True is the file on the CPU, whose
        memory the weights and caches share, and memory on CUDA. False keeps nothing, for a single question, which then
        writes no file. None is True on the CPU and False on CUDA, where the copies do not overlap with computing yet;
        and False for a model whose K follows the length of the whole prompt (dynamic NTK), where nothing can be kept.
        Raises PromptError where the context is empty, PlanError for another chunk size, DocumentError for a document
        that cannot be kept.
        """
        return Document(self, context, chunk, system, keep)

    @overload
    def generate(self, prompt: str | Sequence[Message], *, max_tokens: int | None = None,
                 sampling: SamplingParams | None = None, stop: Sequence[str] = (), stream: Literal[False] = False,
                 progress: Callable[[str, int, int], None] | None = None, raw: bool = False) -> Answer: ...

    @overload
    def generate(self, prompt: str | Sequence[Message], *, max_tokens: int | None = None,
                 sampling: SamplingParams | None = None, stop: Sequence[str] = (), stream: Literal[True],
                 progress: Callable[[str, int, int], None] | None = None, raw: bool = False) -> AnswerStream: ...

    def generate(self, prompt: str | Sequence[Message], *, max_tokens: int | None = None,
                 sampling: SamplingParams | None = None, stop: Sequence[str] = (), stream: bool = False,
                 progress: Callable[[str, int, int], None] | None = None, raw: bool = False) -> Answer | AnswerStream:
        """Answer a prompt without a document; the cache is FP16.

        prompt: one user turn, or chat messages ({"role": "user", "content": "..."}), rendered by the model's chat
        template; raw=True, or a model without a template, completes the text as it stands. max_tokens: None for as many
        as fit, at most 256. sampling: None is greedy. stop: texts to end before. stream=True returns an AnswerStream:
        iterate it for pieces of text. progress(stage, done, total) reports "prefill". Raises PromptError where prompt
        and answer do not fit the model's positions, OutOfMemory.
        """
        answer = AnswerStream(self._job(prompt, max_tokens, sampling, stop, progress, raw))
        return answer if stream else answer.answer

    def serve(self, *, limit: int | None = None, max_running: int = 16, pause: float = 0.1, ageing: float = 10.0,
              exact: bool = False) -> Scheduler:
        """Opens the scheduler that `submit`, here and of documents, puts requests into; use it as a context manager.

        limit: bytes that all requests may hold at once, None for nine tenths of what is free now besides the weights.
        max_running: requests that are read or answered at once. pause: seconds for which running answers may be kept
        waiting while prompts are read. ageing: seconds of waiting that a step of priority is worth. exact: no answer's
        bits may depend on who is answered beside it, which only happens on CUDA where more than 16 run. Raises
        SchedulerError where one is open, BackendError without a limit where the system does not say how much memory is
        free, OutOfMemory where none is.
        """
        with self._opening:
            if self._scheduler is not None and not self._scheduler.closed:
                raise SchedulerError("this model has an open scheduler; close it before another is opened")
            self._scheduler = Scheduler(self.engine, limit=limit, max_running=max_running, pause=pause, ageing=ageing,
                                        exact=exact)
            return self._scheduler

    @property
    def scheduler(self) -> Scheduler:
        """The open scheduler; where there is none, one is opened as `serve()` does."""
        with self._opening:
            if self._scheduler is None or self._scheduler.closed:
                return self.serve()
            return self._scheduler

    def submit(self, prompt: str | Sequence[Message], *, max_tokens: int | None = None,
               sampling: SamplingParams | None = None, stop: Sequence[str] = (), raw: bool = False,
               progress: Callable[[str, int, int], None] | None = None, priority: int = 0,
               deadline: float | None = None) -> Submission:
        """`generate` among other requests: returns at once; see Submission for how to take the answer.

        priority: higher ones go first. deadline: seconds within which the answer must be complete. progress is called
        on the scheduler's thread. Raises as generate does, OutOfMemory where it can never fit, and SchedulerError.
        """
        job = self._job(prompt, max_tokens, sampling, stop, progress, raw)
        return Submission(self.scheduler, job, priority, deadline)

    def _job(self, prompt: str | Sequence[Message], max_tokens: int | None, sampling: SamplingParams | None,
             stop: Sequence[str], progress: Callable[[str, int, int], None] | None, raw: bool) -> Job:
        ids = tuple(self._prompt_ids(prompt, raw))
        max_new = check_positions(self.config, len(ids), max_tokens)
        shape = DocumentShape(n_layers=self.config.n_layers, n_kv_heads=self.config.n_kv_heads,
                              head_dim=self.config.head_dim, chunk=32, n_chunks=0, prefix=len(ids), remainder=0,
                              suffix=0, max_new=max_new, window=self.config.sliding_window)
        plan = Plan(shape.layout([FP16], [0]), ((),) * self.config.n_layers, policy="fp16", scorer="none")
        return Job(self.engine, self.tokenizer, ids, plan, sampling or SamplingParams(), max_new, tuple(stop),
                   progress=progress)

    def _prompt_ids(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        if raw or (self.template is None and isinstance(prompt, str)):
            if not isinstance(prompt, str):
                raise PromptError("raw completion takes one text, not chat messages")
            begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else []
            return begin + self.tokenizer.encode(prompt)
        if self.template is None:
            raise PromptError("this model has no chat template; give one text instead of chat messages")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return encode_messages(self.tokenizer, self.template, messages)
