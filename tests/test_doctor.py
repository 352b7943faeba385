"""The verdict of `tokenferry doctor`, and what it stands on."""

import dataclasses
import json
import threading
import time

import pytest
import torch
from typer.testing import CliRunner

from tokenferry import reference
from tokenferry.cli import health, selftest
from tokenferry.cli.doctor_tables import status_of
from tokenferry.cli.main import app
from tokenferry.cli.selftest import Run, Trial, can_interpret, runs_for, trial_of
from tokenferry.cli.selftest_rank import compare_and_time, point_for
from tokenferry.groups import EPGroup
from tokenferry.testing import run_ranks
from tokenferry.topology import topology
from tokenferry.transports.selection import Accepted, Rejected, decide

RUN = Run(device="cpu", num_ranks=2, transports=("local", "collective"))
PASSED = Trial(device="cuda", num_ranks=2, transport="collective", interpreted=False, outcome="passed", round_trip_us=40.0)
P2P_FAILED = dataclasses.replace(PASSED, transport="p2p", outcome="failed", detail="no", round_trip_us=None)
INTERPRETED = dataclasses.replace(PASSED, device="cpu", transport="p2p", interpreted=True)
UNMAPPED = Rejected("p2p", "GPU 0 cannot map the memory of GPU 1", "look at the links")
NO_MULTICAST = Rejected("nvls", "no multicast")
NCCL = Accepted("collective", "NCCL")


def pair(*decisions):
    return health.GroupDecisions(2, "cuda", decisions)


def answer(wrong="", error="", us=10.0):
    return {"transport": "local", "wrong": wrong, "error": error, "round_trip_us": us, "hidden_size": 256, "took_s": 0.5}


@pytest.mark.parametrize(
    ("groups", "trials", "verdict"),
    [
        ([pair(NO_MULTICAST, NCCL)], [PASSED], "healthy"),
        ([pair(UNMAPPED, NCCL)], [PASSED], "degraded"),
        ([pair(UNMAPPED)], [], "broken"),
        ([pair(NO_MULTICAST)], [], "broken"),
        ([], [PASSED, P2P_FAILED], "degraded"),
        ([], [INTERPRETED, P2P_FAILED], "broken"),
        ([], [dataclasses.replace(PASSED, num_ranks=1), P2P_FAILED], "broken"),
        ([], [PASSED, dataclasses.replace(P2P_FAILED, outcome="wrong bits")], "broken"),
        ([], [PASSED, dataclasses.replace(INTERPRETED, outcome="failed", detail="no")], "degraded"),
    ],
    ids=[
        "rejected-without-fault",
        "rejected-by-fault",
        "nothing-serves",
        "nothing-serves-without-fault",
        "one-failed-beside-another",
        "only-interpreted-passed",
        "only-one-rank-passed",
        "wrong-bits",
        "interpreted-failed",
    ],
)
def test_verdict(groups, trials, verdict):
    found = health.findings_of(topology(), groups, trials)
    assert health.health_of(found) == verdict
    assert all(finding.remedy for finding in found if finding.level != "note")


def test_the_worst_finding_comes_first():
    found = health.findings_of(topology(), [pair(UNMAPPED, NCCL)], [PASSED, dataclasses.replace(PASSED, outcome="wrong bits")])
    assert [finding.level for finding in found] == ["broken", "degraded"]


@pytest.mark.parametrize(
    ("answers", "outcome", "detail"),
    [
        ([answer(us=10.0), answer(us=12.0)], "passed", ""),
        ([answer(), answer(wrong="step 1: rows")], "wrong bits", "step 1: rows"),
        ([answer(error="PeerTimeoutError: late"), answer(wrong="rows")], "wrong bits", "rows"),
        ([answer(), answer(error="StateError: x")], "failed", "StateError: x"),
        ([answer()], "failed", "rank 1: stuck"),
        ([], "failed", "rank 1: stuck"),
    ],
    ids=["all-passed", "one-wrong", "wrong-bits-beat-errors", "one-failed", "one-did-not-answer", "none-answered"],
)
def test_ranks_answers_as_one(answers, outcome, detail):
    trial = trial_of(RUN, "collective", answers, "rank 1: stuck")
    assert (trial.outcome, trial.detail) == (outcome, detail)
    assert trial.round_trip_us == (12.0 if outcome == "passed" else None)


def test_wrong_bits_are_found_and_named(monkeypatch):
    def off_by_a_little(partials, tokens_per_rank, combine_dtype, out_dtype):
        return [
            rows + torch.tensor(1.0, dtype=out_dtype) for rows in combine(partials, tokens_per_rank, combine_dtype, out_dtype)
        ]

    combine = reference.combine
    group = EPGroup(device="cpu")
    point = point_for(group, "local")
    assert compare_and_time(group, point, interpreted=False)[0] == ""
    monkeypatch.setattr(reference, "combine", off_by_a_little)
    wrong = "rank 0, step 0: combined rows differ from the reference"
    assert compare_and_time(group, point, interpreted=False)[0] == wrong


@pytest.mark.interpreter
@pytest.mark.parametrize("debug", ["0", "1"], ids="debug-{}".format)
def test_right_bits_of_interpreted_kernels_are_right_in_debug_mode_too(debug):
    """A combine poisons there what was gathered: p2p was called broken."""
    assert run_ranks(compared_by_the_interpreter, 2, env={"TRITON_INTERPRET": "1", "TOKENFERRY_DEBUG": debug}) == ["", ""]


def compared_by_the_interpreter(group):
    return compare_and_time(group, point_for(group, "p2p", interpreted=True), interpreted=True)[0]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_on_cpus_no_rejection_is_shown_as_a_fault(num_ranks):
    decisions = decide(EPGroup.from_store(torch.distributed.HashStore(), 0, num_ranks, "cpu"))
    assert {status_of(decision) for decision in decisions} == {"ready", "not used"}


@pytest.mark.parametrize(
    ("versions", "runs"),
    [
        ({"triton": "3.9.0", "numpy": "2.4.6"}, True),
        ({"triton": "3.6.0", "numpy": "2.3.1"}, True),
        ({"triton": "3.6.0", "numpy": "2.4.6"}, False),
        ({"triton": "3.9.0", "numpy": "not installed"}, False),
        ({"triton": "not installed", "numpy": "2.4.6"}, False),
    ],
    ids=["new", "older-numpy", "known-to-fail", "no-numpy", "no-triton"],
)
def test_interpreted_kernels_are_tried_where_they_can_run(versions, runs):
    assert can_interpret(versions) is runs
    assert any(run.interpreted for run in runs_for(0, versions)) is runs


@pytest.mark.parametrize(("num_cpus", "at_once"), [(2, False), (7, False), (8, True)])
def test_runs_go_at_once_where_there_are_cores_for_all_ranks(monkeypatch, num_cpus, at_once):
    running, most = 0, 0
    lock = threading.Lock()

    def try_one(run, _progress):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.2)
        with lock:
            running -= 1
        return [dataclasses.replace(PASSED, transport=run.transports[0])]

    monkeypatch.setattr(selftest, "try_transports", try_one)
    trials = selftest.try_all([RUN, dataclasses.replace(RUN, transports=("p2p",))], num_cpus, print)
    assert [trial.transport for trial in trials] == ["local", "p2p"]
    assert most == (2 if at_once else 1)


def test_what_goes_wrong_in_one_of_several_runs_is_raised(monkeypatch):
    def fail(run, _progress):
        raise OSError(f"no process for {run.device}")

    monkeypatch.setattr(selftest, "try_transports", fail)
    with pytest.raises(OSError, match="no process for cpu"):
        selftest.try_all([RUN], 8, print)


def test_on_gpus_nvls_is_tried_only_if_asked_for():
    versions = {"triton": "3.9.0", "numpy": "2.4.6"}
    assert runs_for(2, versions)[-1].transports == ("local", "collective", "p2p")
    assert runs_for(2, versions, with_nvls=True)[-1].transports == ("local", "collective", "p2p", "nvls")


def test_a_driver_whose_gpus_torch_does_not_see_is_told(tmp_path):
    facts = dataclasses.replace(topology(), gpus=())
    (tmp_path / "version").touch()
    assert [finding.level for finding in health.of_machine(facts, tmp_path / "version")] == ["degraded"]
    assert list(health.of_machine(facts, tmp_path / "none")) == []


def test_a_variable_that_holds_what_it_cannot_is_exit_code_3(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "perhaps")
    outcome = CliRunner().invoke(app, ["doctor", "--json"])
    document = json.loads(outcome.stdout)
    assert (outcome.exit_code, document["exit_code"], document["health"]) == (3, 3, "broken")
    assert document["findings"][0]["what"] == "environment variable TRITON_INTERPRET is 'perhaps': write 1 or 0"


def test_json_has_what_an_issue_form_asks_for():
    document = json.loads(CliRunner().invoke(app, ["doctor", "--no-selftest", "--json"]).stdout)
    told = {"schema", "date", "health", "exit_code", "findings", "topology", "torch_build", "vllm", "environment", "transports"}
    assert set(document) == told | {"selftest"}
    assert document["selftest"] is None
    assert {"python", "tokenferry", "torch", "triton", "CUDA", "NCCL", "NVIDIA driver"} <= document["topology"]["versions"].keys()
    keys = {key for group in document["transports"] for decision in group["decisions"] for key in decision}
    assert keys == {"name", "accepted", "status", "reason", "remedy"}
