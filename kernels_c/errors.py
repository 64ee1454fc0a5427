"""What the kernels raise on purpose; runtime turns it into its own BackendError."""


class KernelError(RuntimeError):
    """The extension is missing, the instruction set is unavailable, or an argument does not fit its operation."""
