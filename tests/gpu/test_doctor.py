"""The self-test of `tokenferry doctor` on GPUs, as users run it."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_doctor_tries_every_transport_but_nvls_on_the_gpus():
    command = [sys.executable, "-m", "tokenferry.cli", "doctor", "--json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    document = json.loads(outcome.stdout)
    trials = [trial for trial in document["selftest"] if trial["device"] == "cuda"]
    tried = [(trial["transport"], trial["num_ranks"], trial["outcome"], trial["detail"]) for trial in trials]
    count = torch.cuda.device_count()
    assert tried == [("local", 1, "passed", ""), ("collective", count, "passed", ""), ("p2p", count, "passed", "")]
    assert all(trial["round_trip_us"] > 0 for trial in trials)
    assert (outcome.returncode, document["health"]) == (0, "healthy"), document["findings"]


@pytest.mark.gpu(count=2)
def test_doctor_knows_the_links_and_the_driver():
    command = [sys.executable, "-m", "tokenferry.cli", "doctor", "--no-selftest", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout)["topology"]
    assert facts["versions"]["NVIDIA driver"] != "not found"
    assert all(gpu["links"] is not None for gpu in facts["gpus"])
