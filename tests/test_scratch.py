"""The experts' scratch where it must grow: what captured graphs write to stays, and is nobody else's."""

import ctypes
import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")
from tokenferry.experts import ExpertScratch
from tokenferry.experts.scratch import Buffers, RowShape

SHAPE = RowShape(topk=2, hidden_size=16, intermediate_size=8, itemsize=2)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> ExpertScratch:
    """One on the CPU: nothing is launched here."""
    monkeypatch.setattr(ExpertScratch, "serves", staticmethod(lambda device: True))
    return ExpertScratch("cpu")


def rows_of(scratch: ExpertScratch, num_rows: int) -> Buffers:
    return scratch.reserve(SHAPE, num_rows, 3, torch.bfloat16)


def test_a_scratch_that_grows_keeps_the_memory_that_graphs_write_to(scratch: ExpertScratch) -> None:
    """A captured graph knows addresses alone, so that nobody else would keep the memory alive."""
    rows_of(scratch, 4)
    memory = weakref.ref(scratch._memory)
    rows_of(scratch, 400)
    gc.collect()
    assert memory() is not None


def test_what_a_graph_writes_to_its_old_memory_is_not_seen_in_the_new(scratch: ExpertScratch) -> None:
    few = rows_of(scratch, 4).outputs_PH
    address, num_bytes = few.data_ptr(), few.nbytes
    del few
    many = rows_of(scratch, 400)
    many.outputs_PH.fill_(1)
    ctypes.memset(address, 0xFF, num_bytes)  # the replay
    assert bool((many.outputs_PH == 1).all())


def test_the_bytes_of_old_memory_are_counted(scratch: ExpertScratch) -> None:
    rows_of(scratch, 4)
    before = scratch.nbytes
    rows_of(scratch, 400)
    assert scratch.nbytes == before + scratch._memory.nbytes


def test_fewer_rows_take_no_new_memory(scratch: ExpertScratch) -> None:
    large = rows_of(scratch, 400)
    assert rows_of(scratch, 4) is large


def test_a_scratch_made_in_inference_mode_is_poisoned_outside_of_it(
    monkeypatch: pytest.MonkeyPatch, scratch: ExpertScratch
) -> None:
    monkeypatch.setattr(scratch, "_poisons", True)
    with torch.inference_mode():
        few = rows_of(scratch, 4)
    scratch.poison()
    assert bool((few.pairs_P == -1).all())
