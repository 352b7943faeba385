"""The graph runner on one rank without a GPU: what it refuses, what it cuts, and what an exception leaves behind."""

import collections
import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree

import tokenferry as tf
from tokenferry.graphs import GraphRunner, choose_bucket

H, C = 4, 8
CONFIG = tf.MoEConfig(hidden_size=H, num_experts=2, topk=1, dtype=torch.float32)


@pytest.fixture
def ws():
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=C) as workspace:
        yield workspace


def runner_of(ws, fn=None, buckets=(2, 4), **options):
    return GraphRunner(ws, fn or (lambda rows: rows * 2), buckets, inputs=[torch.empty(0, H)], **options)


@pytest.mark.parametrize(("count", "bucket"), [(0, 0), (1, 64), (64, 64), (65, 256), (256, 256), (257, None)])
def test_the_smallest_bucket_that_fits(count, bucket):
    assert choose_bucket((0, 64, 256), count) == bucket


def test_a_runner_made_in_inference_mode_runs_outside_of_it_and_the_other_way_round(ws):
    rows = torch.randn(3, H)
    with torch.inference_mode():
        made_inside = runner_of(ws)
    made_outside = runner_of(ws)
    with torch.inference_mode():
        assert torch.equal(made_outside(rows), rows * 2)
    assert torch.equal(made_inside(rows), rows * 2)


@pytest.mark.parametrize(("count", "bucket"), [(0, 0), (1, 2), (3, 4), (8, None)])
def test_outputs_have_the_rows_that_came(ws, count, bucket):
    runner, rows = runner_of(ws), torch.randn(count, H)
    assert torch.equal(runner(rows), rows * 2)
    assert runner.last_bucket == bucket


def test_every_output_with_a_row_for_each_token_is_cut(ws):
    runner = runner_of(ws, lambda rows: (rows, [rows.sum(1)], {"head": rows[:1]}, "text"))
    rows = torch.ones(3, H)
    first, [second], third, text = runner(rows)
    assert (len(first), len(second), len(third["head"]), text) == (3, 3, 1, "text")


def test_padding_is_announced_as_padding(ws):
    seen = []

    def fn(rows):
        got = layer.dispatch(rows, torch.zeros(len(rows), 1, dtype=torch.int32), torch.ones(len(rows), 1))
        seen.append(got.topk_idx[:, 0].tolist())
        return layer.combine(got.hidden, got)

    layer = ws.dispatcher()
    runner = runner_of(ws, fn)
    for count in (3, 1, 0, 8):
        runner(torch.ones(count, H))
    assert seen == [[0, 0, 0, -1], [0, -1], [], [0] * 8]


def test_rows_written_into_the_static_inputs_are_not_copied(ws):
    runner = runner_of(ws)
    rows = runner.static_inputs[0][:3]
    rows.fill_(5)
    assert torch.equal(runner(rows), torch.full((3, H), 10.0))


@pytest.mark.parametrize("some", [slice(0, 4, 2), slice(1, 4), slice(3, 4)], ids=str)
def test_other_rows_of_the_static_inputs_are_copied(ws, some):
    runner = runner_of(ws)
    runner.static_inputs[0].copy_(torch.arange(4.0)[:, None].expand(4, H))
    expected = runner.static_inputs[0][some] * 2
    assert torch.equal(runner(runner.static_inputs[0][some]), expected)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((), "list of token counts"),
        ((9,), "between 0 and max_tokens_per_rank, 8; got 9"),
        ((True,), "got True"),
        ((-1,), "got -1"),
    ],
)
def test_buckets_that_cannot_be_are_refused(ws, buckets, message):
    with pytest.raises(tf.ConfigError, match=message):
        runner_of(ws, buckets=buckets)


WRONG = {
    "columns": ((torch.zeros(3, 5),), tf.ShapeError, r"input 0 must be \[n, 4\], got \[3, 5\]"),
    "dtype": ((torch.zeros(3, H).double(),), tf.DtypeError, "input 0 must be torch.float32, got torch.float64"),
    "device": ((torch.zeros(3, H, device="meta"),), tf.DeviceError, "input 0 is on meta but the workspace is on cpu"),
    "many": ((torch.zeros(9, H),), tf.CapacityError, "9 tokens but the workspace was opened for 8"),
    "number": ((), tf.UsageError, "takes 1 inputs, got 0"),
    "kind": ((3,), tf.UsageError, "input 0 must be of type Tensor, got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_do_not_fit_are_refused_and_the_runner_goes_on(ws, name):
    inputs, error, message = WRONG[name]
    runner = runner_of(ws)
    with pytest.raises(error, match=message):
        runner(*inputs)
    assert torch.equal(runner(torch.ones(3, H)), torch.full((3, H), 2.0))


def test_an_exception_in_fn_leaves_the_workspace_usable(ws):
    layer, fails = ws.dispatcher(), [True]

    def fn(rows):
        got = layer.dispatch(rows, torch.zeros(len(rows), 1, dtype=torch.int32), torch.ones(len(rows), 1))
        if fails:
            raise ArithmeticError(fails.pop())
        return layer.combine(got.hidden, got)

    runner = runner_of(ws, fn)
    with pytest.raises(ArithmeticError):
        runner(torch.ones(3, H))
    assert torch.equal(runner(torch.ones(3, H)), torch.ones(3, H))


def test_a_forward_in_the_middle_of_a_dispatch_is_refused(ws):
    runner, layer = runner_of(ws), ws.dispatcher()
    ws.begin_step(1)
    layer.dispatch(torch.ones(1, H), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    with pytest.raises(tf.StateError, match="between a dispatch and its combine"):
        runner(torch.ones(3, H))


def test_end_without_begin_is_refused(ws):
    with pytest.raises(tf.StateError, match=r"call begin\(\) first"):
        runner_of(ws).end()


def test_a_closed_runner_captures_again(ws):
    runner = runner_of(ws)
    runner.close()
    with pytest.raises(tf.StateError, match=r"was closed.*capture\(\)"):
        runner(torch.ones(1, H))
    runner.capture()
    assert runner.idle(done=True)


def test_equal_counts_and_capturing_leave_the_state_as_it_was(ws):
    ws.begin_step(1)
    with ws.capturing() as num_steps, ws.equal_counts():
        for _ in range(3):
            ws.begin_step(2)
    assert num_steps() == 3
    assert ws.begin_step(1).index == 2


def test_what_was_announced_must_come():
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=C, transport="collective") as ws:
        announced = ws.announce(3, done=True)
        assert (announced.tokens_per_rank, announced.all_done) == ((3,), True)
        with pytest.raises(tf.StateError, match="3 tokens were announced but 2 come"):
            ws.begin_step(2)
        ws.announce(2)
        assert ws.begin_step(2).index == 1


def test_a_replay_uses_up_what_was_announced():
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=C, transport="collective") as ws:
        ws.announce(3)
        with ws.replaying(1):
            pass
        assert ws.begin_step(2).valid_tokens.tolist() == [2]


def test_where_ranks_choose_alone_nothing_is_announced(ws):
    assert ws.announce(3) is None


# --- documentation ------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "graphs.md"


def test_the_example_of_the_page_runs_as_it_stands():
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 35
    exec(compile(example, "docs/graphs.md", "exec"), {})


# --- outputs and inputs of every kind ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Registered:
    first: torch.Tensor
    note: str


pytree.register_dataclass(Registered)
OUTPUTS = {
    "namedtuple": lambda x: Pair(x, 2 * x),
    "ordered-dict": lambda x: collections.OrderedDict(a=x, b=2 * x),
    "nested": lambda x: {"a": [x, (Pair(x, x), None, 3)]},
    "dataclass": lambda x: Registered(x, "kept"),
}


@pytest.mark.parametrize("rows", [4, 3], ids=["whole-bucket", "padded"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_any_pytree_comes_back_as_it_was_cut_to_the_real_rows(kind: str, rows: int) -> None:
    config = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
    x = torch.arange(3.0 * rows).reshape(rows, 3)
    with tf.Workspace(config, tf.EPGroup(device="cpu"), max_tokens_per_rank=8) as ws:
        got = tf.GraphRunner(ws, OUTPUTS[kind], [4, 8], inputs=[torch.empty(0, 3)])(x)
        (leaves, shape), (wanted, wanted_shape) = pytree.tree_flatten(got), pytree.tree_flatten(OUTPUTS[kind](x))
        assert shape == wanted_shape
        assert type(got) is type(OUTPUTS[kind](x))
        for leaf, want in zip(leaves, wanted, strict=True):
            assert torch.equal(leaf, want) if isinstance(want, torch.Tensor) else leaf == want


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3), None, (), [3], [torch.tensor(1.0)]], ids=str)
def test_inputs_that_are_no_list_of_rows_are_refused(ws, inputs: object) -> None:
    with pytest.raises(tf.UsageError, match="inputs must be"):
        GraphRunner(ws, lambda x: x, [4], inputs=inputs)
