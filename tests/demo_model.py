"""Where the demo model lies: COCKTAIL_DEMO_MODEL, else .models/ as `make demo` leaves it."""

import os
from pathlib import Path

import pytest


def demo_model() -> Path:
    """Its path; the test fails with what to do where it is missing."""
    path = Path(os.environ.get("COCKTAIL_DEMO_MODEL") or Path(__file__).parents[1] / ".models/smollm2-135m.safetensors")
    if not path.exists():
        pytest.fail(f"the demo model is not at {path}; `make test` fetches and converts it")
    return path
