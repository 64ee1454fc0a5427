"""The GPU that tests run on, and how much of it they ask for. Importing this skips the tests where there is none."""

import os

import pytest

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'",
                           exc_type=ImportError)

from kernels_cu.errors import NoDevice  # noqa: E402

try:
    from kernels_cu.backend import CudaBackend

    BACKEND = CudaBackend()
except NoDevice as error:
    pytest.skip(str(error), allow_module_level=True)

EXAMPLES = int(os.environ.get("COCKTAIL_EXAMPLES", "64"))  # of prefill attention; of every other property:
OTHERS = min(EXAMPLES, int(os.environ.get("COCKTAIL_CUDA_EXAMPLES", "64")))
LARGE = os.environ.get("COCKTAIL_LARGE", "1") != "0"  # 0 for compute-sanitizer: no matrix and no prompt of real size


def up(array):
    return None if array is None else BACKEND.upload(array)
