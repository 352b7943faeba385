"""How dispatch and combine are cut into programs: from tables that were measured, the same on all ranks."""

import types

import pytest
import torch

import tokenferry as tf
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS, Layout, plan
from tokenferry.transports.symmetric.tuning import H100_X2, INTERPRETED, Tuning, choose_grid, choose_tuning, tuning_for

SMS = 132


def settings(
    max_tokens_per_rank: int, *, device: str = "cuda", ep_size: int = 2, max_ctas: int | None = None
) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        config=tf.MoEConfig(hidden_size=7168, num_experts=64, topk=8),
        group=types.SimpleNamespace(device=torch.device(device), size=ep_size),
        combine_dtype=torch.bfloat16,
        max_tokens_per_rank=max_tokens_per_rank,
        max_ctas=max_ctas,
    )


def layout_of(settings: types.SimpleNamespace) -> Layout:
    return plan(settings.config, settings.group.size, settings.max_tokens_per_rank, settings.combine_dtype)


@pytest.mark.parametrize(
    ("num_packets", "num_warps"),
    [(1, 4), (16896, 4), (16897, 8), (67584, 8), (67585, 16)],
    ids=str,
)
def test_the_fewest_warps_whose_wave_has_a_thread_for_each_packet(num_packets: int, num_warps: int) -> None:
    assert tuning_for(num_packets, SMS) == Tuning(num_warps=num_warps, max_programs=264)


def test_waves_of_a_table_grow() -> None:
    threads = [wave.num_threads(SMS) for wave in H100_X2.waves]
    assert threads == sorted(set(threads))
    assert H100_X2.waves[-1].num_warps < H100_X2.largest_num_warps


def test_the_interpreter_runs_one_program() -> None:
    on_cpu = settings(4096, device="cpu")
    tuning = choose_tuning(on_cpu, layout_of(on_cpu))
    assert tuning == INTERPRETED
    assert choose_grid(on_cpu, layout_of(on_cpu), tuning, resident=1, is_virtual=False) == 1


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
