"""Every kernel under compute-sanitizer: memcheck, and racecheck for shared memory. `sanitizer_work.py` is what runs there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "sanitizer_work.py"
FOUND = 77
"""Exit code of the tool when it has found something and the program itself went well."""
WARM_UP_S, CHECKED_S, TOTAL_S = 110, 160, 300
AT_ONCE = 8
"""Processes that share the GPU; each is bound by its one thread on the CPU."""
FIRST_PORT = 49152
COMMON = (f"--error-exitcode={FOUND}", "--print-limit=20")
WANTED = {
    "memcheck": ("--launch-timeout=120", "--target-processes=application-only", "--padding=256", "--report-api-errors=no"),
    "racecheck": ("--launch-timeout=120", "--target-processes=application-only"),
    "planted": ("--destroy-on-device-error=kernel",),
}
"""Given where this version of the tool has them. Errors of API calls are left out: libraries ask the driver for what it may not
have, and go on. A planted fault ends its kernel alone, so that the program ends well and the exit code is the tool's."""


@dataclass(frozen=True)
class Check:
    """One process under the tool, and what it has to find."""

    tool: str
    part: str
    debug: bool = False
    finds: str | None = None

    @property
    def id(self) -> str:
        return f"{self.tool}-{self.part}{'-debug' * self.debug}"


CHECKS = (
    Check("memcheck", "planted-store", finds="Invalid __global__ write"),
    Check("racecheck", "planted-race", finds=r"SUMMARY: [1-9]\d* hazard"),
    Check("memcheck", "slots"),
    Check("memcheck", "bulk"),
    Check("memcheck", "slots", debug=True),
    Check("memcheck", "bulk", debug=True),
    Check("memcheck", "experts"),
    Check("memcheck", "experts-tensor-maps"),
    Check("memcheck", "experts-float8"),
    Check("memcheck", "router"),
    Check("racecheck", "slots"),
    Check("racecheck", "bulk"),
    Check("racecheck", "experts"),
    Check("racecheck", "experts-tensor-maps"),
    Check("racecheck", "experts-float8"),
    Check("racecheck", "router"),
)


@dataclass(frozen=True)
class Ended:
    """How a process ended. `code` is None if it had to be."""

    code: int | None
    text: str
    seconds: float


def run(command: list[str], env: dict[str, str], timeout_s: float) -> Ended:
    """Output and errors as one text; at the end of its time the process and all that it started are ended."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=timeout_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        code = None
    return Ended(code, text, time.monotonic() - start)


def find_tool() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@dataclass(frozen=True)
class Tool:
    """The tool, what it says of itself, and when all is to be over."""

    path: str
    help: str
    deadline: float

    def command(self, check: Check) -> list[str]:
        wanted = (*WANTED[check.tool], *(WANTED["planted"] if check.part == "planted-store" else ()))
        wanted = (*wanted, f"--port={FIRST_PORT + 10 * CHECKS.index(check)}")  # it tries ten
        options = [option for option in wanted if option.partition("=")[0] in self.help]
        return [self.path, "--tool", check.tool, *COMMON, *options, sys.executable, str(SCRIPT), check.part]

    def run(self, check: Check, warm: "Future[Ended]") -> Ended:
        before = warm.result()  # kernels are compiled there: the tool would slow the compiler
        if before.code != 0:
            return Ended(before.code, f"without the tool already:\n{before.text}", before.seconds)
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TOKENFERRY_DEBUG": str(int(check.debug))}
        return run(self.command(check), env, min(CHECKED_S, max(1.0, self.deadline - time.monotonic())))


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest):
    """Of each check that was asked for, how it ended. They run side by side."""
    path = find_tool()
    if path is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin; it comes with the CUDA toolkit")
    told = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60).stdout
    tool = Tool(path, told, time.monotonic() + TOTAL_S)
    asked_for = [item for item in request.session.items if item.path == request.node.path]
    checks = [item.callspec.params["check"] for item in asked_for]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # Submitted first, so that no check waits in the pool for a warm-up that has no thread.
        parts = dict.fromkeys(check.part for check in checks)
        warm = {
            part: pool.submit(run, [sys.executable, str(SCRIPT), part], {"TOKENFERRY_DEBUG": "0"}, WARM_UP_S) for part in parts
        }
        yield {check.id: pool.submit(tool.run, check, warm[check.part]) for check in checks}


@pytest.mark.gpu(count=1)
@pytest.mark.timeout(400)
@pytest.mark.parametrize("check", CHECKS, ids=[check.id for check in CHECKS])
def test_the_tool_finds_what_was_planted_and_nothing_else(ended: dict[str, "Future[Ended]"], check: Check) -> None:
    result = ended[check.id].result()
    if "Device not supported" in result.text:
        pytest.skip(f"compute-sanitizer says of this GPU: {re.search('.*Device not supported.*', result.text)[0]}")
    summary = re.search(r"^=+ .*SUMMARY: .*$", result.text, re.MULTILINE)
    done = re.search(rf"^done: {check.part}, .*$", result.text, re.MULTILINE)
    seen = f"exit code {result.code} after {result.seconds:.0f} s\n{result.text[:6000]}\n...\n{result.text[-3000:]}"
    print(f"\n{check.id}: {summary and summary[0].strip('= ')}; {done and done[0]}; {result.seconds:.0f} s")
    assert result.code is not None, f"not done in time: {seen}"
    assert summary is not None, f"the tool did not run to its end: {seen}"
    if check.finds is not None:
        assert result.code == FOUND, seen
        assert re.search(check.finds, result.text), seen
        return
    assert result.code == 0, seen
    assert re.search(r"SUMMARY: 0 (errors|hazards)", summary[0]), seen
    assert done is not None, f"the part did not end: {seen}"
