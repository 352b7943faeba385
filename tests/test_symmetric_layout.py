"""Where things lie in symmetric memory, and how much there is of it."""

import dataclasses

import pytest
import torch

import tokenferry as tf
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


def test_slots_hold_no_more_rows_than_a_rank_may_bring() -> None:
    assert plan(CONFIG, 2, 5, torch.bfloat16).slot_rows == 5
    assert plan(CONFIG, 2, 512, torch.bfloat16).slot_rows == 512
    assert plan(CONFIG, 72, 512, torch.bfloat16).slot_rows == symmetric_layout.SLOT_ROWS
    assert plan(CONFIG, 2, 4096, torch.bfloat16).slot_rows == symmetric_layout.SLOT_ROWS


def test_rows_of_a_fraction_of_a_packet_are_refused_with_the_remedy() -> None:
    with pytest.raises(tf.ConfigError, match=r"hidden rows have 14 bytes .* pad hidden_size"):
        plan(tf.MoEConfig(hidden_size=7, num_experts=8, topk=2), 2, 8, torch.bfloat16)
    with pytest.raises(tf.ConfigError, match="more than 2"):
        plan(CONFIG, 72, 65536, torch.bfloat16)
