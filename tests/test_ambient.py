"""What the code around a call has set in torch never matters: workspaces open and reset within it, and work on both sides."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.ambient import plain_torch
from tokenferry.testing.data import RankInputs, make_inputs
from tokenferry.testing.numeric import same_bits

CONFIG = tf.MoEConfig(hidden_size=16, num_experts=4, topk=2)
TOKENS = (3, 2)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """With `fill_uninitialized_memory`, as is torch's default in this mode."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference-mode": torch.inference_mode,
    "no-grad": torch.no_grad,
    "grad": torch.enable_grad,
    "device-context": lambda: torch.device("meta"),
    "default-device": default_device,
    "default-dtype": default_dtype,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "deterministic": deterministic,
}
KINDS = [
    pytest.param("local", 1, {}, id="local"),
    pytest.param("collective", 2, {}, id="collective", marks=pytest.mark.ranks),
    pytest.param("p2p", 2, {"TRITON_INTERPRET": "1"}, id="p2p", marks=pytest.mark.interpreter),
]
EACH_STATE = pytest.mark.parametrize("state", STATES)
EACH_KIND = pytest.mark.parametrize(("transport", "ranks", "env"), KINDS)

Results = list[torch.Tensor]


def step(
    ws: tf.Workspace, layers: list[tf.Dispatcher], own: RankInputs, around: list[contextlib.AbstractContextManager]
) -> Results:
    """A step whose layers run each in its own `around`. What arrived, and the combined rows."""
    results = []
    with around[0]:
        ws.begin_step(len(own.hidden))
    for layer, state in zip(layers, around[1:], strict=True):
        with state:
            got = layer.dispatch(own.hidden, own.topk_idx, own.topk_weights)
            num_rows = min(len(own.partial), len(got.hidden))  # in solo() this rank's own
            results += [each[:num_rows].clone() for each in (got.hidden, got.topk_idx, got.topk_weights)]
            partial = layer.combine_input()
            partial[:num_rows].copy_(own.partial[:num_rows])
            results.append(layer.combine(partial, got).clone())
    return results


def opened_in(group: tf.EPGroup, transport: str, state: str) -> list[str]:
    """Opens and resets within the state; after each, steps that begin inside or outside and have a layer on either side."""
    tokens, context = TOKENS[: group.size], STATES[state]
    inputs = make_inputs(CONFIG, tokens, seed=3, payload="normal")
    own = inputs[group.rank]
    expected = tf.reference.dispatch(
        *(list(column) for column in zip(*((i.hidden, i.topk_idx, i.topk_weights) for i in inputs), strict=True))
    )
    combined = tf.reference.combine([i.partial for i in inputs], tokens, CONFIG.dtype, CONFIG.dtype)[group.rank]
    wanted = [expected.hidden, expected.topk_idx, expected.topk_weights, combined] * 2
    plain = contextlib.nullcontext
    kinds = {
        "begun inside": lambda: [context(), plain(), context()],
        "begun outside": lambda: [plain(), context(), plain()],
    }
    wrong = []
    with context():
        ws = tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transport, timeout_s=20.0)
    with ws:
        layers = [ws.dispatcher(), ws.dispatcher()]
        for name, around in kinds.items():
            got = step(ws, layers, own, around())
            wrong += [name for one, other in zip(got, wanted, strict=True) if not same_bits(one, other)]
        with context():
            ws.reset()
        for name, around in kinds.items():
            got = step(ws, layers, own, around())
            wrong += [f"{name} after reset" for one, other in zip(got, wanted, strict=True) if not same_bits(one, other)]
        with context(), ws.solo():
            step(ws, layers, own, kinds["begun inside"]())
    return wrong


@EACH_STATE
@EACH_KIND
def test_a_workspace_opened_and_reset_in_it_gives_the_same_bits_inside_and_outside(
    on_ranks: RankPools, transport: str, ranks: int, env: dict[str, str], state: str
) -> None:
    assert on_ranks(opened_in, ranks, transport, state, env=env) == [[]] * ranks


@EACH_STATE
def test_in_debug_mode_too(on_ranks: RankPools, state: str) -> None:
    assert on_ranks(opened_in, 1, "local", state, env={"TOKENFERRY_DEBUG": "1"}) == [[]]


@pytest.mark.parametrize("state", [state for state in STATES if state not in ("default-dtype", "deterministic")])
def test_plain_torch_puts_it_aside_and_back(state: str) -> None:
    def seen() -> tuple[object, ...]:
        made = torch.ones(2, 2)
        product = made @ made if made.device.type == "cpu" else made
        return made.device, made.is_inference(), product.dtype, torch.is_grad_enabled()

    with STATES[state]():
        before = seen()
        with plain_torch(torch.device("cpu")):
            assert seen() == (torch.device("cpu"), False, torch.float32, False)
        assert seen() == before
