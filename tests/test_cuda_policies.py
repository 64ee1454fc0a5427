"""What the policies and the search for pairs ask of the GPU: chunks in place, and the same costs as on the CPU."""

import numpy as np
import pytest
import tiny_model
from hypothesis import assume, given
from strategies import Case, cases, several
from test_in_place import attended, plan_of

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from kernels_cu.attention import HEAD_DIMS
from kernels_cu.backend import CudaBackend
from kernels_cu.cache_ops import MAX_GROUP
from kernels_cu.errors import NoDevice

try:
    CUDA = CudaBackend()
except NoDevice as error:
    pytest.skip(str(error), allow_module_level=True)

import cocktail
from cocktail.policies.pairs import fingerprint
from cocktail.tuning.calibration import Prompt, calibrate
from cocktail.tuning.profile import profile
from runtime.plan import Tier

TEXT = "The ferry to Merrow Point leaves at nine. " * 60


@several
@given(case=cases())
def test_in_place_attention_equals_that_over_reordered_chunks(case: Case) -> None:
    """Both divide their work differently, and each rounds as the format's tests allow: FP16 operands."""
    assume(case.layout.head_dim in HEAD_DIMS and case.group <= MAX_GROUP and case.v_kind in ("normal", "steps"))
    plan = plan_of(case)
    placed, reordered = (attended(CUDA, case, each) for each in (plan.without_reordering(), plan))
    np.testing.assert_allclose(placed, reordered, rtol=0, atol=0.02)
    np.testing.assert_array_equal(attended(CUDA, case, plan.without_reordering()), placed)


def test_profile_and_cost_equal_the_cpus(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(tiny_model.CONFIG, "head_dim", 64)
    path = tiny_model.save_tiny_model(tmp_path)
    tiers, found = [Tier(2, 2), Tier(4, 2), Tier(8, 8)], []
    for backend in ("cpu", "cuda"):
        model = cocktail.load(path, backend=backend, threads=1 if backend == "cpu" else None)
        calibration = calibrate(model, [Prompt(TEXT, "When?", "It leaves at nine, every day.")], answer_tokens=8)
        found.append((profile(calibration, tiers), calibration.kl([Tier(2, 2), Tier(4, 2)]), fingerprint(model.engine)))
    (cpu_errors, cpu_kl, cpu_print), (cuda_errors, cuda_kl, cuda_print) = found
    np.testing.assert_allclose(cuda_errors, cpu_errors, rtol=0.05, atol=1e-3)
    assert cuda_kl == pytest.approx(cpu_kl, rel=0.1)
    assert cuda_print == cpu_print


def test_every_policy_answers_on_the_gpu(tmp_path, monkeypatch) -> None:
    """The same plan gives the CPU's logits, whatever the policy."""
    monkeypatch.setitem(tiny_model.CONFIG, "head_dim", 64)
    path = tiny_model.save_tiny_model(tmp_path)
    (tmp_path / "pairs.json").write_text('{"version": 1, "pairs": ["K4V2", "K2V3"]}')
    options = {"uniform": {"tier": "K8V4"}, "kvtuner": {"pairs": tmp_path / "pairs.json"},
               "cocktail": {"pairs": tmp_path / "pairs.json", "no_search": True, "no_reorder": True},
               "budget": {"pairs": tmp_path / "pairs.json", "kv_bits": 4.0}}
    docs = [cocktail.load(path, backend=backend).read(TEXT) for backend in ("cpu", "cuda")]
    answer = docs[0].ask("When?", policy="fp16", max_tokens=8).ids
    for policy, chosen in options.items():
        plan = docs[0].plan("When?", policy=policy, max_tokens=8, **chosen)
        cpu, cuda = (doc.logits("When?", answer, plan=plan) for doc in docs)
        np.testing.assert_allclose(cuda, cpu, atol=0.05, err_msg=policy)
