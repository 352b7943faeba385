"""How dispatch and combine are cut into programs: from tables that were measured, the same on all ranks."""

import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tokenferry as tf
from tokenferry.dispatched import SAME, RowFormat
from tokenferry.transports.symmetric import loading
from tokenferry.transports.symmetric.bound_launches import BoundLaunches
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS, Layout, plan
from tokenferry.transports.symmetric.tuning import (
    H100_X2,
    INTERPRETED,
    Cut,
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
ROWS = loading.RowKernels(dispatch={}, dispatch_alone={}, combine={}, grid=264)


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


@dataclass(frozen=True)
class FewCase:
    """How a workspace's launches for few tokens are cut: (most rows, programs) of dispatch and combine."""

    name: str
    dispatch: tuple[tuple[int, int], ...]
    combine: tuple[tuple[int, int], ...]
    max_tokens_per_rank: int = 4096
    ep_size: int = 2
    dispatch_format: str = "same"
    combine_dtype: torch.dtype = torch.bfloat16


PLAIN = ((9, 66), (37, 132), (75, 264))
QUANTIZED = ((18, 66), (73, 132), (146, 264))
FEW = [
    FewCase("896-packets-a-row-each-way", PLAIN, PLAIN),
    FewCase("462-packets-a-row-to-the-experts", QUANTIZED, PLAIN, dispatch_format="fp8_block128"),
    FewCase("448-threads-a-row-back", PLAIN, ((18, 66), (75, 132), (150, 264)), combine_dtype=torch.float8_e4m3fn),
    FewCase("shared-by-seven-peers", ((1, 66), (5, 132), (10, 264)), ((1, 66), (5, 132), (10, 264)), ep_size=8),
    FewCase("where-the-largest-step-takes-264-such-programs", PLAIN[:2], PLAIN[:2], max_tokens_per_rank=75),
]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_few_tokens_have_a_thread_for_each_packet_of_either_operation(case: FewCase, monkeypatch: pytest.MonkeyPatch) -> None:
    of = settings(case.max_tokens_per_rank, ep_size=case.ep_size)
    of.dispatch_format, of.combine_dtype = RowFormat.of(case.dispatch_format), case.combine_dtype
    few = few_tokens_of(of, monkeypatch)
    assert few is not None and few.tuning == Tuning(num_warps=8, max_programs=264)
    for cuts, expected in ((few.dispatch, case.dispatch), (few.combine, case.combine)):
        assert tuple((cut.max_tokens, cut.max_programs) for cut in cuts) == expected


@pytest.mark.parametrize(
    ("num_tokens", "dispatch", "combine"),
    [(0, 66, 66), (9, 66, 66), (10, 66, 132), (18, 66, 132), (19, 132, 132), (38, 132, 264), (76, 264, 512), (147, 512, 512)],
    ids=lambda value: f"{value}",
)
def test_a_rank_launches_by_its_own_tokens(num_tokens: int, dispatch: int, combine: int) -> None:
    launches: Any = {"counts": None, "dispatch": 512, "combine": 512, "few_dispatch": QUANTIZED, "few_combine": PLAIN}
    bound = BoundLaunches(**launches)
    assert (bound.dispatch_for(num_tokens), bound.combine_for(num_tokens)) == (dispatch, combine)


def test_launches_for_few_tokens_have_no_more_programs_than_there_are_flags() -> None:
    cuts = tuple(Cut(max_tokens=rows, max_programs=programs) for rows, programs in PLAIN)
    few: Any = types.SimpleNamespace(resident=264)
    loaded: Any = {"counts": None, "abort": None, "add": None, "rows": ROWS, "few": few}
    kernels = loading._with_grid(loading.LoadedKernels(**loaded, few_dispatch=cuts, few_combine=cuts[:1]), 100)
    assert kernels.rows.grid == 100
    assert [cut.max_programs for cut in kernels.few_dispatch] == [66, 100, 100]
    assert [cut.max_programs for cut in kernels.few_combine] == [66]


def test_few_tokens_go_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = settings(4096, hidden_size=64)
    few = few_tokens_of(narrow, monkeypatch)
    assert few is not None and few.dispatch[-1].max_tokens == layout_of(narrow).slot_rows < 67584 // 8


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
        ("fp8_block128", torch.float8_e4m3fn, 462 + 5),
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
