"""The shared rank processes: they stay, nothing of one call reaches the next, and a call that fails costs only itself."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from patience import PATIENT_S, SLACK_S
from processes import of_this_process, once_gone
from rank_pool import RankPools
from tokenferry.errors import RankFailedError

pytestmark = pytest.mark.ranks


def number(group: tf.EPGroup) -> int:
    return os.getpid()


def told_rank_and_size(group: tf.EPGroup, word: str) -> list[str]:
    return group.channel.exchange("word", f"{word} {group.rank} of {group.size}", 20.0)


def test_processes_stay_and_every_call_has_a_group_of_its_own(on_ranks: RankPools) -> None:
    first = on_ranks(number, 2)
    for word in ("one", "two"):
        assert on_ranks(told_rank_and_size, 2, word) == [[f"{word} 0 of 2", f"{word} 1 of 2"]] * 2
    assert on_ranks(number, 2) == first
    assert on_ranks(number, 1) == first[:1], "fewer ranks run in the same processes"
    assert os.getpid() not in first and len(set(first)) == 2
    assert not set(first) & set(on_ranks(number, 3)), "more ranks are new processes"


def leave_everything_changed(group: tf.EPGroup) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.inference_mode().__enter__()
    torch.set_autocast_enabled("cpu", True)
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(7)
    os.environ["TOKENFERRY_TEST"] = "left behind"


def state(group: tf.EPGroup) -> dict[str, object]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "environment": dict(os.environ),
        "random": torch.rand(1).tolist(),
    }


def test_the_next_call_finds_torch_as_in_a_new_process(on_ranks: RankPools) -> None:
    [before] = on_ranks(state, 1)
    on_ranks(leave_everything_changed, 1)
    assert on_ranks(state, 1) == [before]


def read_variable(group: tf.EPGroup) -> tuple[str | None, int]:
    return os.environ.get("TOKENFERRY_TEST"), os.getpid()


def test_another_environment_is_other_processes(on_ranks: RankPools) -> None:
    [(unset, plain)], [(given, other)] = on_ranks(read_variable, 1), on_ranks(read_variable, 1, env={"TOKENFERRY_TEST": "x"})
    assert (unset, given) == (None, "x")
    assert plain != other


def fail_on_rank_1(group: tf.EPGroup) -> None:
    if group.rank == 1:
        raise ArithmeticError("rank 1 cannot count")
    group.channel.barrier("never", 2 * PATIENT_S)


def hang_on_rank_1(group: tf.EPGroup) -> None:
    while group.rank == 1:
        time.sleep(0.1)


def die_on_rank_1(group: tf.EPGroup) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.channel.barrier("never", 2 * PATIENT_S)


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        (fail_on_rank_1, "ArithmeticError: rank 1 cannot count"),
        (hang_on_rank_1, r"(?s)not finished within 5\.0 s: ranks \[1\] of 2.*in hang_on_rank_1"),
        (die_on_rank_1, "killed by SIGKILL"),
    ],
)
def test_the_first_failure_is_told_and_the_next_call_has_new_processes(on_ranks: RankPools, worker, said: str) -> None:
    before = on_ranks(number, 2)  # the first time those of the tests before, then those that the last failure left
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=said) as caught:
        on_ranks(worker, 2, timeout_s=5.0 if worker is hang_on_rank_1 else PATIENT_S)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 5.0 + SLACK_S
    assert not set(before) & set(on_ranks(number, 2))


@pytest.mark.parametrize("go_on", [True, False], ids=["by-the-next-call", "at-the-end"])
def test_a_death_between_two_calls_is_told(go_on: bool) -> None:
    pools = RankPools()
    os.kill(pools(number, 1)[0], signal.SIGKILL)
    with pytest.raises(RankFailedError, match="killed by SIGKILL"):
        if go_on:
            pools(number, 1)
        else:
            pools.close()
    pools.close()


def test_what_cannot_be_pickled_leaves_the_processes_alone(on_ranks: RankPools) -> None:
    before = on_ranks(number, 1)
    with pytest.raises((AttributeError, TypeError)):
        on_ranks(number, 1, dist.HashStore())
    assert on_ranks(number, 1) == before


def test_nothing_is_left_at_the_end() -> None:
    earlier = of_this_process()
    pools = RankPools()
    pools(number, 2)
    assert len(of_this_process()) >= len(earlier) + 2
    pools.close()
    assert not once_gone(lambda: {pid: each for pid, each in of_this_process().items() if pid not in earlier}, 10.0)
