"""Triton kernels, one operation a file: the `@triton.jit` function and, under it, its launcher."""
