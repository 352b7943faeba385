"""How dispatch and combine are cut into programs: from tables that were measured, the same on all ranks."""

import types
from typing import Any

import pytest
import torch

import tokenferry as tf
from tokenferry.dispatched import SAME, RowFormat
from tokenferry.transports.symmetric.bound_launches import BoundLaunches
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS, Layout, plan
from tokenferry.transports.symmetric.tuning import (
    H100_X2,
    INTERPRETED,
    FewTokens,
    Tuning,
    choose_few_tokens,
    choose_grid,
    choose_tuning,
    max_registers_of,
    packets_per_row,
    tuning_for,
)

SMS = 132


def settings(
    max_tokens_per_rank: int, *, device: str = "cuda", ep_size: int = 2, hidden_size: int = 7168, max_ctas: int | None = None
) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        config=tf.MoEConfig(hidden_size=hidden_size, num_experts=64, topk=8),
        group=types.SimpleNamespace(device=torch.device(device), size=ep_size),
        combine_dtype=torch.bfloat16,
        dispatch_format=SAME,
        max_tokens_per_rank=max_tokens_per_rank,
        max_ctas=max_ctas,
    )


def layout_of(settings: types.SimpleNamespace) -> Layout:
    return plan(settings.config, settings.group.size, settings.max_tokens_per_rank, settings.combine_dtype)


@pytest.mark.parametrize(
    ("num_packets", "num_warps", "max_programs"),
    [(1, 4, 132), (16896, 4, 132), (16897, 8, 132), (33793, 8, 264), (67584, 8, 264), (67585, 16, 264)],
    ids=str,
)
def test_the_smallest_wave_that_has_a_thread_for_each_packet(num_packets: int, num_warps: int, max_programs: int) -> None:
    assert tuning_for(num_packets, SMS) == Tuning(num_warps=num_warps, max_programs=max_programs)


@pytest.mark.parametrize(
    ("max_tokens_per_rank", "ep_size", "max_tokens", "fewest_tokens"),
    [
        pytest.param(4096, 2, 37, 9, id="33792-threads-for-901-packets-a-row"),
        pytest.param(4096, 8, 5, 1, id="shared-by-seven-peers"),
        pytest.param(75, 2, 37, 9, id="where-every-step-goes-in-slots"),
    ],
)
def test_few_tokens_have_a_thread_for_each_packet(
    max_tokens_per_rank: int, ep_size: int, max_tokens: int, fewest_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = few_tokens_of(settings(max_tokens_per_rank, ep_size=ep_size), monkeypatch)
    assert few == FewTokens(tuning=Tuning(num_warps=8, max_programs=132), max_tokens=max_tokens, fewest_tokens=fewest_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, "fewest"), (9, "fewest"), (10, "few"), (37, "few"), (38, "rows")],
    ids=lambda value: f"T{value}" if isinstance(value, int) else value,
)
def test_a_rank_launches_by_its_own_tokens(num_tokens: int, expected: str) -> None:
    launches: Any = {"counts": None, "rows": "rows", "few": "few", "few_tokens": 37, "fewest": "fewest", "fewest_tokens": 9}
    assert BoundLaunches(**launches).rows_for(num_tokens) == expected


def test_few_tokens_go_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = settings(4096, hidden_size=64)
    few = few_tokens_of(narrow, monkeypatch)
    assert few is not None and few.max_tokens == layout_of(narrow).slot_rows < 33792 // 13


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(settings(37), id="the-workspace-s-own-are-as-small"),
        pytest.param(settings(4096, device="cpu"), id="interpreter"),
    ],
)
def test_no_second_launches(of: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert few_tokens_of(of, monkeypatch) is None


def few_tokens_of(of: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> FewTokens | None:
    gpu = types.SimpleNamespace(multi_processor_count=SMS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    layout = layout_of(of)
    return choose_few_tokens(of, layout, choose_tuning(of, layout))


def test_waves_of_a_table_grow() -> None:
    threads = [wave.num_threads(SMS) for wave in H100_X2.waves]
    assert threads == sorted(set(threads))
    assert threads[-1] < H100_X2.largest.num_threads(SMS)


def test_the_interpreter_runs_one_program() -> None:
    on_cpu = settings(4096, device="cpu")
    tuning = choose_tuning(on_cpu, layout_of(on_cpu))
    assert tuning == INTERPRETED
    assert choose_grid(on_cpu, layout_of(on_cpu), tuning, resident=1, is_virtual=False) == 1


@pytest.mark.parametrize(
    ("dispatch_format", "combine_dtype", "expected"),
    [
        ("same", torch.bfloat16, 896 + 5),
        ("fp8_block128", torch.bfloat16, 896 + 5),
        ("fp8_block128", torch.float8_e4m3fn, 448 + 5),
        ("same", torch.float8_e4m3fn, 896 + 5),
        ("same", torch.float32, 1792 + 5),
    ],
    ids=["bfloat16", "fp8-dispatch", "fp8-both", "fp8-combine", "float32-terms"],
)
def test_a_row_has_the_threads_of_its_formats(dispatch_format: str, combine_dtype: torch.dtype, expected: int) -> None:
    of = settings(4096)
    of.dispatch_format, of.combine_dtype = RowFormat.of(dispatch_format), combine_dtype
    assert packets_per_row(of) == expected


@pytest.mark.parametrize(
    ("num_warps", "combine_dtype", "expected"),
    [(16, torch.bfloat16, 64), (8, torch.bfloat16, 64), (16, torch.float8_e4m3fn, 64), (8, torch.float8_e4m3fn, 128)],
    ids=["bfloat16-16-warps", "bfloat16-8-warps", "fp8-16-warps", "fp8-8-warps"],
)
def test_a_combine_of_float8_terms_has_more_registers_where_programs_are_small(
    num_warps: int, combine_dtype: torch.dtype, expected: int
) -> None:
    of = settings(4096)
    of.combine_dtype = combine_dtype
    assert max_registers_of(of, Tuning(num_warps=num_warps, max_programs=264)) == expected


@pytest.mark.parametrize(
    ("max_tokens_per_rank", "options", "resident", "expected"),
    [
        pytest.param(4096, {}, 264, 264, id="bulk-takes-all-that-is-resident"),
        pytest.param(4096, {}, 100, 100, id="never-more-than-are-resident"),
        pytest.param(4096, {"max_ctas": 40}, 264, 40, id="never-more-than-max_ctas"),
        pytest.param(1, {}, 264, 9, id="slots-take-a-program-for-each-block-of-901-packets-and-one-more"),
        pytest.param(1, {"ep_size": 4}, 264, 27, id="times-the-number-of-peers"),
    ],
)
def test_programs_of_a_launch(max_tokens_per_rank: int, options: dict[str, int], resident: int, expected: int) -> None:
    of = settings(max_tokens_per_rank, **options)
    tuning = Tuning(num_warps=4, max_programs=264)
    assert choose_grid(of, layout_of(of), tuning, resident, is_virtual=False) == expected <= MAX_PROGRAMS


def test_virtual_ranks_share_one_gpu_with_each_others_next_kernels() -> None:
    of = settings(4096, ep_size=4)
    assert choose_grid(of, layout_of(of), Tuning(num_warps=16, max_programs=264), 264, is_virtual=True) == 264 // 8
