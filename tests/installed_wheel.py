"""What `make package` asks of the wheel that it has built and installed apart: no file is missing, the metadata is right, the
command works, and the self-test finds the machine in order. Run by the Python that has the wheel, outside the tree."""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import tokenferry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the folder src that the wheel was built from")
    check(parser.parse_args().source)


def check(source: Path) -> None:
    """Ends the process with what is wrong, if anything is."""
    distribution = importlib.metadata.distribution("tokenferry")
    prefix = Path(sys.prefix).resolve()
    ensure(Path(tokenferry.__file__).resolve().is_relative_to(prefix), f"tokenferry comes from {tokenferry.__file__}")
    ensure(distribution.version == tokenferry.__version__, f"metadata say version {distribution.version}")
    wanted = {path.relative_to(source).as_posix() for pattern in ("*.py", "py.typed") for path in source.rglob(pattern)}
    missing = wanted - {path.as_posix() for path in distribution.files or ()}
    ensure(not missing, f"not in the wheel: {', '.join(sorted(missing))}")
    needed = {re.split(r"[^\w-]", line)[0] for line in distribution.requires or () if "extra ==" not in line}
    ensure(needed == {"torch", "triton"}, f"the core needs {sorted(needed)}")
    command = prefix / "bin" / "tokenferry"
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    ensure(said == f"tokenferry {tokenferry.__version__}\n", f"--version says {said!r}")
    doctor = subprocess.run([command, "doctor", "--json"], capture_output=True, text=True, check=False)
    ensure(doctor.returncode == 0, f"doctor ended with {doctor.returncode}:\n{doctor.stdout}{doctor.stderr}")
    trials = [(trial["device"], trial["transport"]) for trial in json.loads(doctor.stdout)["selftest"]]
    print(f"{distribution.version}: {len(wanted)} files, Python {sys.version.split()[0]}; self-test passed: {trials}")


def ensure(is_right: bool, what: str) -> None:
    """Leave with `what`, if it is not."""
    if not is_right:
        sys.exit(f"the wheel is not right: {what}")


if __name__ == "__main__":
    main()
