"""A varied lot of requests: other lengths, policies, sampling and questions."""

from dataclasses import replace

from runtime.request import Request
from runtime.sampler import SamplingParams

TEXT = "The cracked iron pan was mended by Odo Farrant in the spring of 1843, says the ledger of the ferry. "
QUESTIONS = ("Who mended the pan?", "When?", "Where does the ledger lie, and who keeps it now?")
POLICIES = (dict(policy="budget", kv_bits=4), dict(policy="fp16"), dict(policy="kivi"), dict(policy="atom"),
            dict(policy="uniform", tier="K4V2"), dict(scorer="attention", kv_bits=5))
SAMPLINGS = (SamplingParams(), SamplingParams(temperature=0.9, seed=3),
             SamplingParams(repetition_penalty=1.4, top_k=7, temperature=0.5, seed=5))


def request_for(model, i: int, **changes) -> Request:
    """The i-th of a varied lot: other lengths, policies, sampling and questions."""
    doc = model.read(TEXT * (2 + 3 * (i % 4)), chunk=16, keep=False)
    question, max_new = QUESTIONS[i % len(QUESTIONS)], 3 + 5 * (i % 5)
    plan = doc.pending(question, max_tokens=max_new, **POLICIES[i % len(POLICIES)])
    return replace(Request(doc.prompt(question), plan, max_new, SAMPLINGS[i % len(SAMPLINGS)]), **changes)
