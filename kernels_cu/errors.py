"""What the CUDA kernels raise on purpose, one type per cause; runtime turns them into its own BackendError."""


class KernelError(RuntimeError):
    """An argument does not fit its operation, or a kernel failed; base of all errors here."""


class CupyMissing(KernelError):
    """CuPy is not installed."""


class NoDevice(KernelError):
    """There is no CUDA driver, or it shows no GPU."""


class ToolkitMissing(KernelError):
    """A CUDA library that the kernels need (NVRTC, cuBLAS) is not installed."""


class ArchitectureTooOld(KernelError):
    """The GPU is older than the kernels' oldest architecture."""


class DeviceMemoryError(KernelError, MemoryError):
    """An allocation on the GPU does not fit; says what was needed, what was free and which option helps."""
