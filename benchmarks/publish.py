"""Measures all records of round trips, layers and telemetry that README and docs publish, of one commit: on 2 GPUs.

python benchmarks/publish.py FOLDER [--parts kernels,round-trips,formats,layer,telemetry] [--budget-s 900] [--commit HASH]
python benchmarks/publish.py FOLDER --rehearse     # CPUs, tiny sizes: every call and check, no figures

The parts run one after another, each in processes of its own. "kernels" compiles on all cores what the others load, into Triton's
cache, where a later call on the same machine finds it: where calls may not take long, "kernels" and some parts come first, and
the others in a second call. Each other part writes FOLDER/2xH100-DATE-PART.jsonl as it measures. A part that overruns its time is
stopped; its record keeps what was measured. Last come how each part ended, and which goals the records reach.

The exit code is 1 if a part failed, was stopped, left something out or found a wrong result. To miss a goal is no failure.
"""

import argparse
import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import goals

ROOT = Path(__file__).parents[1]
RANKS = 2
LAST_POINT_S = 45
"""A layer's point that begins in time may end so much later."""
SHORTEST_S = 5.0
"""A part is not begun with less time."""


@dataclass(frozen=True)
class Part:
    """One call of a script of this folder.

    Attributes:
        limit_s: it is stopped after so many seconds.
        arguments: {output}, {commit}, {cores} and {points_s} are filled in.
        tiny: what a rehearsal puts behind them.
    """

    name: str
    script: str
    limit_s: float
    arguments: str
    tiny: str


TO = "{output} --commit {commit}"
SIZES, FLOAT8_TOO = "7168,2048", "qwen3-30b-a3b,deepseek-v3"
FORMATS = "same,fp8_block128,fp8_block128-quantized"
KERNELS = "kernels"
PARTS = (
    Part(
        KERNELS, "precompile.py", 300,
        f"--float8 {FLOAT8_TOO} --round-trips {SIZES} --formats --telemetry --processes {{cores}}",
        tiny="--presets= --round-trips=",
    ),
    Part(
        "round-trips", "roundtrip.py", 200,
        f"{TO} --hidden {SIZES} --tokens 1,8,32,128,512,4096 --capacity 4096 --exact-too --transports p2p,collective",
        tiny="--rehearse --capacity 16",
    ),
    Part(
        "formats", "roundtrip.py", 180,
        f"{TO} --hidden {SIZES} --capacity 4096 --transports p2p --format {FORMATS} --combine-format {FORMATS}",
        tiny="--rehearse --capacity 16",
    ),
    Part(
        "layer", "layer.py", 380,
        f"{TO} --presets all --tokens 1,8,32,512,4096 --float8-too {FLOAT8_TOO} --budget-s {{points_s}}",
        tiny="--rehearse --presets tiny,tiny-mxfp4 --float8-too tiny",
    ),
    Part(
        "telemetry", "telemetry.py", 180,
        f"{TO} --hidden {SIZES} --tokens 1,32,512 --layers qwen3-30b-a3b",
        tiny="--cpu --hidden 256 --tokens 1 --layers tiny",
    ),
)  # fmt: skip


def told(command: list[str]) -> str | None:
    """What it prints; None where it fails, or is not there."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of_tree() -> str:
    """Short, of a tree that is exactly that commit."""
    described = told(["git", "describe", "--always", "--dirty", "--exclude", "*"])
    if described is None:
        raise SystemExit("this tree is no git checkout; name the commit that it is of by --commit")
    if described.endswith("-dirty"):
        raise SystemExit(f"files differ from commit {described.removesuffix('-dirty')}; commit them, or give --commit")
    return described


def machine() -> str:
    """As it begins the names of records. Asked in another process, since one with a context on a GPU takes its memory."""
    script = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name().split()[1])"
    found = (told([sys.executable, "-c", script]) or "0 GPU").split()
    if int(found[0]) < RANKS:
        raise SystemExit(f"publish.py needs {RANKS} CUDA GPUs, found {found[0]}; give --rehearse to try every call on CPUs")
    return f"{RANKS}x{found[1]}"


def call(command: list[str], limit_s: float) -> int | None:
    """Its exit code; None where it was stopped, with all of its processes."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def faults(path: Path) -> Iterator[str]:
    """What a record says went wrong."""
    records = goals.read(path) if path.exists() else []
    if not records:
        yield "no record"
    correct = (each.get("correct") for each in records)  # of some all ways have their own
    counted = {
        "with an error": sum("error" in record for record in records),
        "left out": sum(len(record.get("left_out", ())) for record in records),
        "with wrong results": sum(False in each.values() if isinstance(each, dict) else each is False for each in correct),
    }
    yield from (f"{count} points {what}" for what, count in counted.items() if count)


def measure(part: Part, output: Path, commit: str, limit_s: float, *, rehearse: bool) -> tuple[str, bool]:
    """Runs a part, and says how it ended, and whether that is all right."""
    filled = {"output": output, "commit": commit, "cores": os.cpu_count(), "points_s": max(1.0, limit_s - LAST_POINT_S)}
    arguments = [each.format(**filled) for each in part.arguments.split()] + (part.tiny.split() if rehearse else [])
    print(f"== {part.name}: {part.script} {' '.join(arguments)}, {limit_s:.0f} s at most", flush=True)
    started_s = time.monotonic()
    code = call([sys.executable, str(Path(__file__).with_name(part.script)), *arguments], limit_s)
    took = f"{time.monotonic() - started_s:.0f} s"
    found = [f"stopped after {took}" if code is None else f"took {took}"]
    found += [f"exit code {code}"] * bool(code) + (list(faults(output)) if part.name != KERNELS else [])
    return "; ".join(found), code == 0 and len(found) == 1


def chosen(names: str) -> list[Part]:
    """In the order of PARTS."""
    known, wanted = [part.name for part in PARTS], names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"a part is one of {', '.join(known)}; got {unknown[0]!r}")
    return [part for part in PARTS if part.name in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS))
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="of all parts together")
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--rehearse", action="store_true", help="on CPUs, with tiny sizes: every call and check, no figures")
    given = parser.parse_args()
    parts, ends_s = chosen(given.parts), time.monotonic() + given.budget_s
    commit = given.commit or ("rehearsal" if given.rehearse else commit_of_tree())
    head = f"{RANKS}xCPU" if given.rehearse else machine()
    date = datetime.datetime.now(datetime.UTC).date()
    given.folder.mkdir(parents=True, exist_ok=True)
    outputs = {part.name: given.folder.resolve() / f"{head}-{date}-{part.name}.jsonl" for part in parts}
    if there := [str(path) for path in outputs.values() if path.exists()]:
        raise SystemExit(f"there is a record already: {', '.join(there)}; move it away, or name another folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a part which is under way is stopped too
    ends = {}
    for part in parts:
        limit_s = min(part.limit_s, ends_s - time.monotonic())
        if limit_s < SHORTEST_S:
            ends[part.name] = ("not begun, since the budget is spent", False)
        else:
            ends[part.name] = measure(part, outputs[part.name], commit, limit_s, rehearse=given.rehearse)
    print("\n| part | how it ended |\n|---|---|")
    print(*(f"| {name} | {how} |" for name, (how, _) in ends.items()), sep="\n")
    if not given.rehearse:
        print("", *goals.table(path for path in outputs.values() if path.exists()), sep="\n")
    return int(not all(is_right for _, is_right in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
