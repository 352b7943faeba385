"""`install()` puts our classes in the place of Megatron-Core's."""

import re
import sys
from types import ModuleType

import pytest

from megatron_classes import CLASSES, NCCL, config, fresh_classes, preprocessed
from tokenferry.errors import ConfigError, StateError
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.base import StandaloneBase

__all__ = ["fresh_classes"]  # a fixture that every test here gets


FAKE_MODULES = {
    "megatron": "",
    "megatron.core": "",
    "megatron.core.package_info": "__version__ = '0.19.2+abc'",
    "megatron.core.transformer": "",
    "megatron.core.transformer.moe": "",
    "megatron.core.transformer.moe.token_dispatcher": """
class MoETokenDispatcher:
    def __init__(self, config, pg_collection=None):
        self.made_by_megatron = (pg_collection.ep, pg_collection.expt_tp, pg_collection.tp_ep)

class MoEAllGatherTokenDispatcher(MoETokenDispatcher):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None):
        super().__init__(config, pg_collection)
""",
    "megatron.core.transformer.moe.token_dispatcher_inference": """
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

class InferenceAllGatherDispatcherBase(MoEAllGatherTokenDispatcher):
    def __init__(self, *args, runs_metadata_sync=True, **kwargs): ...

class NCCLAllGatherDispatcher(InferenceAllGatherDispatcherBase):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None, runs_metadata_sync=True): ...

class NVLSAllGatherVDispatcher(InferenceAllGatherDispatcherBase):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None, runs_metadata_sync=True): ...
""",
    "megatron.core.transformer.moe.moe_layer": """
from megatron.core.transformer.moe.token_dispatcher_inference import NCCLAllGatherDispatcher, NVLSAllGatherVDispatcher as Renamed
""",
}
DISPATCHERS = "megatron.core.transformer.moe.token_dispatcher_inference"
LAYER = "megatron.core.transformer.moe.moe_layer"


@pytest.fixture
def fake_megatron(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A megatron.core that has the modules and classes that install() looks for, and no more."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    made = {}
    for name, source in FAKE_MODULES.items():
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, vars(module))
        made[name] = module
    return made


def test_install_replaces_the_names_wherever_they_were_imported(fake_megatron: dict[str, ModuleType]) -> None:
    undo = megatron.install()
    assert undo.version == "0.19.2"
    assert set(undo.replaced) == {f"{DISPATCHERS}.{name}" for name in CLASSES} | {
        f"{LAYER}.{NCCL}",
        f"{LAYER}.Renamed",
    }
    assert fake_megatron[LAYER].Renamed is megatron.NVLSAllGatherVDispatcher
    assert all(getattr(fake_megatron[DISPATCHERS], name) is getattr(megatron, name) for name in CLASSES)
    undo()


def test_installed_classes_are_megatrons(fake_megatron: dict[str, ModuleType]) -> None:
    theirs = fake_megatron["megatron.core.transformer.moe.token_dispatcher"].MoEAllGatherTokenDispatcher
    with megatron.install():
        dispatcher = megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config())
        assert isinstance(dispatcher, theirs)
        assert dispatcher.made_by_megatron == (None, None, None)
        assert dispatcher.token_dispatch(*preprocessed(dispatcher))[0].shape == (5, 8)
    assert not issubclass(megatron.NVLSAllGatherVDispatcher, theirs)


def test_undo_puts_everything_back(fake_megatron: dict[str, ModuleType]) -> None:
    before = {name: dict(vars(module)) for name, module in fake_megatron.items()}
    undo = megatron.install()
    undo()
    undo()
    assert {name: dict(vars(module)) for name, module in fake_megatron.items()} == before
    assert megatron.InferenceAllGatherDispatcherBase.__bases__ == (StandaloneBase,)


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


@pytest.mark.parametrize("version", ["0.18.0", "0.190.0", "1.0"])
def test_unknown_version_is_named(fake_megatron: dict[str, ModuleType], version: str) -> None:
    fake_megatron["megatron.core.package_info"].__version__ = version
    with pytest.raises(ConfigError, match=rf"{re.escape(version)} is not known.*0\.19"):
        megatron.install()
    with megatron.install(allow_unknown_version=True) as installation:
        assert installation.version == version


def test_other_constructor_is_refused(fake_megatron: dict[str, ModuleType]) -> None:
    class NVLSAllGatherVDispatcher:
        def __init__(self, config): ...

    fake_megatron[DISPATCHERS].NVLSAllGatherVDispatcher = NVLSAllGatherVDispatcher
    with pytest.raises(ConfigError, match=r"constructed with \['config'\]"):
        megatron.install(allow_unknown_version=True)
    assert megatron.InferenceAllGatherDispatcherBase.__bases__ == (StandaloneBase,)


def test_without_megatron_install_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ConfigError, match="megatron-core"):
        megatron.install()
