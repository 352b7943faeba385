"""The self-test of `tokenferry doctor`, as users run it."""

import json
import subprocess
import sys

import pytest

from tokenferry.cli.selftest import can_interpret

pytestmark = pytest.mark.ranks


def test_doctor_tries_every_transport_and_finds_this_machine_healthy():
    command = [sys.executable, "-m", "tokenferry.cli", "doctor", "--json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    document = json.loads(outcome.stdout)
    passed = {(trial["device"], trial["transport"], trial["interpreted"]) for trial in document["selftest"]}
    wanted = {("cpu", "local", False), ("cpu", "collective", False)}
    if can_interpret(document["topology"]["versions"]):
        wanted.add(("cpu", "p2p", True))
    assert (outcome.returncode, document["health"], document["findings"]) == (0, "healthy", [])
    assert wanted <= passed
    assert all(trial["outcome"] == "passed" and trial["round_trip_us"] > 0 for trial in document["selftest"])
