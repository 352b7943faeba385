"""`torch.compile(fullgraph=True)` passes through a workspace's calls: the same bits, checks and order as eager code."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks

CONFIG = tf.MoEConfig(hidden_size=16, num_experts=4, topk=2)
ROWS = 5
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for CPU code")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(rows: int = ROWS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 16, generator=generator).to(torch.bfloat16),
        torch.randint(-1, 4, (rows, 2), generator=generator),
        torch.rand(rows, 2, generator=generator),
    )


def forward_of(ws: tf.Workspace, num_layers: int = 2) -> Forward:
    """A model whose experts read all that a dispatch gives; rows from V on are left out, as they may hold anything."""
    layers = [ws.dispatcher() for _ in range(num_layers)]

    def forward(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        ws.begin_step(hidden.shape[0])
        for layer in layers:
            got = layer.dispatch(hidden, topk_idx, topk_weights)
            weight = torch.where(got.topk_idx >= 0, got.topk_weights, 0).sum(dim=1, keepdim=True)
            partial = (torch.relu(got.hidden) * weight).to(torch.bfloat16)
            hidden = layer.combine(partial, got) + hidden
        return hidden

    return forward


def compiled_as_eager(group: tf.EPGroup, transport: str, backend: str, counts: str = "uneven") -> int:
    """Compares compiled with eager calls on several inputs; returns how many there were."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport=transport, counts=counts) as ws, torch.no_grad():
        eager = forward_of(ws)
        compiled = torch.compile(eager, fullgraph=True, backend=backend)
        for seed, rows in enumerate((ROWS, ROWS, 3)):
            given = inputs(rows, seed * 10 + group.rank)
            wanted = eager(*given)
            assert torch.equal(compiled(*given), wanted), (seed, rows)
    return 3


@pytest.mark.long
@needs_compiler
def test_local_compiled_by_inductor() -> None:
    assert compiled_as_eager(tf.EPGroup(), "local", "inductor") == 3


def test_local_on_a_backend_that_works_on_copies() -> None:
    assert compiled_as_eager(tf.EPGroup(), "local", "aot_eager") == 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_promise_of_the_largest_batch_passes_through(backend: str) -> None:
    with tf.Workspace(CONFIG, tf.EPGroup(), max_tokens_per_rank=8, transport="local") as ws, torch.no_grad():
        layer = ws.dispatcher()

        def forward(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, most: int) -> torch.Tensor:
            ws.begin_step(hidden.shape[0], max_tokens=most)
            got = layer.dispatch(hidden, topk_idx, topk_weights)
            return layer.combine(got.hidden * got.max_expert_rows, got)

        compiled = torch.compile(forward, fullgraph=True, backend=backend)
        for rows, most in ((ROWS, ROWS), (3, 7), (3, 4)):
            given = inputs(rows)
            assert torch.equal(compiled(*given, most), given[0] * most)
            assert ws.step.max_expert_rows == most
        with pytest.raises(tf.CapacityError, match="num_tokens, 3, and the workspace's max_tokens_per_rank, 8; got 2"):
            compiled(*inputs(3), 2)


@pytest.mark.ranks
@pytest.mark.parametrize("counts", ["equal", "uneven"])
def test_collective_on_two_ranks(counts: str) -> None:
    assert run_ranks(compiled_as_eager, 2, "collective", "aot_eager", counts, timeout_s=120) == [3, 3]


@pytest.mark.interpreter
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_symmetric_compiled_by_inductor(world_size: int) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler for CPU code")
    env = {"TRITON_INTERPRET": "1"}
    assert run_ranks(compiled_as_eager, world_size, "p2p", "inductor", timeout_s=150, env=env) == [3] * world_size


def relu_of_gathered(group: tf.EPGroup) -> bool:
    """relu(got.hidden), compiled: whether the workspace's buffer holds what was dispatched, negative values and all."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p") as ws, torch.no_grad():
        layer = ws.dispatcher()

        def forward(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            return torch.relu(layer.dispatch(hidden, topk_idx, topk_weights).hidden)

        hidden, topk_idx, topk_weights = inputs()
        ws.begin_step(ROWS)
        got = torch.compile(forward, fullgraph=True)(hidden, topk_idx, topk_weights)
        buffer = ws.active_transport.dispatch_end().hidden_RH
        assert torch.equal(got[:ROWS], torch.relu(hidden))
        untouched = torch.equal(buffer[:ROWS], hidden) and bool((hidden < 0).any())
        layer.combine(got)
        return untouched


@pytest.mark.interpreter
def test_the_compiler_does_not_write_over_the_buffers() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler for CPU code")
    assert run_ranks(relu_of_gathered, 1, timeout_s=120, env={"TRITON_INTERPRET": "1"}) == [True]


def copies_are_refused(group: tf.EPGroup) -> str:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p") as ws, torch.no_grad():
        with pytest.raises(tf.UsageError) as caught:
            torch.compile(forward_of(ws), fullgraph=True, backend="aot_eager")(*inputs())
        return str(caught.value)


@pytest.mark.interpreter
def test_a_backend_that_works_on_copies_is_refused_where_peers_write() -> None:
    (said,) = run_ranks(copies_are_refused, 1, timeout_s=120, env={"TRITON_INTERPRET": "1"})
    assert "use backend='inductor'" in said


# --- errors in compiled code ----------------------------------------------------------------------------------------


def open_local() -> tf.Workspace:
    return tf.Workspace(CONFIG, tf.EPGroup(), max_tokens_per_rank=8, transport="local")


def test_wrong_order_is_a_state_error() -> None:
    with open_local() as ws, torch.no_grad():
        layer = ws.dispatcher()

        def twice(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            first = layer.dispatch(hidden, topk_idx, topk_weights).hidden
            return first + layer.dispatch(hidden, topk_idx, topk_weights).hidden

        ws.begin_step(ROWS)
        with pytest.raises(tf.StateError, match="between a dispatch and its combine"):
            torch.compile(twice, fullgraph=True, backend="aot_eager")(*inputs())


def test_wrong_arguments_are_named() -> None:
    with open_local() as ws, torch.no_grad():
        hidden, topk_idx, topk_weights = inputs()
        with pytest.raises(tf.UsageError, match=r"topk_idx holds 1[0-2], but"):
            torch.compile(forward_of(ws), fullgraph=True, backend="aot_eager")(hidden, topk_idx + 9, topk_weights)


def test_after_close_compiled_code_raises() -> None:
    with open_local() as ws, torch.no_grad():
        compiled = torch.compile(forward_of(ws), fullgraph=True, backend="aot_eager")
        compiled(*inputs())
    with pytest.raises(tf.StateError, match="closed"), torch.no_grad():
        compiled(*inputs())


def test_an_eager_combine_answers_a_compiled_dispatch() -> None:
    with open_local() as ws, torch.no_grad():
        layer = ws.dispatcher()
        given = inputs()
        ws.begin_step(ROWS)
        got = torch.compile(layer.dispatch, fullgraph=True, backend="aot_eager")(*given)
        assert torch.equal(layer.combine(got.hidden, got), given[0])
        assert ws.step.num_tokens == ROWS


@pytest.mark.parametrize(
    ("rows", "out", "said"),
    [
        (3, torch.zeros(3, 16, dtype=torch.bfloat16), ""),
        (1, torch.zeros(3, 16, dtype=torch.bfloat16), "they must be equal"),
        (3, torch.zeros(3, 16), "out must be torch.bfloat16, got torch.float32"),
    ],
    ids=["right", "more-rows", "another-dtype"],
)
def test_memory_for_the_sums_is_checked_in_compiled_code_too(rows: int, out: torch.Tensor, said: str) -> None:
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4, transport="local") as ws, torch.no_grad():
        layer = ws.dispatcher()

        def forward(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            ws.begin_step(hidden.shape[0])
            got = layer.dispatch(hidden, topk_idx, topk_weights)
            return layer.combine(got.hidden * 2, got, out)

        given = torch.ones(rows, 16, dtype=torch.bfloat16), torch.zeros(rows, 2, dtype=torch.int64), torch.ones(rows, 2)
        compiled = torch.compile(forward, fullgraph=True, backend="eager")
        if said:
            with pytest.raises(Exception, match=said):
                compiled(*given, out)
        else:
            assert compiled(*given, out) is out
            assert bool((out == 2).all())
