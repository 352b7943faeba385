"""What a step promises: `begin_step(max_tokens=...)`. Experts make fewer launches, and give the right rows in any case."""

import collections
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import tokenferry as tf
from promise_work import BROKEN, CAPACITY, KEPT, KINDS, E, H, K, rows_of, step
from rank_pool import RankPools
from tokenferry.experts import BorrowedExperts, ExpertScratch
from tokenferry.experts.plan import FEW_ROWS
from tokenferry.testing import same_bits
from tokenferry.testing.numeric import first_difference

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}
DEBUG = {**INTERPRETER, "TOKENFERRY_DEBUG": "1"}
PRODUCTS = ("expert_gemm_kernel", "expert_mxfp4_kernel", "quantize_rows_kernel")


@contextmanager
def counted() -> Iterator[collections.Counter]:
    """Launches of what is loaded inside, by the kernel's name; and under "loaded" how many kernels were loaded."""
    from tokenferry.kernels import launch

    launches, original, load = collections.Counter(), launch.InterpretedLaunch.__call__, launch.load

    def call(self: launch.InterpretedLaunch, grid: int, *args: object) -> None:
        launches[self.spec.name] += 1
        original(self, grid, *args)

    def noted(*args: object) -> object:
        launches["loaded"] += 1
        return load(*args)

    launch.InterpretedLaunch.__call__, launch.load = call, noted
    try:
        yield launches
    finally:
        launch.InterpretedLaunch.__call__, launch.load = original, load


def with_and_without(group: tf.EPGroup, name: str) -> dict[str, object]:
    """What a step gives with a promise beside what it gives without, and how many launches it makes."""
    kind, said = KINDS[name], {}
    config = tf.MoEConfig(hidden_size=H, num_experts=E, topk=K, dtype=kind.dtype)
    with counted() as launches, tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p") as ws:
        layer, experts = ws.dispatcher(), kind.experts(group)
        experts.prepare(ws)
        for case, counts in (("kept", KEPT), ("broken", BROKEN)):
            count, outputs, launched = counts[group.rank], [], []
            for max_tokens in (None, max(KEPT) if count <= max(KEPT) else None):
                launches.clear()
                outputs.append(step(ws, layer, experts, count, max_tokens).double())
                launched.append(sum(launches[kernel] for kernel in PRODUCTS))
                assert launches["loaded"] == 0, "loading a kernel waits for the device"
            plain, promised = outputs
            error = (promised - plain).abs().max() / plain.abs().max()
            said[case] = launched, "same bits" if same_bits(promised, plain) else float(error)
            if ws._settings.debug and max_tokens is not None and case == "broken":
                with pytest.raises(tf.UsageError, match="rank 1 brought 62 tokens"):
                    ws.check()
        ws.check()
    return said


@pytest.mark.parametrize("name", KINDS)
def test_a_promise_saves_launches_and_never_rows(on_ranks: RankPools, name: str) -> None:
    without, promised = KINDS[name].num_launches
    for rank, said in enumerate(on_ranks(with_and_without, 2, name, env=INTERPRETER, timeout_s=200)):
        assert said["kept"] == ([without, promised], "same bits")
        launched, error = said["broken"]
        assert launched == [without, promised if rank == 0 else without]
        assert error == "same bits" or (error < 1e-2 and not KINDS[name].batch_invariant)


def told_of_a_broken_promise(group: tf.EPGroup) -> list[str]:
    """What debug mode says to a rank of a step that rank 1 brings more to than rank 0 has promised, and of the steps after it."""
    config, said = tf.MoEConfig(hidden_size=H, num_experts=E, topk=K), []
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="p2p") as ws:
        layer = ws.dispatcher()
        for count, max_tokens in (((3, 5)[group.rank], (3, None)[group.rank]), (2, 2), (group.rank, 1)):
            ws.begin_step(count, max_tokens=max_tokens)
            got = layer.dispatch(*rows_of(group, count, config.dtype))
            layer.combine(got.hidden.clone(), got)
            try:
                ws.check()
                said.append("")
            except tf.UsageError as error:
                said.append(str(error))
    return said


def test_debug_mode_says_which_rank_broke_a_promise(on_ranks: RankPools) -> None:
    told, quiet = on_ranks(told_of_a_broken_promise, 2, env=DEBUG, timeout_s=60)
    assert quiet == ["", "", ""]
    assert told[1:] == ["", ""]
    assert told[0].startswith("rank 1 brought 5 tokens to a step for which this rank had promised max_tokens=3; give begin_step")


def borrowed(group: tf.EPGroup) -> tuple[int, str]:
    """Launches of products that `BorrowedExperts` make for a step of few rows an expert, and how its rows differ from others'."""
    kind = KINDS["bfloat16"]
    experts, scratch, outputs = kind.experts(group), ExpertScratch("cpu"), []
    theirs = BorrowedExperts(experts.weights, experts.expert_range, experts.config.activation, dtype=kind.dtype)
    config = tf.MoEConfig(hidden_size=H, num_experts=E, topk=K)
    with counted() as launches, tf.Workspace(config, group, max_tokens_per_rank=9) as ws:
        theirs.prepare(scratch, topk=K, max_rows=2 * FEW_ROWS, out_dtypes=[kind.dtype])
        layer = ws.dispatcher()
        for max_tokens in (None, 5):
            launches.clear()
            ws.begin_step(5, max_tokens=max_tokens)
            got = layer.dispatch(*rows_of(group, 5, kind.dtype))
            outputs.append(layer.combine(theirs(got), got))
    return launches["expert_gemm_kernel"], first_difference(*outputs)


def test_borrowed_experts_keep_to_a_promise_too(on_ranks: RankPools) -> None:
    assert on_ranks(borrowed, 1, env=INTERPRETER, timeout_s=60) == [(2, "")]
