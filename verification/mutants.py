"""Seeded changes of kernels and host logic that the tests must notice: `run_mutants.py` makes each in a copy of the tree.

Each stands for a rule that was once broken, or could be without any test failing: an access that no longer orders others, a
missing barrier, another order of a sum. Interpreted kernels run one program in one thread, so that rules about threads are read
from the compiled PTX. Where the code changes, its mutant follows; `tests/test_mutants.py` fails if the text is no longer there.
"""

from __future__ import annotations

from verification.mutant import Mutant
from verification.mutants_of_formats import OF_FORMATS
from verification.mutants_of_host_logic import OF_HOST_LOGIC
from verification.mutants_of_kernels import OF_KERNELS
from verification.mutants_of_placement import OF_PLACEMENT
from verification.mutants_of_ptx import OF_PTX
from verification.mutants_of_waits import OF_WAITS

MUTANTS = (*OF_PTX, *OF_KERNELS, *OF_FORMATS, *OF_WAITS, *OF_HOST_LOGIC, *OF_PLACEMENT)

__all__ = ["MUTANTS", "Mutant"]
