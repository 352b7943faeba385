"""A vLLM with the modules, classes and functions that the plug-in looks for, and no more. Its manager gathers over gloo."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

ALL2ALL = "vllm.distributed.device_communicators.all2all"
CPU_COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator"
CPU_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
PARALLEL_STATE = "vllm.distributed.parallel_state"
FORWARD_CONTEXT = "vllm.forward_context"
FINALIZE = "vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep"
CPU_WORKER = "vllm.v1.worker.cpu_worker"
OUTPUTS = "vllm.v1.outputs"

ALL2ALL_SOURCE = f"""
from vllm.config import get_current_vllm_config
from {PARALLEL_STATE} import get_dp_group, get_ep_group
from {FORWARD_CONTEXT} import get_forward_context

class All2AllManagerBase:
    def __init__(self, cpu_group, tcp_store_group=None):
        self.cpu_group, self.rank, self.world_size = cpu_group, cpu_group.rank(), cpu_group.size()

    def allocate_combine_input(self, shape, dtype, device, is_sequence_parallel=False):
        return None

    def destroy(self):
        self.destroyed = True

class AgRsAll2AllManager(All2AllManagerBase):
    def __init__(self, cpu_group, tcp_store_group=None):
        super().__init__(cpu_group, tcp_store_group)
        self.calls = []

    def _get_comm_group(self, is_sequence_parallel):
        return get_ep_group() if is_sequence_parallel else get_dp_group()

    def _get_sizes(self, num_local_tokens, comm_group):
        return get_forward_context().sizes

    def _gather(self, name, tensors):
        self.calls.append(name)
        communicator = get_dp_group().device_communicator
        return communicator.all_gatherv(list(tensors), 0, self._get_sizes(0, None))

    def dispatch_router_logits(self, hidden_states, router_logits, is_sequence_parallel=False, extra_tensors=None):
        got = self._gather("dispatch_router_logits", (hidden_states, router_logits, *(extra_tensors or ())))
        return tuple(got[:2]) if extra_tensors is None else (*got[:2], got[2:])

    def dispatch(self, hidden_states, topk_weights, topk_ids, is_sequence_parallel=False, extra_tensors=None):
        got = self._gather("dispatch", (hidden_states, topk_weights, topk_ids, *(extra_tensors or ())))
        return tuple(got[:3]) if extra_tensors is None else (*got[:3], got[3:])

    def combine(self, hidden_states, is_sequence_parallel=False):
        self.calls.append("combine")
        return get_dp_group().device_communicator.reduce_scatterv(hidden_states, 0, self._get_sizes(0, None))

    def combine_into_output(self, hidden_states, output, is_sequence_parallel=False):
        return output.copy_(self.combine(hidden_states))

    def destroy(self):
        super().destroy()
"""

PARALLEL_STATE_SOURCE = """
groups = {}

def get_dp_group():
    return groups["dp"]

def get_ep_group():
    assert "ep" in groups, "expert parallel group is not initialized"
    return groups["ep"]
"""

FORWARD_CONTEXT_SOURCE = """
contexts = []

def get_forward_context():
    return contexts[-1]
"""

CPU_EXPERTS_SOURCE = """
class CPUUnquantizedExperts:
    def apply(self, output, hidden_states, topk_weights, topk_ids, expert_map, *, activation):
        self.got = (topk_weights, topk_ids, expert_map, activation)
"""

CPU_WORKER_SOURCE = """
class CPUWorker:
    def __init__(self, step, vllm_config=None):
        self.step, self.vllm_config = step, vllm_config

    def init_device(self):
        pass

    def determine_available_memory(self):
        return self.step("memory")

    def compile_or_warm_up_model(self):
        return self.step("warm-up")

    def execute_model(self, scheduler_output):
        return self.step(scheduler_output)

    def sample_tokens(self, grammar_output):
        return self.step(grammar_output)

    def execute_dummy_batch(self):
        self.step(None)
"""

FINALIZE_SOURCE = f"""
from {PARALLEL_STATE} import get_ep_group

class MoEPrepareAndFinalizeNaiveDPEPModular:
    def finalize(self, output, fused_expert_output):
        combined = get_ep_group().device_communicator.all2all_manager.combine(fused_expert_output)
        self.copies = combined is not output
        output.copy_(combined)
"""

SOURCES = {
    "vllm": "",
    "vllm.config": "configs = []\ndef get_current_vllm_config():\n    return configs[-1]",
    "vllm.platforms": "class current_platform:\n    is_cpu = staticmethod(lambda: True)",
    "vllm.envs": "VLLM_MOE_SKIP_PADDING = False",
    "vllm.distributed": "",
    "vllm.distributed.device_communicators": "",
    PARALLEL_STATE: PARALLEL_STATE_SOURCE,
    FORWARD_CONTEXT: FORWARD_CONTEXT_SOURCE,
    ALL2ALL: ALL2ALL_SOURCE,
    CPU_COMMUNICATOR: "class CpuCommunicator: ...",
    "vllm.model_executor": "",
    "vllm.model_executor.layers": "",
    "vllm.model_executor.layers.fused_moe": "",
    "vllm.model_executor.layers.fused_moe.experts": "",
    CPU_EXPERTS: CPU_EXPERTS_SOURCE,
    "vllm.model_executor.layers.fused_moe.prepare_finalize": "",
    FINALIZE: FINALIZE_SOURCE,
    "vllm.v1": "",
    "vllm.v1.worker": "",
    CPU_WORKER: CPU_WORKER_SOURCE,
    OUTPUTS: "class AsyncModelRunnerOutput: ...",
}


def place_fake_vllm() -> None:
    """Puts it into `sys.modules` for good: for a process of its own."""
    for name, source in SOURCES.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        exec(source, vars(module))


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there for the length of a test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in SOURCES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # taken out again by monkeypatch
    place_fake_vllm()


def fake_config(settings: object = None, *, num_experts: int = 8, most_rows: int = 16, eager: bool = True) -> SimpleNamespace:
    """A `VllmConfig`, as far as the manager asks for it."""
    model = SimpleNamespace(get_num_experts=lambda: num_experts, enforce_eager=eager)
    return SimpleNamespace(
        additional_config={} if settings is None else {"tokenferry": settings},
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=most_rows),
        parallel_config=SimpleNamespace(enable_eplb=False),
    )


@contextlib.contextmanager
def current(config: SimpleNamespace) -> Iterator[None]:
    """As vLLM's `set_current_vllm_config`."""
    configs = sys.modules["vllm.config"].configs
    configs.append(config)
    try:
        yield
    finally:
        configs.pop()


@contextlib.contextmanager
def forward(sizes: list[int]) -> Iterator[None]:
    """A forward context in which rank r brings sizes[r] rows."""
    contexts = sys.modules[FORWARD_CONTEXT].contexts
    contexts.append(SimpleNamespace(sizes=sizes, additional_kwargs={}))
    try:
        yield
    finally:
        contexts.pop()


__all__ = [
    "ALL2ALL",
    "CPU_COMMUNICATOR",
    "CPU_EXPERTS",
    "FINALIZE",
    "OUTPUTS",
    "PARALLEL_STATE",
    "current",
    "fake_config",
    "fake_vllm",
    "forward",
]
