"""The specs of the small kernels at both ends of a step: embed, sample, advance."""

from __future__ import annotations

from collections.abc import Iterator

from kernels_cu.build import Spec

MAX_VOCABULARY = 2**18  # of sample
SAMPLE = Spec.of("sample.cu", "sample")
ADVANCE = Spec.of("advance.cu", "advance")
EMBED = {dtype: Spec.of("embed.cu", "embed", WEIGHT=dtype) for dtype in ("F32", "F16", "BF16")}


def compile_cover() -> Iterator[Spec]:
    yield from (SAMPLE, ADVANCE, *EMBED.values())
