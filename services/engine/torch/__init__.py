"""The embedded engine: PyTorch and Numba, on a CPU or a GPU."""
