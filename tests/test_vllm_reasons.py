"""Why a server's engine died, in the words of its answers."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fake_vllm import fake_config
from patience import PATIENT_S, SLACK_S
from tokenferry.integrations.vllm import reasons

VARIABLE = "TOKENFERRY_VLLM_REASON_FILE"


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("TOKENFERRY_VLLM", raising=False)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "reason"))
    return tmp_path / "reason"


class Dead(Exception):
    """As vLLM's."""

    def __init__(self, *args: object, suppress_context: bool = False) -> None:
        super().__init__("see the log.", *args)
        self.__suppress_context__ = suppress_context


class Manager:
    """As vLLM's, with the process that has died, if one has."""

    def __init__(self, failed: str | None, vllm_config: SimpleNamespace) -> None:
        self.failed_proc_name, self.timeout = failed, None

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeout = timeout


def error_text(kind: type[Exception] = Dead) -> str:
    module = SimpleNamespace(EngineDeadError=type("Dead", (kind,), {"__init__": kind.__init__}))
    reasons.errors_name_reasons(module)
    reasons.errors_name_reasons(module)
    made = module.EngineDeadError(suppress_context=True)
    assert made.__suppress_context__
    return str(made)


class Engine:
    """As vLLM's, whose API servers read `said` when it dies."""

    def __init__(self, settings: object) -> None:
        self.vllm_config, self.engine_index, self.said = fake_config(settings), 1, ""

    def _send_engine_dead(self) -> None:
        self.said = reasons.told() or "nothing"


def wrapped_manager(failed: str | None, settings: object = True) -> Manager:
    members = {"shutdown": Manager.shutdown, "__init__": Manager.__init__}
    module = SimpleNamespace(CoreEngineProcManager=type("Manager", (Manager,), members))
    reasons.managers_wait_for_reasons(module)
    reasons.managers_wait_for_reasons(module)
    return module.CoreEngineProcManager(failed, vllm_config=fake_config(settings))


def dead_engine(settings: object) -> Engine:
    module = SimpleNamespace(EngineCoreProc=type("Engine", (Engine,), {}))
    reasons.engines_wait_for_reasons(module)
    engine = module.EngineCoreProc(settings)
    engine._send_engine_dead()
    return engine


def test_the_first_reason_is_in_the_errors_text(file: Path) -> None:
    reasons.tell("PeerFailedError: rank 1 failed")
    reasons.tell("PeerFailedError: rank 0 failed")
    assert error_text() == "see the log. tokenferry: PeerFailedError: rank 1 failed"
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_a_reason_vllms_text_stays(file: Path) -> None:
    assert error_text() == "see the log."


def test_without_the_variable_nothing_is_written_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    reasons.tell("lost")
    assert reasons.told() is None and error_text() == "see the log."


def test_a_link_in_its_place_is_neither_followed_nor_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("somebody else's")
    file.symlink_to(tmp_path / "other")
    reasons.tell("rank 1")
    assert reasons.told() is None and (tmp_path / "other").read_text() == "somebody else's"


def test_a_dead_process_is_named_where_no_rank_names_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "PATIENCE_S", 0.1)
    manager = wrapped_manager("EngineCore_DP1")
    manager.shutdown(timeout=3.0)
    assert manager.timeout == 3.0
    assert reasons.told() == "tokenferry: EngineCore_DP1 ended unexpectedly"


def test_the_ranks_that_are_left_have_a_moment_to_name_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "PATIENCE_S", PATIENT_S)
    threading.Timer(0.2, reasons.tell, ["rank 1 failed"]).start()
    wrapped_manager("EngineCore_DP1").shutdown()
    assert reasons.told() == "tokenferry: rank 1 failed"


def test_new_engines_do_not_inherit_the_reason_of_those_before(file: Path) -> None:
    reasons.tell("rank 1 failed")
    wrapped_manager(None)
    assert reasons.told() is None


def test_an_engine_waits_for_the_reason_before_it_says_that_it_is_dead(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "PATIENCE_S", PATIENT_S)
    threading.Timer(0.2, reasons.tell, ["rank 1 failed"]).start()
    assert dead_engine(True).said == "tokenferry: rank 1 failed"


def test_an_engine_is_named_where_no_rank_has_named_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "PATIENCE_S", 0.1)
    assert dead_engine(True).said == "tokenferry: EngineCore_DP1 ended unexpectedly"


@pytest.mark.parametrize(("failed", "settings"), [(None, True), ("EngineCore_DP1", None)], ids=["ordinary", "off"])
def test_no_other_end_is_delayed(failed: str | None, settings: object, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "PATIENCE_S", PATIENT_S)
    began_s = time.monotonic()
    wrapped_manager(failed, settings).shutdown()
    if settings is None:
        assert dead_engine(settings).said == "nothing"
    assert time.monotonic() - began_s < SLACK_S and not file.exists()


def test_processes_are_ended_where_the_settings_are_wrong(file: Path) -> None:
    manager = wrapped_manager("EngineCore_DP1", {"transprot": "p2p"})
    manager.shutdown(timeout=3.0)
    assert manager.timeout == 3.0
    assert dead_engine({"transprot": "p2p"}).said == "nothing"


def test_children_inherit_the_name_and_the_first_process_removes_the_file(tmp_path: Path) -> None:
    child = "from tokenferry.integrations.vllm import reasons; reasons.hand_down(); reasons.tell('rank 1')"
    code = (
        "import os, subprocess, sys\n"
        "from tokenferry.integrations.vllm import reasons\n"
        "reasons.hand_down(); reasons.hand_down()\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
        "assert reasons.told() == 'tokenferry: rank 1', reasons.told()\n"
    )
    environment = {name: text for name, text in os.environ.items() if name != VARIABLE}
    subprocess.run([sys.executable, "-c", code], check=True, env={**environment, "TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []
