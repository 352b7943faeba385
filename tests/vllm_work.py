"""What rank processes do with our manager in the place of a small vLLM's."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tokenferry as tf
from fake_vllm import ALL2ALL, CPU_COMMUNICATOR, FINALIZE, OUTPUTS, PARALLEL_STATE, current, fake_config, forward, place_fake_vllm
from tokenferry.integrations.vllm import cpu, plugin
from tokenferry.integrations.vllm.settings import LOGGER
from tokenferry.testing import same_bits

HIDDEN, TOPK, EXPERTS, LAYERS = 64, 2, 8, 2
COUNTS = {
    2: ([3, 5], [0, 4], [7, 1], [4, 0], [0, 0], [1, 1]),
    3: ([3, 0, 5], [0, 0, 2], [1, 16, 1]),
}


def managers(group: tf.EPGroup, settings: dict[str, Any], *, fake: bool = True) -> tuple[Any, Any]:
    """vLLM's own manager, and ours. `fake`: whether the small vLLM is still to be placed."""
    dist.init_process_group("gloo", store=dist.PrefixStore("vllm", group.store), rank=group.rank, world_size=group.size)
    if fake:
        place_fake_vllm()
    stock = sys.modules[ALL2ALL].AgRsAll2AllManager
    plugin.register()
    plugin.register()
    cpu.bring_what_is_missing()
    communicator = sys.modules[CPU_COMMUNICATOR].CpuCommunicator()
    communicator.world_size, communicator.rank_in_group, communicator.device_group = group.size, group.rank, dist.group.WORLD
    theirs = SimpleNamespace(world_size=group.size, device_communicator=communicator, device=torch.device("cpu"))
    sys.modules[PARALLEL_STATE].groups.update(dp=theirs, ep=theirs)
    with current(fake_config({"timeout_s": 20, "allow_unknown_version": True, **settings}, num_experts=EXPERTS)):
        ours = communicator.all2all_manager = sys.modules[ALL2ALL].AgRsAll2AllManager(dist.group.WORLD)
    return stock(dist.group.WORLD), ours


def rows(rank: int, num_tokens: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows, weights that are not contiguous, and expert numbers."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(TOPK, num_tokens, generator=generator).T
    return hidden, weights, torch.randint(0, EXPERTS, (num_tokens, TOPK), dtype=torch.int32, generator=generator)


def same(name: str, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for index, (left, right) in enumerate(zip(got, want, strict=True)):
        assert left.dtype == right.dtype, f"{name}, tensor {index}: {left.dtype} against {right.dtype}"
        assert same_bits(left, right), f"{name}, tensor {index}: other bits"


def partial_of(gathered: torch.Tensor, rank: int) -> torch.Tensor:
    return gathered * (1.0078125 * (rank + 1))


def run_against_plain_gathers(group: tf.EPGroup, transport: str, dtype: torch.dtype, into_output: bool) -> tuple[str, int, int]:
    """Whole forwards of two layers; returns the transport and the numbers of steps begun and forwards made."""
    stock, ours = managers(group, {"transport": transport})
    counts = COUNTS[group.size]
    for seed, sizes in enumerate(counts):
        own = rows(group.rank, sizes[group.rank], seed, dtype)
        with forward(sizes):
            for layer in range(LAYERS):
                name = f"{sizes}, layer {layer}"
                want, got = stock.dispatch(*own), ours.dispatch(*own)
                same(f"{name}: dispatch", got, want)
                total = stock.combine(partial_of(want[0], group.rank))
                same(f"{name}: combine", (combined(ours, got[0], own[0], group.rank, into_output),), (total,))
    (workspace,) = ours.exchange.workspaces()
    outcome = workspace.transport, workspace.last_step, len(counts)
    ours.destroy()
    assert ours.destroyed and not ours.exchange.workspaces()
    assert ours.calls == [], "vLLM's own gathers were called"
    return outcome


def combined(ours: Any, gathered: torch.Tensor, own: torch.Tensor, rank: int, into_output: bool) -> torch.Tensor:
    partial = partial_of(gathered, rank)
    if not into_output:
        return ours.combine(partial)
    place = ours.allocate_combine_input(tuple(partial.shape), partial.dtype, partial.device)
    if place is not None:
        partial = place.copy_(partial)
    output = torch.full_like(own, float("nan"))
    with Copies() as copies:
        assert ours.combine_into_output(partial, output) is output
    is_checked = os.environ.get("TOKENFERRY_DEBUG", "") == "1"  # then rows are copied, to be compared with what they become
    if ours.exchange.workspaces()[0].transport == "p2p" and not is_checked:
        assert copies.found == [], "the kernel writes into vLLM's output itself"
    return output


class Copies(TorchDispatchMode):
    """The operators within it that copy rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::copy_", "aten::clone", "aten::_to_copy"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def run_a_release_that_copies_sums(group: tf.EPGroup) -> list[bool]:
    """vLLM's own `finalize` where its managers have no `combine_into_output`: whether it copies, with ours and with its own."""
    place_fake_vllm()
    del sys.modules[ALL2ALL].AgRsAll2AllManager.combine_into_output
    stock, ours = managers(group, {}, fake=False)
    communicator = sys.modules[PARALLEL_STATE].groups["ep"].device_communicator
    finalizer, said, outputs = sys.modules[FINALIZE].MoEPrepareAndFinalizeNaiveDPEPModular(), [], []
    for sizes in ([3, 5], [4, 0]):  # where the others bring nothing, vLLM's experts write their rows into the output itself
        own = rows(group.rank, sizes[group.rank], 0, torch.bfloat16)
        for manager in (ours, stock):
            communicator.all2all_manager = manager
            with forward(sizes):
                partial = partial_of(manager.dispatch(*own)[0], group.rank)
                outputs.append(torch.full_like(own[0], float("nan")))
                if partial.shape == own[0].shape:
                    partial = outputs[-1].copy_(partial)
                finalizer.finalize(outputs[-1], partial)
            said.append(finalizer.copies)
        same(f"{sizes}", (outputs[-2],), (outputs[-1],))
    assert ours.exchange.output is None
    return said


def run_logits(group: tf.EPGroup, dtype: torch.dtype) -> None:
    """Router logits of all experts, instead of chosen ones."""
    stock, ours = managers(group, {})
    for seed, sizes in enumerate(COUNTS[group.size]):
        hidden = rows(group.rank, sizes[group.rank], seed, torch.bfloat16)[0]
        logits = torch.randn(hidden.shape[0], EXPERTS, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with forward(sizes):
            want, got = stock.dispatch_router_logits(hidden, logits), ours.dispatch_router_logits(hidden, logits)
            same(f"{sizes}: dispatch_router_logits", got, want)
            partial = partial_of(want[0], group.rank)
            same(f"{sizes}: combine", (ours.combine(partial),), (stock.combine(partial),))
    assert ours.calls == []


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What the plug-in logs within it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger(LOGGER).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)


def run_fallbacks(group: tf.EPGroup) -> dict[str, tuple[list[str], list[str]]]:
    """Which of vLLM's own calls carry what ours cannot, and what is logged of it, twice each; a forward that ours carries follows
    each."""
    _, ours = managers(group, {})
    sizes = [3, 5]
    hidden, weights, ids = rows(group.rank, sizes[group.rank], 0, torch.bfloat16)
    mappings = [torch.full((hidden.shape[0],), -1, dtype=torch.int32)]
    float8, scales = hidden.to(torch.float8_e4m3fn), torch.ones(hidden.shape[0], 1)
    calls: dict[str, Any] = {
        "sequence parallel": lambda: ours.dispatch(hidden, weights, ids, True),
        "LoRA mappings": lambda: ours.dispatch(hidden, weights, ids, extra_tensors=mappings),
        "LoRA mappings of float8 rows": lambda: ours.dispatch(float8, weights, ids, extra_tensors=[scales, *mappings]),
        "one scale of each rank's rows": lambda: ours.dispatch(float8, weights, ids, extra_tensors=mappings),
        "complex rows": lambda: ours.dispatch(hidden.to(torch.complex64), weights, ids),
        "double weights": lambda: ours.dispatch(hidden, weights.double(), ids),
        "logits with LoRA mappings": lambda: ours.dispatch_router_logits(hidden, weights, extra_tensors=mappings),
    }
    outcome = {}
    for name, call in calls.items():
        with logged() as lines:
            for _ in range(2):
                ours.calls.clear()
                with forward(sizes):
                    gathered = call()[0].real.to(torch.bfloat16)
                    assert ours.combine(gathered).shape == hidden.shape
                    outcome[name] = list(ours.calls), lines
                    assert ours.combine(ours.dispatch(hidden, weights, ids)[0]).shape == hidden.shape
                    assert ours.calls == outcome[name][0], f"after {name}: vLLM's own gathers carried rows that ours can"
    return outcome


def run_draft_model(group: tf.EPGroup) -> list[int]:
    """A draft model's forward, with fewer rows, inside the target model's worker: numbers of steps after each forward."""
    _, ours = managers(group, {})
    steps = []
    for sizes in ([4, 6], [1, 2], [1, 2], [4, 6]):
        own = rows(group.rank, sizes[group.rank], 0, torch.bfloat16)
        with forward(sizes):
            for _ in range(LAYERS):
                ours.combine(ours.dispatch(*own)[0])
        steps.append(ours.exchange.workspaces()[0].last_step)
    return steps


def run_other_counts_in_a_forward(group: tf.EPGroup) -> int:
    """Layers of one forward with other counts than the first, as where a model drops rows on its way: steps begun."""
    _, ours = managers(group, {})
    with forward([4, 6]):
        for sizes in ([4, 6], [4, 6], [9, 2]):
            sys.modules["vllm.forward_context"].get_forward_context().sizes = sizes
            got = ours.dispatch(*rows(group.rank, sizes[group.rank], 0, torch.bfloat16))
            assert got[0].shape[0] == sum(sizes)
            ours.combine(got[0])
    return ours.exchange.workspaces()[0].last_step


def run_idle_worker(group: tf.EPGroup, from_tensor: bool) -> list[list[list[int]]]:
    """Rank 1 has no requests, and its worker runs dummy forwards; of rank 0's two rows one fills up a graph. Which expert numbers
    arrive, then with a draft model, then outside of the worker. `from_tensor`: the kernels read how many rows are real, as in
    captured graphs."""
    _, ours = managers(group, {})
    if from_tensor:
        ours.exchange._on_device = torch.full((1,), 16, dtype=torch.int32)
    from tokenferry.integrations.vllm import Worker

    seen = []

    def step(_: object) -> str:
        with forward([2, 1]):
            hidden, _, ids = ours.dispatch(*rows(group.rank, [2, 1][group.rank], 0, torch.bfloat16))
            seen.append(ids.tolist())
            ours.combine(hidden)
        return "output"

    for drafts in (None, "a draft model"):
        worker = Worker(step, SimpleNamespace(speculative_config=drafts))
        if group.rank == 0:
            assert worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=1)) == "output"
        else:
            worker.execute_dummy_batch()
    step(None)
    return seen


def run_worker_beside_other_managers(group: tf.EPGroup) -> dict[str, list[str]]:
    """What a worker logs as it starts, by the manager that vLLM has made, and by whether tokenferry is on."""
    stock, ours = managers(group, {})
    from tokenferry.integrations.vllm import Worker

    communicator = sys.modules[PARALLEL_STATE].groups["ep"].device_communicator
    outcome = {}
    with logged() as lines:
        for name, manager, settings in (("ours", ours, {}), ("another", stock, {}), ("another, off", stock, False)):
            communicator.all2all_manager = manager
            Worker(None, fake_config(settings)).init_device()
            outcome[name] = lines.copy()
            lines.clear()
    return outcome


def run_slow_warm_up(group: tf.EPGroup) -> list[str]:
    """Rank 1 compiles for longer than the time-out, between a dispatch and its combine: in the forward that opens the workspace,
    and in the next one. Then it is late in a step, which is no warm-up."""
    _, ours = managers(group, {"timeout_s": 2.0})
    from tokenferry.integrations.vllm import Worker

    def step(what: str) -> str:
        with forward([2, 1]):
            got = ours.dispatch(*rows(group.rank, [2, 1][group.rank], 0, torch.bfloat16))[0]
            time.sleep(5.0 * group.rank)
            ours.combine(got)
        return what

    worker, said = Worker(step), []
    for call in (worker.determine_available_memory, worker.compile_or_warm_up_model, lambda: worker.execute_model("step")):
        try:
            said.append(call())
        except tf.PeerError as error:
            said.append(f"{type(error).__name__} for rank {error.rank}")
    return said


def run_failing_step(group: tf.EPGroup) -> str:
    """Rank 1's worker fails in the middle of a step, outside of our calls: what rank 0's worker raises."""
    _, ours = managers(group, {})
    from tokenferry.integrations.vllm import Worker

    def step(fails: bool) -> None:
        with forward([2, 1]):
            ours.combine(ours.dispatch(*rows(group.rank, [2, 1][group.rank], 0, torch.bfloat16))[0])
            if fails:
                raise ValueError("out of pages")

    worker = Worker(step)
    worker.execute_model(False)
    try:
        worker.execute_model(group.rank == 1)
        worker.execute_model(False)
    except (tf.PeerFailedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def run_asynchronous_failure(group: tf.EPGroup) -> list[str]:
    """Rank 1 gives up while the others' steps still run: their workers have returned, the tokens come later. What rank 0 gets of
    a step before that, and of this one."""
    _, ours = managers(group, {})
    from tokenferry.integrations.vllm import Worker

    class Later(sys.modules[OUTPUTS].AsyncModelRunnerOutput):
        """Its tokens reach the host when rank 1 has failed, if it is to fail."""

        def __init__(self, name: str) -> None:
            self.name = name

        def get_output(self) -> str:
            workspace = ours.exchange.workspaces()[0]
            if self.name == "second":
                if group.rank == 1:
                    workspace.fail("out of pages")
                deadline = time.monotonic() + 20
                while not workspace.lifecycle.error and time.monotonic() < deadline:
                    with contextlib.suppress(tf.PeerError):  # what the device's own wait would have found
                        workspace.check()
            return self.name

    def step(name: str) -> Any:
        with forward([2, 1]):
            ours.combine(ours.dispatch(*rows(group.rank, [2, 1][group.rank], 0, torch.bfloat16))[0])
        return Later(name)

    worker, said = Worker(step), []
    for call, name in ((worker.execute_model, "first"), (worker.sample_tokens, "second")):
        output = call(name)
        try:
            said.append(output.get_output())
        except tf.PeerFailedError as error:
            said.append(f"{error.rank}: {error.reason}")
    return said


def run_new_kinds_after_the_profile_run(group: tf.EPGroup) -> list[list[str]]:
    """Rows of two kinds before vLLM has counted its memory, or none, and of a third after it: which calls were vLLM's own."""
    _, ours = managers(group, {})
    hidden, weights, ids = rows(group.rank, 2, 0, torch.bfloat16)
    said = []

    def carry(given: torch.Tensor) -> None:
        ours.calls.clear()
        with forward([2, 2]):
            assert ours.combine(ours.dispatch(given, weights, ids)[0]).shape == given.shape
        said.append(list(ours.calls))

    from tokenferry.integrations.vllm import Worker

    sys.modules["vllm.platforms"].current_platform.is_cpu = staticmethod(lambda: False)
    Worker(lambda _: None).determine_available_memory()  # which has not run the model
    Worker(lambda _: [carry(given) for given in (hidden, hidden.float())]).determine_available_memory()
    for given in (hidden.half(), hidden.float(), hidden):
        carry(given)
    return said
