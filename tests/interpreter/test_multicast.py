"""The multicast transport's own instructions, in their interpreter form: a store that reaches every rank's buffer."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import switch
import tokenferry as tf
from cases import BULK_ROWS, Case, StepCase, begin, run_layer
from tokenferry.kernels import wire
from tokenferry.kernels.control_block import GROUP_SIZE_OFFSET, PEER_TABLE_OFFSET
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def over_multicast(group: tf.EPGroup, steps: list[StepCase], **settings: object) -> int:
    """`nvls` on a buffer whose own address stands for the multicast mapping: the interpreter stores to each rank in turn."""
    compared = 0
    with tf.Workspace(Case().config, group, max_tokens_per_rank=1025, transport=switch.Nvls(), timeout_s=20, **settings) as ws:
        assert ws.transport == "nvls"
        layers = [ws.dispatcher(), ws.dispatcher()]
        for step in steps:
            begin(ws, step)
            for number, layer in enumerate(layers):
                run_layer(ws, layer, step, number)
                compared += 1
    return compared


def test_multicast_dispatch_gives_the_bits_of_the_reference() -> None:
    steps = [
        StepCase((3, 0, 5)),
        StepCase((0, 0, 0)),
        StepCase((1, BULK_ROWS, 2), own_buffer=True),
        StepCase((4, 4, 4), real=(2, 0, 4)),
    ]
    assert run_ranks(over_multicast, 3, steps, env=INTERPRETER, timeout_s=90) == [2 * len(steps)] * 3


def test_the_switch_sums_float32_terms_in_any_order() -> None:
    """The interpreter's switch adds in rank order, so that even the bits are known."""
    steps = [
        StepCase((3, 0, 5)),
        StepCase((0, BULK_ROWS, 2), own_buffer=True, layers=2),
        StepCase((BULK_ROWS + 1, 0, 2), partial_dtype=torch.float32),
        StepCase((1, BULK_ROWS, 3), partial_dtype=torch.float32, own_buffer=True),
    ]
    any_order = {"combine_dtype": torch.float32, "combine_order": "any"}
    assert run_ranks(any_order_over_multicast, 3, steps, any_order, env=INTERPRETER, timeout_s=90) == [2 * len(steps)] * 3


def any_order_over_multicast(group: tf.EPGroup, steps: list[StepCase], settings: dict) -> int:
    return over_multicast(group, steps, **settings)


def without_switch(group: tf.EPGroup) -> str:
    with pytest.raises(tf.TransportUnavailableError) as caught:
        tf.Workspace(Case().config, group, max_tokens_per_rank=8, transport="nvls")
    return str(caught.value)


def test_without_a_multicast_address_nvls_does_not_open() -> None:
    for said in run_ranks(without_switch, 2, env=INTERPRETER):
        assert "nvls: rejected, could not be opened on rank" in said
        assert "no multicast address" in said


@triton.jit
def add(control_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    a, b, c, d = wire.multicast_sum(control_ptr.to(tl.int64) + 1024 + lanes * 16, lanes < BLOCK, control_ptr)
    wire.store(out_ptr.to(tl.int64) + lanes * 16, a, b, c, d, lanes < BLOCK, 4)


def summed(group: tf.EPGroup) -> list[float]:
    from tokenferry.transports.symmetric.buffer import SymmetricBuffer

    buffer = SymmetricBuffer(group, 4096, "sum", 30.0)
    words = buffer.tensor.view(torch.int64)
    words[PEER_TABLE_OFFSET // 8] = buffer.table_address
    words[GROUP_SIZE_OFFSET // 8] = group.size
    values = buffer.tensor[1024 : 1024 + 128].view(torch.float32)
    values[:] = torch.arange(32) + 100 * group.rank
    group.channel.barrier("filled", 30.0)
    out = torch.empty(32)
    add[(1,)](buffer.address, out.data_ptr(), BLOCK=8)
    group.channel.barrier("read", 30.0)
    return np.asarray(out).tolist()


def test_the_switch_sums_float32_over_all_ranks() -> None:
    assert run_ranks(summed, 3, env=INTERPRETER) == [[3.0 * value + 300 for value in range(32)]] * 3
