"""The demo model on CUDA against the CPU backend: the same K and V decoded alike, the prefill within FP16's rounding.

The CPU's side comes from COCKTAIL_DEMO_RECORD, a file of `python -m bench.agree --record`, where the C kernels are not
built; else it is computed here.
"""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from demo_model import demo_model
from strategies import NOTES

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

import cocktail
from bench.agree import FP16_PREFILL, POLICIES, Recording, compare, record, report
from kernels_cu.build import current_device
from kernels_cu.errors import NoDevice

try:
    current_device()
except NoDevice as error:
    pytest.skip(str(error), allow_module_level=True)

FP16_LOGITS = 0.05  # largest difference of two backends' logits, of magnitude 20, where K and V stay FP16


def test_logits_and_greedy_ids_agree_with_the_cpu():
    path, file = demo_model(), os.environ.get("COCKTAIL_DEMO_RECORD")
    if file:
        recorded = Recording.load(Path(file))
    else:
        pytest.importorskip("kernels_c._kernels", reason="needs the C kernels, or COCKTAIL_DEMO_RECORD")
        recorded = record(cocktail.load(path, backend="cpu"))
    agreements, layers = compare(cocktail.load(path, backend="cuda"), recorded)
    with redirect_stdout(io.StringIO()) as text:
        report(agreements, layers)
    NOTES["the demo model's logits, CUDA against CPU: largest difference (rms)"] = text.getvalue()

    assert max(layers) <= FP16_PREFILL, "K and V: prefill is off by more than the rounding of its activations"
    assert agreements["fp16"].end_to_end.most <= FP16_LOGITS
    for policy, found in agreements.items():
        # A few times what rounding attention's query and output to FP16 does to the CPU's own logits.
        assert found.same.rms <= found.allowed, f"{policy}: the same K and V decode differently"
        assert found.same.most <= FP16_LOGITS, policy
        # Where a value lies on the edge between two codes, the code moves by one: the format's doing, not a kernel's.
        assert found.end_to_end.rms <= 2 * found.noise.rms + found.allowed, f"{policy}: more than such K and V explain"
        assert found.margin is None or 0 <= found.margin <= 2 * found.end_to_end.most, f"{policy}: no near tie"
    assert len(agreements) == len(POLICIES)
