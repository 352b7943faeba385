"""Where things lie in symmetric memory, and how much there is of it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import tokenferry as tf
from tokenferry.dispatched import LoadsToCount, RowFormat
from tokenferry.kernels.control_block import CONTROL_BYTES, SPARE_BYTES
from tokenferry.transports.symmetric import layout as symmetric_layout
from tokenferry.transports.symmetric.layout import CANARY_BYTES, Region, plan

CONFIG = tf.MoEConfig(hidden_size=7168, num_experts=288, topk=8)


def regions(layout: symmetric_layout.Layout) -> list[Region]:
    return [value for value in (getattr(layout, each.name) for each in dataclasses.fields(layout)) if isinstance(value, Region)]


@pytest.mark.parametrize("multicast", [False, True], ids=["p2p", "nvls"])
@pytest.mark.parametrize("ep_size", [1, 2, 3, 8, 72])
@pytest.mark.parametrize("capacity", [1, 7, 128, 4096])
def test_regions_are_apart_aligned_and_behind_the_control_block(ep_size: int, capacity: int, multicast: bool) -> None:
    layout = plan(CONFIG, ep_size, capacity, torch.bfloat16, multicast=multicast)
    ends = [CONTROL_BYTES]
    for region in regions(layout):
        assert region.offset >= ends[-1]
        assert region.offset % 16 == 0
        ends.append(region.end)
    assert layout.num_bytes == ends[-1] + CANARY_BYTES


@pytest.mark.parametrize("multicast", [False, True], ids=["p2p", "nvls"])
@pytest.mark.parametrize("ep_size", [1, 3, 72])
@pytest.mark.parametrize("capacity", [1, 7, 4096])
def test_every_byte_is_the_control_blocks_a_regions_or_watched(ep_size: int, capacity: int, multicast: bool) -> None:
    layout = plan(CONFIG, ep_size, capacity, torch.bfloat16, multicast=multicast)
    used = [range(CONTROL_BYTES - SPARE_BYTES)]
    used += [range(region.offset, region.end) for region in regions(layout)]
    pieces = sorted((piece for piece in (*used, *layout.gaps) if piece), key=lambda piece: piece.start)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == layout.num_bytes
    for region in regions(layout):
        behind = next(gap for gap in layout.gaps if gap.start == region.end)
        assert len(behind) >= CANARY_BYTES


@pytest.mark.parametrize("hidden_size", [2048, 7168])
@pytest.mark.parametrize("ep_size", [2, 8, 72])
@pytest.mark.parametrize("capacity", [4096, 16384])
def test_a_large_workspace_takes_four_and_a_half_bytes_an_element_at_most(hidden_size: int, ep_size: int, capacity: int) -> None:
    config = tf.MoEConfig(hidden_size=hidden_size, num_experts=288, topk=8)
    num_bytes = tf.Workspace.required_bytes(config, ep_size, capacity, transport="p2p")
    assert num_bytes <= 4.5 * capacity * ep_size * hidden_size


@pytest.mark.parametrize(
    ("ep_size", "capacity", "slot_rows"),
    [
        pytest.param(2, 5, 5, id="never-more-than-a-rank-may-bring"),
        pytest.param(2, 512, 512, id="EP2-C512"),
        pytest.param(2, 4096, 512, id="EP2-C4096"),
        pytest.param(8, 4096, 512, id="EP8-C4096"),
        pytest.param(9, 4096, 192, id="fewer-in-groups-of-more-than-eight"),
        pytest.param(72, 100, 100, id="EP72-C100"),
    ],
)
def test_rows_of_a_slot(ep_size: int, capacity: int, slot_rows: int) -> None:
    assert plan(CONFIG, ep_size, capacity, torch.bfloat16).slot_rows == slot_rows


@pytest.mark.parametrize("multicast", [False, True], ids=["p2p", "nvls"])
def test_each_source_has_one_slot_for_dispatches_and_one_for_combines(multicast: bool) -> None:
    layout = plan(CONFIG, 3, 7, torch.bfloat16, multicast=multicast)
    row_bytes, routing_bytes = 7168 * 2, 8 * (4 + 4)
    num_dispatch_slots = 3 if multicast else 2  # a multicast store reaches its own rank too
    assert layout.dispatch_slots.num_bytes == num_dispatch_slots * 7 * (row_bytes + routing_bytes)
    assert layout.combine_slots.num_bytes == 2 * 7 * row_bytes


def test_rows_of_a_fraction_of_a_packet_are_refused_with_the_remedy() -> None:
    with pytest.raises(tf.ConfigError, match=r"hidden rows have 14 bytes .* pad hidden_size"):
        plan(tf.MoEConfig(hidden_size=7, num_experts=8, topk=2), 2, 8, torch.bfloat16)
    with pytest.raises(tf.ConfigError, match="more than 2"):
        plan(CONFIG, 72, 65536, torch.bfloat16)


@pytest.mark.parametrize(("dispatch_format", "counts"), [("same", True), ("fp8_block128", True), ("bytes", False)])
def test_a_combine_counts_numbers_unless_the_dispatch_alone_is_bulk(dispatch_format: str, counts: bool) -> None:
    """A peer's next dispatch may store numbers as soon as the peer has its terms, and nothing says that they were read."""
    pytest.importorskip("triton")
    from tokenferry.transports.symmetric.rank_kernels import RankKernels

    config = tf.MoEConfig(hidden_size=256, num_experts=8, topk=2)
    layout = plan(config, 2, 64, torch.bfloat16, dispatch_format=RowFormat.of(dispatch_format).resolved(config))
    kernels = SimpleNamespace(_layout=layout)
    loads = LoadsToCount(torch.zeros(9, dtype=torch.int64), 1)
    assert RankKernels.counts_in_combine(kernels, loads) is counts
