"""`install()` puts our classes in the place of Megatron-Core's."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from fake_megatron import LAYER, fake_megatron
from megatron_classes import CLASSES, NCCL, config, fresh_classes, preprocessed
from tokenferry.errors import ConfigError, StateError
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.base import StandaloneBase
from tokenferry.integrations.megatron.known_versions import BASE, DISPATCHERS

__all__ = ["fake_megatron", "fresh_classes"]  # fixtures


def test_install_replaces_the_names_wherever_they_were_imported(fake_megatron: dict[str, ModuleType]) -> None:
    undo = megatron.install()
    assert (undo.version, undo.tried, undo.experts) == ("0.19.2", True, None)
    assert set(undo.replaced) == {f"{DISPATCHERS}.{name}" for name in CLASSES} | {
        f"{LAYER}.{NCCL}",
        f"{LAYER}.Renamed",
    }
    assert fake_megatron[LAYER].Renamed is megatron.NVLSAllGatherVDispatcher
    assert all(getattr(fake_megatron[DISPATCHERS], name) is getattr(megatron, name) for name in CLASSES)
    undo()


def test_installed_classes_are_megatrons(fake_megatron: dict[str, ModuleType]) -> None:
    theirs = fake_megatron[BASE].MoEAllGatherTokenDispatcher
    with megatron.install():
        dispatcher = megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config())
        assert isinstance(dispatcher, theirs)
        assert dispatcher.made_by_megatron == (None, None, None)
        assert dispatcher.token_dispatch(*preprocessed(dispatcher))[0].shape == (5, 8)
    assert not issubclass(megatron.NVLSAllGatherVDispatcher, theirs)


@pytest.mark.parametrize("experts", [False, True], ids=["dispatchers", "experts-too"])
def test_undo_puts_everything_back(fake_megatron: dict[str, ModuleType], experts: bool) -> None:
    before = {name: dict(vars(module)) for name, module in fake_megatron.items()}
    undo = megatron.install(experts=experts)
    undo()
    undo()
    assert {name: dict(vars(module)) for name, module in fake_megatron.items()} == before
    assert megatron.InferenceAllGatherDispatcherBase.__bases__ == (StandaloneBase,)


def test_undo_reaches_modules_that_were_imported_in_between(
    fake_megatron: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fake_megatron[DISPATCHERS].NVLSAllGatherVDispatcher
    late = ModuleType("megatron.core.inference.late")
    with megatron.install():
        late.Renamed = fake_megatron[DISPATCHERS].NVLSAllGatherVDispatcher
        monkeypatch.setitem(sys.modules, late.__name__, late)
        assert late.Renamed is megatron.NVLSAllGatherVDispatcher
    assert late.Renamed is original


def test_an_original_kept_under_another_name_stays(fake_megatron: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    users = ModuleType("users")
    users.kept = users.NVLSAllGatherVDispatcher = original = fake_megatron[DISPATCHERS].NVLSAllGatherVDispatcher
    monkeypatch.setitem(sys.modules, "users", users)
    with megatron.install():
        assert users.NVLSAllGatherVDispatcher is megatron.NVLSAllGatherVDispatcher
        assert users.kept is original


def test_installing_twice_is_refused(fake_megatron: dict[str, ModuleType]) -> None:
    with megatron.install(), pytest.raises(StateError, match="already"):
        megatron.install()


# --- settings ---------------------------------------------------------------------------------------------------------

DEFAULTS = megatron.Settings()


def test_install_takes_the_settings_and_undo_brings_the_former_ones_back(fake_megatron: dict[str, ModuleType]) -> None:
    with megatron.install(transport="p2p", combine_dtype=torch.bfloat16, timeout_s=2.0):
        assert megatron.configure() == dataclasses.replace(DEFAULTS, transport="p2p", combine_dtype=torch.bfloat16, timeout_s=2.0)
    assert megatron.configure() == DEFAULTS


def test_undo_leaves_settings_that_were_configured_since(fake_megatron: dict[str, ModuleType]) -> None:
    with megatron.install(timeout_s=2.0, combine_output=torch.float32):
        megatron.configure(timeout_s=3.0)
    assert megatron.configure() == dataclasses.replace(DEFAULTS, timeout_s=3.0)
    megatron.configure(**dataclasses.asdict(DEFAULTS))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"combine_dtype": torch.float64}, ConfigError, "combine_dtype"),
        ({"combine_output": torch.float16}, ConfigError, r"combine_output must be torch\.float32 or torch\.bfloat16"),
        ({"expert_scratch_bytes": -1}, ConfigError, "expert_scratch_bytes must be None or at least 1, got -1"),
        ({"combine_dytpe": torch.float32}, TypeError, "combine_dytpe"),
    ],
    ids=["combine_dtype", "combine_output", "expert_scratch_bytes", "misspelt"],
)
def test_a_bad_setting_installs_nothing(fake_megatron, settings: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        megatron.install(**settings)
    assert megatron.InferenceAllGatherDispatcherBase.__bases__ == (StandaloneBase,)
    assert megatron.configure() == DEFAULTS


def test_without_megatron_install_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ConfigError, match="megatron-core"):
        megatron.install()
