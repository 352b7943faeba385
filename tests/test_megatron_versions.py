"""Which releases of megatron-core `install()` takes, and what it says of the others: every name that differs."""

import logging
from types import ModuleType

import pytest

from fake_megatron import fake_megatron, set_version
from megatron_classes import fresh_classes
from tokenferry.errors import ConfigError
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.base import StandaloneBase
from tokenferry.integrations.megatron.known_versions import DISPATCHERS, EXPERT_ENTRIES

__all__ = ["fake_megatron", "fresh_classes"]  # fixtures


def changed_dispatch(self, hidden_states, probs, layer): ...


def test_the_tried_release_passes_without_a_word(fake_megatron, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), megatron.install(experts=True) as installation:
        assert installation.tried
        assert repr(installation).startswith("Installation(megatron-core 0.19.2; ")
    # The stand-in has no engine, which the hook says on a line of its own.
    assert [record.message for record in caplog.records if not record.name.endswith("engine_hook")] == []


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.20.0", "megatron-core 0.20.0 was not tried; its text was read"),
        ("0.20.0rc1", "megatron-core 0.20.0 was not tried; its text was read"),
        ("0.19.3", "megatron-core 0.19.3 was not tried; its names and parameters agree"),
    ],
)
def test_another_known_release_is_taken_by_its_names_and_marked(fake_megatron, caplog, version: str, text: str) -> None:
    set_version(fake_megatron, version)
    with caplog.at_level(logging.WARNING), megatron.install(experts=True) as installation:
        assert not installation.tried
        assert "which was not tried" in repr(installation)
    assert [message for message in caplog.messages if text in message]


@pytest.mark.parametrize("version", ["0.18.0", "0.190.0", "0.21.0", "1.0"])
def test_an_unknown_release_is_refused_unless_allowed(fake_megatron, version: str) -> None:
    set_version(fake_megatron, version)
    agrees = rf"megatron-core {version} is not known; tokenferry knows 0\.19\.x, 0\.20\.x .*All names and parameters .* agree"
    with pytest.raises(ConfigError, match=agrees):
        megatron.install()
    with megatron.install(allow_unknown_version=True) as installation:
        assert (installation.version, installation.differences) == (version, ())


def remove_a_method(modules: dict[str, ModuleType]) -> None:
    del modules[DISPATCHERS].NVLSAllGatherVDispatcher.set_real_token_count_tensor


def change_parameters(modules: dict[str, ModuleType]) -> None:
    modules[DISPATCHERS].NCCLAllGatherDispatcher.token_dispatch = changed_dispatch


def add_a_method(modules: dict[str, ModuleType]) -> None:
    modules[DISPATCHERS].NVLSAllGatherVDispatcher.prefetch = changed_dispatch


def rename_an_entry(modules: dict[str, ModuleType]) -> None:
    modules[EXPERT_ENTRIES].triton_fused_moe = modules[EXPERT_ENTRIES].vllm_fused_moe
    del modules[EXPERT_ENTRIES].vllm_fused_moe


CHANGES = {
    "removed": (remove_a_method, f"{DISPATCHERS} has no NVLSAllGatherVDispatcher.set_real_token_count_tensor"),
    "parameters": (
        change_parameters,
        "NCCLAllGatherDispatcher.token_dispatch takes (hidden_states, probs, layer), not (hidden_states, probs)",
    ),
    "added": (add_a_method, "NVLSAllGatherVDispatcher.prefetch is new: ours has no such name"),
}


@pytest.mark.parametrize("version", ["0.19.2", "0.20.0", "0.21.0"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_name_that_differs_is_listed(fake_megatron, change: str, version: str) -> None:
    set_version(fake_megatron, version)
    make, sentence = CHANGES[change]
    make(fake_megatron)
    with pytest.raises(ConfigError) as raised:
        megatron.install()
    assert f"\n  - {sentence}\n" in str(raised.value)
    with megatron.install(allow_unknown_version=True) as installation:
        assert installation.differences == (sentence,)


def test_all_differences_are_in_one_message(fake_megatron) -> None:
    for make, _ in CHANGES.values():
        make(fake_megatron)
    with pytest.raises(ConfigError) as raised:
        megatron.install()
    assert all(sentence in str(raised.value) for _, sentence in CHANGES.values())


def test_names_of_the_experts_matter_only_if_asked_for(fake_megatron) -> None:
    rename_an_entry(fake_megatron)
    with megatron.install():
        pass
    with pytest.raises(ConfigError, match=rf"{EXPERT_ENTRIES} has no vllm_fused_moe"):
        megatron.install(experts=True)
    with pytest.raises(ConfigError, match=r"install\(experts=True\) needs vllm_fused_moe"):
        megatron.install(experts=True, allow_unknown_version=True)


def test_another_constructor_is_refused_in_any_case(fake_megatron) -> None:
    class NVLSAllGatherVDispatcher:
        def __init__(self, config): ...

    fake_megatron[DISPATCHERS].NVLSAllGatherVDispatcher = NVLSAllGatherVDispatcher
    with pytest.raises(ConfigError, match=r"constructed with \(config\)"):
        megatron.install(allow_unknown_version=True)
    assert megatron.InferenceAllGatherDispatcherBase.__bases__ == (StandaloneBase,)


def test_a_third_kind_of_dispatcher_is_left_alone(fake_megatron) -> None:
    """As `inference_moe_token_dispatcher_type="deepep_v2"`, proposed for a later release: a class beside the known ones, derived
    from the same base, and a function that chooses."""
    modules = fake_megatron
    source = """
class DeepEPV2Dispatcher(InferenceAllGatherDispatcherBase):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None, runs_metadata_sync=True): ...
    def update_metadata(self, local_tokens): return "their own"

def chosen(kind):
    known = {"nccl": NCCLAllGatherDispatcher, "nvls": NVLSAllGatherVDispatcher, "deepep_v2": DeepEPV2Dispatcher}
    return known[kind]
"""
    exec(source, vars(modules[DISPATCHERS]))
    third = modules[DISPATCHERS].DeepEPV2Dispatcher
    with megatron.install():
        assert modules[DISPATCHERS].chosen("deepep_v2") is third
        assert third(1, [0], None).update_metadata(3) == "their own"
        assert modules[DISPATCHERS].chosen("nccl") is megatron.NCCLAllGatherDispatcher
        megatron.validate_config(
            megatron.InferenceMoEConfig(
                moe_router_topk=2, num_moe_experts=4, hidden_size=8, inference_moe_token_dispatcher_type="deepep_v2"
            )
        )
