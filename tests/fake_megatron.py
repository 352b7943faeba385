"""A megatron.core with the modules, names and parameters that `install()` looks for, made from the table of them, and no more."""

import sys
from types import ModuleType

import pytest

from tokenferry.integrations.megatron.known_versions import BASE, DISPATCHERS, EXPERT_ENTRIES, EXPERTS, NAMES

LAYER = "megatron.core.transformer.moe.moe_layer"
VERSION = "megatron.core.package_info"
BATCH_INVARIANT = "megatron.core.transformer.custom_layers.batch_invariant_kernels"

BASE_SOURCE = """
class MoETokenDispatcher:
    def __init__(self, config, pg_collection=None):
        self.made_by_megatron = (pg_collection.ep, pg_collection.expt_tp, pg_collection.tp_ep)

class MoEAllGatherTokenDispatcher(MoETokenDispatcher):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None):
        super().__init__(config, pg_collection)
"""

ENTRIES_SOURCE = """
import enum

class ActivationType(enum.Enum):
    SQUARED_RELU = "squared_relu"
    SWIGLU = "swiglu"
    GEGLU = "geglu"

calls = []

def mcore_fused_moe(hidden_states, probs, fc1_weight, fc2_weight, activation_type, num_local_experts, local_expert_start,
                    valid_tokens, routing_map, disable_fused_quant_kernels=False, out=None):
    calls.append(("mcore_fused_moe", dict(locals())))
    return "Megatron's"

def vllm_fused_moe(hidden_states, probs, fc1_weight, fc2_weight, activation_type, num_local_experts, local_expert_start,
                   valid_tokens, routing_map, out=None, num_tokens_hint=None):
    calls.append(("vllm_fused_moe", dict(locals())))
    return "Megatron's"
"""

EXPERTS_SOURCE = f"""
from {EXPERT_ENTRIES} import mcore_fused_moe, vllm_fused_moe

class InferenceGroupedMLP:
    def _mcore_fused_moe_forward(self, hidden_states, probs, routing_map):
        return mcore_fused_moe(hidden_states, probs, *self.rest[:-1], routing_map=routing_map, **self.rest[-1])

    def _vllm_forward(self, hidden_states, probs, routing_map):
        return vllm_fused_moe(hidden_states, probs, *self.rest[:-1], routing_map=routing_map, **self.rest[-1])
"""

LAYER_SOURCE = f"from {DISPATCHERS} import NCCLAllGatherDispatcher, NVLSAllGatherVDispatcher as Renamed\n"

BATCH_INVARIANT_SOURCE = """
mode = False

def is_batch_invariant_mode_enabled():
    return mode
"""


def dispatchers_source() -> str:
    """The three classes, with every member of the table."""
    bodies: dict[str, list[str]] = {}
    for path, parameters in NAMES[DISPATCHERS].items():
        owner, _, member = path.partition(".")
        if parameters is None:
            bodies[owner].append(f"    {member} = None")
        else:
            bodies.setdefault(owner, []).append(f"    def {member or '__init__'}(self, {parameters}): ...")
    lines = [f"from {BASE} import MoEAllGatherTokenDispatcher"]
    for owner, body in bodies.items():
        parent = "MoEAllGatherTokenDispatcher" if owner.endswith("Base") else "InferenceAllGatherDispatcherBase"
        lines += [f"class {owner}({parent}):", *body]
    return "\n".join(lines)


SOURCES = {
    "megatron": "",
    "megatron.core": "",
    VERSION: "__version__ = '0.19.2+abc'",
    "megatron.core.transformer": "",
    "megatron.core.transformer.custom_layers": "",
    BATCH_INVARIANT: BATCH_INVARIANT_SOURCE,
    "megatron.core.transformer.moe": "",
    "megatron.core.inference": "",
    EXPERT_ENTRIES: ENTRIES_SOURCE,
    BASE: BASE_SOURCE,
    DISPATCHERS: dispatchers_source(),
    EXPERTS: EXPERTS_SOURCE,
    LAYER: LAYER_SOURCE,
}


@pytest.fixture
def fake_megatron(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Its modules by name, as `sys.modules` has them for the length of a test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    for name in SOURCES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # taken out again by monkeypatch
    return place_fake_megatron()


def place_fake_megatron() -> dict[str, ModuleType]:
    """Puts it into `sys.modules` for good: for a process of its own, which has no megatron-core either."""
    made = {}
    for name, source in SOURCES.items():
        module = made[name] = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        exec(source, vars(module))
    return made


def set_version(modules: dict[str, ModuleType], version: str) -> None:
    """Makes it another release."""
    modules[VERSION].__version__ = version


__all__ = ["BATCH_INVARIANT", "LAYER", "SOURCES", "VERSION", "fake_megatron", "place_fake_megatron", "set_version"]
