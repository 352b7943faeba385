"""What the public contract says of inputs, results and objects, beyond dispatch and combine themselves."""

import copy
import gc
import pickle
import threading
import time
import weakref
from importlib import metadata

import pytest
import torch

import tokenferry as tf
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.testing import run_ranks

CONFIG = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
ROWS = 2
KINDS = [
    pytest.param("local", 1, {}, id="local"),
    pytest.param("collective", 2, {}, id="collective", marks=pytest.mark.ranks),
    pytest.param("p2p", 2, {"TRITON_INTERPRET": "1"}, id="p2p", marks=pytest.mark.interpreter),
]


def inputs(group: tf.EPGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.full((ROWS, 8), 1.0 + group.rank), torch.zeros(ROWS, 1, dtype=torch.int32), torch.ones(ROWS, 1)


# --- inputs of the sending halves ---------------------------------------------------------------------------


def written_between_the_halves(group: tf.EPGroup, transport: str, name: str) -> str:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transport, timeout_s=20.0) as ws:
        layer, given = ws.dispatcher(), dict(zip(("hidden", "topk_idx", "topk_weights"), inputs(group), strict=True))
        ws.begin_step(ROWS)
        try:
            layer.dispatch_begin(**given)
            if name in given:
                given[name].add_(0)
            got = layer.dispatch_end()
            partial = torch.zeros_like(got.hidden)
            layer.combine_begin(partial, got)
            partial.add_(0)
            layer.combine_end()
        except tf.StateError as error:
            group.channel.barrier("told", 20.0)
            return str(error)
        return "nothing was said"


@pytest.mark.parametrize("name", ["hidden", "topk_idx", "topk_weights", "partial"])
@pytest.mark.parametrize(("transport", "ranks", "env"), KINDS)
def test_debug_mode_tells_of_a_write_between_the_halves(transport: str, ranks: int, env: dict[str, str], name: str) -> None:
    said = run_ranks(written_between_the_halves, ranks, transport, name, env={**env, "TOKENFERRY_DEBUG": "1"})
    assert all(f"{name} was written 1 times between the two halves" in each for each in said), said


def dropped_between_the_halves(group: tf.EPGroup, transport: str) -> list[float]:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transport, timeout_s=20.0) as ws:
        layer = ws.dispatcher()
        ws.begin_step(ROWS)
        given = list(inputs(group))
        watched = weakref.ref(given[0])
        layer.dispatch_begin(*given)
        given.clear()
        gc.collect()
        assert watched() is not None, "the call keeps what it was given"
        got = layer.dispatch_end()
        rows = got.hidden[: ROWS * group.size, 0].tolist()
        layer.combine(torch.zeros_like(got.hidden), got)
        return rows


@pytest.mark.parametrize(("transport", "ranks", "env"), KINDS)
def test_inputs_may_be_dropped_between_the_halves(transport: str, ranks: int, env: dict[str, str]) -> None:
    wanted = [1.0 + rank for rank in range(ranks) for _ in range(ROWS)]
    assert run_ranks(dropped_between_the_halves, ranks, transport, env=env) == [wanted] * ranks


# --- what a dispatch returns --------------------------------------------------------------------------------


def writes_to_what_it_got(group: tf.EPGroup, transport: str) -> bool:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transport, timeout_s=20.0) as ws:
        layer, (hidden, topk_idx, topk_weights) = ws.dispatcher(), inputs(group)
        before = [each.clone() for each in (hidden, topk_idx, topk_weights)]
        ws.begin_step(ROWS)
        got = layer.dispatch(hidden, topk_idx, topk_weights)
        for each in (got.hidden, got.topk_idx, got.topk_weights):
            each.fill_(0)
        out = layer.combine(got.hidden, got)
        out.fill_(7)
        unchanged = all(torch.equal(a, b) for a, b in zip(before, (hidden, topk_idx, topk_weights), strict=True))
        return unchanged and not bool((got.hidden == 7).any())


@pytest.mark.parametrize(("transport", "ranks", "env"), KINDS)
def test_in_debug_mode_a_write_to_it_never_reaches_the_caller_s_rows(transport: str, ranks: int, env: dict[str, str]) -> None:
    assert run_ranks(writes_to_what_it_got, ranks, transport, env={**env, "TOKENFERRY_DEBUG": "1"}) == [True] * ranks


# --- gloo: how long a blocked call may last -----------------------------------------------------------------


def blocked(group: tf.EPGroup, timeout_s: float) -> float:
    ws = tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport="collective", timeout_s=timeout_s)
    layer = ws.dispatcher()
    ws.begin_step(ROWS)
    if group.rank == 1:
        group.channel.barrier("left", 30.0)
        return 0.0
    threading.Timer(0.5, ws.close).start()
    start = time.monotonic()
    with pytest.raises(tf.TokenferryError):
        layer.dispatch(*inputs(group))
    took_s = time.monotonic() - start
    group.channel.barrier("left", 30.0)
    return took_s


@pytest.mark.ranks
def test_a_call_that_another_thread_closed_leaves_within_the_time_out_over_gloo() -> None:
    """gloo has no way to wake it earlier; the documents say so."""
    assert run_ranks(blocked, 2, 3.0)[0] < 3.0 + 2.0


# --- errors by the name that was called ---------------------------------------------------------------------


@pytest.fixture
def ws():
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4) as workspace:
        yield workspace


CALLS = {
    "dispatch": lambda layer: layer.dispatch(*inputs_of_one()),
    "dispatch_begin": lambda layer: layer.dispatch_begin(*inputs_of_one()),
    "combine": lambda layer: layer.combine(torch.zeros(ROWS, 8)),
    "combine_begin": lambda layer: layer.combine_begin(torch.zeros(ROWS, 8)),
}


def inputs_of_one():
    return inputs(tf.EPGroup(device="cpu"))


@pytest.mark.parametrize("call", CALLS)
def test_an_error_speaks_of_what_was_called(ws: tf.Workspace, call: str) -> None:
    with pytest.raises(tf.StateError, match=rf"^{call} in layer 0: the workspace is without a step"):
        CALLS[call](ws.dispatcher())


@pytest.mark.parametrize("num_tokens", [2.0, "2", None, True, torch.tensor(2)], ids=repr)
def test_a_count_of_another_type_is_no_matter_of_shape(ws: tf.Workspace, num_tokens: object) -> None:
    with pytest.raises(tf.UsageError, match="num_tokens must be an int") as caught:
        ws.begin_step(num_tokens)
    assert type(caught.value) is tf.UsageError


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype="bfloat16"),
        lambda: Experts(ExpertsConfig(hidden_size=8, intermediate_size=8, num_experts=4), range(4), dtype="bfloat16"),
        lambda: RouterConfig(hidden_size=8, num_experts=4, topk=1, idx_dtype="bfloat16"),
    ],
    ids=["config", "experts", "router"],
)
def test_a_name_in_place_of_a_dtype_is_shown_as_a_name(make) -> None:
    with pytest.raises(tf.UsageError, match="got 'bfloat16'"):
        make()


# --- what stays in its process ------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda function: function.__name__)
@pytest.mark.parametrize("what", ["EPGroup", "Workspace", "Dispatcher", "GraphRunner", "MoELayer"])
def test_what_stands_on_a_process_says_so_when_it_is_pickled_or_copied(ws: tf.Workspace, what: str, leave) -> None:
    routing = RouterConfig(hidden_size=8, num_experts=4, topk=1)
    shape = ExpertsConfig(hidden_size=8, intermediate_size=8, num_experts=4)
    made = {
        "EPGroup": lambda: ws.group,
        "Workspace": lambda: ws,
        "Dispatcher": ws.dispatcher,
        "GraphRunner": lambda: tf.GraphRunner(ws, lambda x: x, [4], inputs=[torch.empty(0, 8)]),
        "MoELayer": lambda: MoELayer(ws, Router(routing, dtype=torch.float32), Experts(shape, range(4), dtype=torch.float32)),
    }[what]()
    with pytest.raises(tf.UsageError, match=rf"a {what} can be neither pickled nor copied; \w+"):
        leave(made)


def test_the_version_is_the_installed_one() -> None:
    assert tf.__version__ == metadata.version("tokenferry")
