"""The programs in examples/ and the notebook run as they stand, on CPU ranks. Megatron's engine: test_megatron_example.py."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenferry.testing.tiny_models import make_tiny

pytestmark = pytest.mark.ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MISSING = [name for name in ("nbclient", "nbformat", "ipykernel", "cloudpickle") if not importlib.util.find_spec(name)]
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=120).execute()
print(sum("image/svg+xml" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])))
"""


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=180, check=False, cwd=EXAMPLES, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_engine_answers_every_request_and_idle_ranks_take_part() -> None:
    lines = run("engine_loop.py").splitlines()
    answers = [re.findall(r"(\d+): \[([\d, ]+)\]", line.split("'answers': ")[1]) for line in lines]
    assert [[len(tokens.split(",")) for _, tokens in each] for each in answers] == [[5, 3, 7, 4, 6, 2], [2, 3, 4]]
    steps = [re.search(r"'tokens in each step': \[([\d, ]+)\]", line)[1].split(", ") for line in lines]
    assert len(steps[0]) == len(steps[1])
    assert "0" in steps[1][:-1]


def test_a_layer_under_torchrun_is_as_computed_alone() -> None:
    lines = sorted(run(*TORCHRUN, "torchrun_layer.py").splitlines())
    assert lines == [f"rank {rank}: {3 + 2 * rank} tokens over collective, as computed alone" for rank in range(2)]


def test_every_prompt_of_every_rank_gets_its_text() -> None:
    lines = run("transformers_generate.py").splitlines()
    shown = re.findall(r"^(rank \d: '[\w ]+') -> '.+'$", "\n".join(lines), re.MULTILINE)
    assert shown == [
        "rank 0: 'The ferry leaves at'",
        "rank 1: 'Tokens travel'",
        "rank 1: 'Each expert'",
        "rank 1: 'All ranks take part'",
    ]


def test_the_program_of_the_page_on_transformers(tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "docs" / "transformers.md").read_text()
    program, *_ = re.findall(r"^```python\n(# generate\.py.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "generate.py").write_text(program)
    model = make_tiny("qwen3_moe", tmp_path / "model")
    lines = sorted(run(*TORCHRUN, str(tmp_path / "generate.py"), str(model)).splitlines())
    starts = ["rank 0: 'The ferry leaves at' -> ", "rank 1: 'Each expert' -> ", "rank 1: 'Tokens travel' -> "]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 3


def test_megatron_s_dispatcher_calls_give_what_the_layer_gives_alone() -> None:
    lines = run("megatron_drop_in.py").splitlines()
    assert lines == [f"rank {rank}: {3 + 4 * rank} tokens through 4 experts on 2 ranks, as computed alone" for rank in range(2)]


def test_survivors_name_the_lost_rank_and_go_on_with_the_same_sums() -> None:
    out = run("fault_recovery.py")
    for rank in (0, 2):
        assert re.search(rf"rank {rank}: step 3: Peer\w+Error names rank 1$", out, re.MULTILINE)
        assert f"rank {rank}: step 3 again: [5.0, 7.0, 9.0] from 2 ranks" in out
        assert f"rank {rank}: step 5: [5.0, 7.0, 9.0] from 2 ranks" in out


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_notebook_runs_and_draws_its_four_pictures() -> None:
    assert run("-c", EXECUTE, "quickstart.ipynb").splitlines()[-1] == "4"
