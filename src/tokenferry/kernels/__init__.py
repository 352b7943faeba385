"""Triton kernels, one operation a file: the `@triton.jit` function and, above it, the `SIGNATURE` that names its arguments.

`launch` compiles, loads and launches all of them. `wire` and `expert_math` hold device functions that several kernels share.
"""
