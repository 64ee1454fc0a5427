"""CUDA kernels of the runtime's Backend protocol. Imports nothing of the rest of the project; CuPy only when used."""
