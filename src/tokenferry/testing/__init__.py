"""Tools for testing code that uses tokenferry: rank processes, virtual ranks, data, and comparison of bits."""

from tokenferry.testing.numeric import same_bits
from tokenferry.testing.ranks import run_ranks, virtual_ranks

__all__ = ["run_ranks", "same_bits", "virtual_ranks"]
