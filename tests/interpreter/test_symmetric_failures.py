"""Late, absent and failing ranks of interpreted symmetric transports: named on all ranks, in a step and while opening."""

import time

import pytest

import tokenferry as tf
from cases import BULK_ROWS, Case, StepCase, begin, run_layer, settle
from partial_rows_work import COUNTS, WANTED, no_row_more, overlaps, rows_behind_the_first, too_few
from patience import PATIENT_S, SLACK_S
from tokenferry.testing import run_ranks

from .test_symmetric import CAPACITY, INTERPRETER

pytestmark = pytest.mark.interpreter


def late(group: tf.EPGroup, rows: int) -> list[str]:
    with tf.Workspace(Case().config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=PATIENT_S) as ws:
        dispatcher = ws.dispatcher()
        ws.begin_step(rows)
        settle(ws)
        ws.set_timeout(1.5)
        if group.rank == 1:
            group.channel.barrier("the others have given up", PATIENT_S)
        start = time.monotonic()
        with pytest.raises(tf.PeerError) as caught:
            run_layer(ws, dispatcher, StepCase((rows,) * group.size), 0)
        error, waited_s = caught.value, time.monotonic() - start
        if group.rank != 1:
            group.channel.barrier("the others have given up", PATIENT_S)
        ws.set_timeout(PATIENT_S)
        with pytest.raises(tf.PeerError):
            ws.check()
        ws.reset(timeout_s=PATIENT_S)
        for seed in range(10):
            step = StepCase(tuple((seed + rank) % 4 for rank in range(group.size)), seed=seed)
            begin(ws, step)
            run_layer(ws, dispatcher, step, 0)
        return [type(error).__name__, error.rank, error.phase, waited_s < 1.5 + SLACK_S]


@pytest.mark.parametrize("rows", [1, BULK_ROWS], ids=["slots", "bulk"])
def test_a_late_rank_is_named_on_all_ranks_and_after_a_reset_all_is_right(rows: int) -> None:
    said = run_ranks(late, 3, rows, env=INTERPRETER)
    assert said[0] == said[2] == ["PeerTimeoutError", 1, "data-missing", True]
    assert said[1] == ["PeerFailedError", 1, "data-missing", True]


def absent(group: tf.EPGroup) -> list[str]:
    with tf.Workspace(Case().config, group, max_tokens_per_rank=8, transport="p2p", timeout_s=1.5) as ws:
        if group.rank == 1:
            group.channel.barrier("rank 0 has given up", PATIENT_S)
        with pytest.raises(tf.PeerError) as caught:
            ws.begin_step(1)
        if group.rank == 0:
            group.channel.barrier("rank 0 has given up", PATIENT_S)
        return [type(caught.value).__name__, caught.value.rank, caught.value.phase]


def test_a_rank_that_does_not_begin_the_step_is_named() -> None:
    said = run_ranks(absent, 2, env=INTERPRETER)
    assert said == [["PeerTimeoutError", 1, "not-entered"], ["PeerFailedError", 1, "not-entered"]]


def one_step_off(group: tf.EPGroup) -> list[str]:
    """Rank 1 leaves a layer out and begins the next step; rank 0's limit is the shorter one."""
    timeout_s = 1.5 if group.rank == 0 else PATIENT_S
    with tf.Workspace(Case().config, group, max_tokens_per_rank=8, transport="p2p", timeout_s=timeout_s) as ws:
        dispatcher = ws.dispatcher()
        ws.begin_step(1)
        with pytest.raises(tf.PeerError) as caught:
            if group.rank == 0:
                run_layer(ws, dispatcher, StepCase((1, 1)), 0)
            ws.begin_step(1)
        return [type(caught.value).__name__, caught.value.rank, caught.value.phase]


def test_a_rank_that_is_one_step_on_disagrees_about_counts() -> None:
    said = run_ranks(one_step_off, 2, env=INTERPRETER)
    assert said == [["PeerTimeoutError", 1, "counts-disagree"], ["PeerFailedError", 1, "counts-disagree"]]


def gives_up(group: tf.EPGroup) -> list[object]:
    start = time.monotonic()
    try:
        with tf.Workspace(Case().config, group, max_tokens_per_rank=8, transport="p2p", timeout_s=PATIENT_S) as ws:
            ws.begin_step(1)
            if group.rank == 1:
                raise ValueError("out of luck")
            run_layer(ws, ws.dispatcher(), StepCase((1, 1)), 0)
    except tf.PeerError as error:
        return [type(error).__name__, error.rank, "out of luck" in str(error), time.monotonic() - start < PATIENT_S / 2]
    except ValueError:
        return ["ValueError"]
    return []


def test_a_failing_rank_is_heard_at_once_with_its_reason() -> None:
    assert run_ranks(gives_up, 2, env=INTERPRETER) == [["PeerFailedError", 1, True, True], ["ValueError"]]


# --- partial rows that are not there --------------------------------------------------------------------------------


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("way", COUNTS)
def test_a_combine_of_too_few_rows_fails_on_all_ranks_and_names_its_own(way: str, halves: bool) -> None:
    assert run_ranks(too_few, 2, "p2p", way, halves, env=INTERPRETER, timeout_s=120) == [WANTED] * 2


@pytest.mark.parametrize("way", COUNTS)
def test_no_row_is_read_that_was_not_given(way: str) -> None:
    assert run_ranks(no_row_more, 2, way, env=INTERPRETER, timeout_s=120) == [[[3.0], [1]]] * 2


def test_sums_go_to_no_memory_that_others_read() -> None:
    for said in run_ranks(overlaps, 2, "p2p", env=INTERPRETER):
        assert said["next to it"] == ""
        assert "out overlaps partial" in said["one row of it"]
        assert "out overlaps the gathered rows" in said["gathered rows"]
        assert "out overlaps the workspace's buffer, combine_input() say" in said["combine_input"]


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
def test_rows_behind_the_first_of_combine_input_are_summed_as_they_were(halves: bool) -> None:
    assert run_ranks(rows_behind_the_first, 2, "p2p", "bulk", halves, env=INTERPRETER, timeout_s=120) == [["", ""]] * 2


# --- opening --------------------------------------------------------------------------------------------------------


def one_cannot_load(group: tf.EPGroup) -> str:
    from tokenferry.transports.symmetric import loading

    def broken(*arguments: object, **options: object) -> None:
        raise OSError("no compiler here")

    if group.rank == 1:
        loading.load_row_kernels = broken
    start = time.monotonic()
    with pytest.raises(tf.TransportUnavailableError) as caught:
        tf.Workspace(Case().config, group, max_tokens_per_rank=8, transport="p2p", open_timeout_s=PATIENT_S)
    assert time.monotonic() - start < PATIENT_S / 2, "not the whole open_timeout_s"
    return str(caught.value)


def test_a_rank_that_cannot_load_its_kernels_is_named_on_all_ranks_at_once() -> None:
    for said in run_ranks(one_cannot_load, 2, env=INTERPRETER):
        assert "rank 1 failed to load its kernels: OSError: no compiler here" in said


def one_is_slow_to_load(group: tf.EPGroup) -> list[int]:
    from tokenferry.transports.symmetric import loading

    load = loading.load_row_kernels

    def slowly(*arguments: object, **options: object) -> object:
        time.sleep(2.0)
        return load(*arguments, **options)

    if group.rank == 1:
        time.sleep(1.0)
        loading.load_row_kernels = slowly
    config = Case().config
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="p2p", timeout_s=0.5, open_timeout_s=PATIENT_S) as ws:
        group.channel.barrier("both are open", PATIENT_S)
        ws.set_timeout(PATIENT_S)
        tokens = ws.begin_step(group.rank + 1).tokens_per_rank.tolist()
        ws.check()
        return tokens


def test_a_rank_that_loads_for_longer_than_timeout_s_is_waited_for_while_opening() -> None:
    assert run_ranks(one_is_slow_to_load, 2, env=INTERPRETER) == [[1, 2]] * 2
