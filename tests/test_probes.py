"""The doctor's probes: every kernel is tried, and a wrong one is found."""

from __future__ import annotations

import numpy as np
import pytest

import kernels_c.isa
from kernels_c.backend import CpuBackend
from kernels_c.encoder import CpuEncoder
from kernels_c.errors import KernelError
from runtime.diagnosis import failed
from runtime.diagnosis.measure import probed
from runtime.diagnosis.probes import probe, probe_encoder

FAST = CpuBackend(threads=1)


@pytest.mark.parametrize("isa", kernels_c.isa.available_isas())
def test_every_kernel_is_probed_and_right(isa):
    backend = CpuBackend(threads=1, isa=isa)
    results = [*probe(backend), *probe_encoder(CpuEncoder(threads=1, isa=isa))]
    assert [result for result in results if not result.good] == []
    names = {name.strip(",:") for result in results for name in result.operation.split()}
    assert backend.kernels().keys() - names == set()
    assert {"embed", "attention", "add", "gelu", "pool"} <= {
        result.operation.split()[1] for result in results if result.operation.startswith("encoder")}


def test_what_a_backend_refuses_is_a_warning_and_what_raises_a_failure(monkeypatch):
    whole = CpuBackend.bind

    def bind(self, arena, spans, *rest):
        if any(span.formats != "rotated" for span in spans):
            raise KernelError("only rotated formats")
        return whole(self, arena, spans, *rest)

    def logits(self, *_):
        raise KernelError("out of\nregisters")

    monkeypatch.setattr(CpuBackend, "bind", bind)
    monkeypatch.setattr(CpuBackend, "logits", logits)
    found = {finding.subject: finding for finding in probed("cpu", "kernels", FAST)}
    assert (found["kernels: logits"].status, found["kernels: logits"].found) == ("fail", "out of registers")
    assert found["kernels: pack, decode_attention: kivi"].status == "warn"
    assert found["kernels"].status == "pass"


@pytest.mark.parametrize(("operation", "change"), [
    ("gate_up", lambda out: out.__imul__(1.05)), ("linear_add", lambda out: out.__setitem__((0, 0), np.nan)),
    ("attention_mass", lambda out: out.fill(0)), ("decode_attention", lambda out: out.__iadd__(0.02))])
def test_a_wrong_kernel_fails(monkeypatch, operation, change):
    right = getattr(CpuBackend, operation)

    def wrong(self, *arguments):
        right(self, *arguments)
        change(arguments[-1])

    monkeypatch.setattr(CpuBackend, operation, wrong)
    found = list(probed("cpu", "kernels", FAST))
    assert failed(found)
    assert all(operation in finding.subject for finding in found if finding.status == "fail")
