"""The worked examples of the kernels' docstrings."""

import pytest
import torch
import triton
import triton.language as tl

import tokenferry as tf
from tokenferry.kernels import routing_packets, shares, term_rows, wire
from tokenferry.kernels.control_block import Record
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def counts_example(group: tf.EPGroup) -> tuple[list[int], list[int]]:
    config = tf.MoEConfig(hidden_size=4, num_experts=6, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=3, transport="p2p") as ws:
        step = ws.begin_step((2, 0, 3)[group.rank])
        memory = ws.active_transport.memory
        region = memory.layout.step_counts
        step_counts = memory.buffer[region.offset : region.end].view(torch.int32).tolist()
        return step_counts, [*step.summary.tolist(), *step.tokens_per_rank.tolist()]


def test_counts_kernel() -> None:
    step_counts, step_tensors = run_ranks(counts_example, 3, env=INTERPRETER)[2]
    assert step_counts == [5, 3, 2, 0, 3, 0, 2, 2]
    assert step_tensors == [5, 2, 3, 2, 0, 3]


def round_trip_example(group: tf.EPGroup) -> tuple[list[float], list[list[int]], list[float]]:
    config = tf.MoEConfig(hidden_size=4, num_experts=6, topk=2)
    rows = torch.tensor([[1.0], [2.0]] if group.rank == 0 else [[3.0]])
    with tf.Workspace(config, group, max_tokens_per_rank=2, transport="p2p") as ws:
        ws.begin_step(rows.shape[0], 1)
        layer = ws.dispatcher()
        idx = torch.tensor([[3, 5], [4, 1]] if group.rank == 0 else [[0, 2]])
        got = layer.dispatch(rows.expand(-1, 4).to(torch.bfloat16).contiguous(), idx, torch.ones(rows.shape[0], 2))
        hidden, ids = got.hidden[:3, 0].tolist(), got.topk_idx[:3].tolist()
        layer.combine(torch.zeros(4, 4, dtype=torch.bfloat16))
        ws.begin_step(1)
        layer.dispatch(torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2))
        partial = torch.tensor([[1.0], [2.0], [0.0], [0.0]]) * (1 if group.rank == 0 else 10)
        out = layer.combine(partial.expand(-1, 4).to(torch.bfloat16).contiguous())
        return hidden, ids, out[:, 0].tolist()


def test_dispatch_and_combine_kernel() -> None:
    first, second = run_ranks(round_trip_example, 2, env=INTERPRETER)
    assert first[0] == second[0] == [1.0, 2.0, 3.0]
    assert first[1] == second[1] == [[3, 5], [-1, -1], [0, 2]]
    assert (first[2], second[2]) == ([11.0], [22.0])


@triton.jit
def small(values, idx, weights, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    a, b, c, d = term_rows.load_term(values.to(tl.int64), lanes.to(tl.int64) * 4, lanes < 1, tl.float32, tl.bfloat16, 2)
    wire.store(out.to(tl.int64) + lanes * 8, a, b, c, d, lanes < 1, 2)
    words = routing_packets.load_routing(lanes, idx.to(tl.int64), weights.to(tl.int64), 1, 2, tl.int64, tl.float32)
    wire.store(out.to(tl.int64) + 8 + lanes * 4, words, words, words, words, lanes < 4, 1)


def helpers_example(group: tf.EPGroup) -> list[int]:
    values, idx, weights = torch.tensor([1.0, 2, 3, 4]), torch.tensor([3, 5]), torch.tensor([0.5, 0.25])
    out = torch.zeros(6, dtype=torch.int32)
    small[(1,)](values.data_ptr(), idx.data_ptr(), weights.data_ptr(), out.data_ptr(), BLOCK=4)
    return out.tolist()


def test_load_term_and_load_routing() -> None:
    assert run_ranks(helpers_example, 1, env=INTERPRETER) == [[0x40003F80, 0x40804040, 3, 5, 0x3F000000, 0x3E800000]]


@triton.jit
def escaped(words, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    a, b, c, d = wire.load(words.to(tl.int64) + lanes * 16, lanes < 1, 4)
    wire.store(out.to(tl.int64) + lanes * 16, wire.escape(a), wire.escape(b), wire.escape(c), wire.escape(d), lanes < 1, 4)


def escape_example(group: tf.EPGroup) -> list[int]:
    words, out = torch.tensor([-1, -2, 7, 0x7FFFFFFF], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    escaped[(1,)](words.data_ptr(), out.data_ptr(), BLOCK=4)
    return out.tolist()


def test_no_payload_word_is_the_sentinel() -> None:
    """-1, that is 0xFFFFFFFF, becomes 0xFFFFFFFE, which means the same; all others stay."""
    assert run_ranks(escape_example, 1, env=INTERPRETER) == [[-2, -2, 7, 0x7FFFFFFF]]


def fewer_rows_example(group: tf.EPGroup) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """One row of two that are announced, and behind it in memory another that is not meant."""
    config = tf.MoEConfig(hidden_size=4, num_experts=6, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=2, transport="p2p") as ws:
        ws.begin_step(2)
        given = torch.full((2, 4), 3.0, dtype=torch.bfloat16), torch.full((2, 2), 5), torch.full((2, 2), 0.5)
        got = ws.dispatcher().dispatch(*(tensor[:1] for tensor in given))
        return got.hidden[:, 0].tolist(), got.topk_idx.tolist(), got.topk_weights.tolist()


def test_rows_that_are_not_supplied_are_never_read() -> None:
    for hidden, ids, weights in run_ranks(fewer_rows_example, 2, env=INTERPRETER):
        assert hidden == [3.0, 0.0] * 2
        assert ids == [[5, 5], [-1, -1]] * 2
        assert weights == [[0.5, 0.5], [0.0, 0.0]] * 2


def abort_example(group: tf.EPGroup, by_kernel: bool) -> int:
    config = tf.MoEConfig(hidden_size=4, num_experts=6, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=2, transport="p2p") as ws:
        word = ws.active_transport.memory.buffer[:8].view(torch.int64)
        if group.rank == 1:
            word[0] = Record(0, 1, "data-missing", 7, 2).pack()
        group.channel.barrier("filled", 30.0)
        if group.rank == 0:
            transport, record = ws.active_transport.innermost, Record(0, 0, "failed", 9, 3)
            if by_kernel:
                transport._resources.kernels.abort(1, transport._buffer.table_address, group.size, record.pack())
            else:
                transport._abort(record)
        group.channel.barrier("written", 30.0)
        return Record.unpack(int(word[0])).step


@pytest.mark.parametrize("by_kernel", [True, False], ids=["by-the-kernel", "by-the-host"])
def test_abort_kernel_leaves_an_earlier_record(by_kernel: bool) -> None:
    """Ranks on CPUs write it by the host, since another thread may be inside a kernel."""
    assert run_ranks(abort_example, 2, by_kernel, env=INTERPRETER) == [9, 7]


@triton.jit
def share(begin, blocks, programs, out):
    tl.store(out.to(tl.int64).to(tl.pointer_type(tl.int32)), shares.next_share(begin, blocks, programs))


def share_example(group: tf.EPGroup) -> list[int]:
    out, found = torch.zeros(1, dtype=torch.int32), []
    for begin in range(4):
        share[(1,)](begin, 3, 4, out.data_ptr())
        found.append(int(out))
    return found


def test_next_share() -> None:
    assert run_ranks(share_example, 1, env=INTERPRETER) == [[1, 2, 3, 0]]
