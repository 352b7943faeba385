"""Symmetric memory as transport: kernels of our own store rows into the peers' buffers."""
