"""The demo model against transformers on the same weights, a 2K prompt and 64 greedy tokens; alone and in a batch."""

import json
import pydoc_data.topics

import numpy as np
import torch
from demo_model import demo_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import cocktail
from runtime.engine import read
from runtime.request import Request
from runtime.sampler import SamplingParams
from runtime.scheduler import Scheduler

PROMPT, NEW = 2048, 64


def test_greedy_tokens_equal_transformers():
    path = demo_model()
    model = cocktail.load(path)
    text = "\n\n".join(pydoc_data.topics.topics.values())
    context = model.tokenizer.decode(model.tokenizer.encode(text)[: PROMPT - 60])
    doc = model.read(context)
    query = "Summarize this text."
    answer = doc.ask(query, policy="fp16", max_tokens=NEW)
    prompt = doc.prompt(query)
    assert len(answer.ids) == NEW
    assert abs(len(prompt) - PROMPT) < 32

    theirs = reference_logits(path, [*prompt, *answer.ids])[len(prompt) - 1 : -1]
    ours = doc.logits(query, answer.ids, policy="fp16")
    tolerance = 2 * np.abs(ours - theirs).max()
    # FP16 K and V against float32: .05 on logits of magnitude 20 was seen.
    assert tolerance < 0.1, f"logits differ by up to {tolerance / 2:.2e}"
    for step, (row, token) in enumerate(zip(theirs, answer.ids, strict=True)):
        best, second = np.sort(row)[[-1, -2]]
        assert row.argmax() == token or best - second < tolerance, f"step {step}: {token} instead of {row.argmax()}"
    print(f"\n{NEW} greedy tokens after {len(prompt)}: max abs logit difference {tolerance / 2:.2e}, "
          f"{sum(int(row.argmax()) != token for row, token in zip(theirs, answer.ids, strict=True))} near ties")


def test_greedy_answers_are_the_same_alone_and_in_a_batch_of_8():
    model = cocktail.load(demo_model())
    text = "\n\n".join(pydoc_data.topics.topics.values())
    requests = []
    for i in range(8):
        doc = model.read(text[3000 * i : 3000 * i + 400 + 60 * i], keep=False)
        query = "Summarize this text."
        plan = doc.plan(query, **({"kv_bits": 3.5} if i % 2 else {"policy": "fp16"}), max_tokens=16)
        requests.append(Request(doc.prompt(query), plan, 16))
    with Scheduler(model.engine, pause=60) as scheduler:  # all are read before one decodes a second id
        tickets = [scheduler.submit(request) for request in requests]
        together = [list(ticket) for ticket in tickets]
        assert scheduler.stats().batch > 4
    alone = [list(read(model.engine, request.prompt, [request.plan]).generate(SamplingParams(), 16, ()))
             for request in requests]
    assert together == alone and len({tuple(ids) for ids in alone}) == 8


def reference_logits(path, ids):
    """transformers' float32 logits (len(ids), V) on the file's own weights."""
    with safe_open(path, "pt") as file:
        config = LlamaConfig(**json.loads(file.metadata()["config.json"]), attn_implementation="sdpa")
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        reference = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    reference = reference.to_empty(device="cpu").float().eval()
    reference.load_state_dict(weights)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)  # to_empty left its frequencies unset
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0].numpy()
