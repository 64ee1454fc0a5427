"""The specs of the small kernels at both ends of a step: gather, embed, sample, advance."""

from __future__ import annotations

from collections.abc import Iterator

from kernels_cu.build import Spec

MAX_VOCABULARY = 2**18  # of sample
SAMPLE = Spec.of("sample.cu", "sample")
SAMPLE_ROWS = Spec.of("sample.cu", "sample_rows")
GATHER = Spec.of("gather.cu", "gather")
ADVANCE = Spec.of("advance.cu", "advance")
EMBED = {dtype: Spec.of("embed.cu", "embed", WEIGHT=dtype) for dtype in ("F32", "F16", "BF16")}


def compile_cover() -> Iterator[Spec]:
    yield from (SAMPLE, SAMPLE_ROWS, GATHER, ADVANCE, *EMBED.values())
