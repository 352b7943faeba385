"""The table of environment variables: read when asked, with clear errors."""

import pytest

from tokenferry import env
from tokenferry.errors import ConfigError

NAMES = [variable.name for variable in env.table()]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_defaults_without_any_variable():
    assert env.read(env.DebugSettings).enabled is False
    assert env.read(env.TritonSettings).interpret is False
    assert env.read(env.TorchrunSettings).active is False
    assert env.cache_folder().parts[-2:] == (".cache", "tokenferry")


def test_variables_are_read_at_call_time(monkeypatch):
    monkeypatch.setenv("TOKENFERRY_DEBUG", "1")
    assert env.read(env.DebugSettings).enabled is True
    monkeypatch.setenv("TOKENFERRY_DEBUG", "0")
    assert env.read(env.DebugSettings).enabled is False


def test_torchrun_is_active_only_when_its_place_is_complete(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert env.read(env.TorchrunSettings).active is False
    monkeypatch.setenv("MASTER_PORT", "29500")
    place = env.read(env.TorchrunSettings)
    assert place.active is True
    assert (place.rank, place.world_size, place.local_rank, place.master_port) == (1, 4, 1, 29500)


@pytest.mark.parametrize(
    ("concern", "name", "text"),
    [(env.TorchrunSettings, "RANK", "one"), (env.DebugSettings, "TOKENFERRY_DEBUG", "maybe")],
    ids=["number", "flag"],
)
def test_malformed_variable_is_named(monkeypatch, concern, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"environment variable {name} is '{text}'"):
        env.read(concern)


def test_rank_process_gets_everything_on_the_loopback_with_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TOKENFERRY_DEBUG", "1")
    environment = env.for_rank_process({"EXTRA": "x"})
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert environment["NCCL_SOCKET_IFNAME"].startswith("=lo"), "this one, not all whose names begin so"
    assert (environment["TOKENFERRY_DEBUG"], environment["EXTRA"]) == ("1", "x")


def test_every_variable_has_a_name_of_its_own_and_a_line_of_doc():
    assert len(NAMES) == len(set(NAMES))
    assert all(variable.doc and "\n" not in variable.doc for variable in env.table())
