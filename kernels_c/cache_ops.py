"""Operations on a sequence's cache."""

from __future__ import annotations


class CacheOps:
    """Mixed into CpuBackend, which has set `self.isa` before this class is initialized."""

    isa: str

    def __init__(self) -> None:
        pass

    def kernels(self) -> dict[str, str]:
        return {}
