"""The site's own pages: their programs run, their commands and other programs parse, and what is made is of the data.

`make docs` builds the site and checks its links; the pages under "The evidence" have tests of their own for their examples.
"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import draw
import performance
import round_trips
import site_pages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("index", "start", "concepts", "which-transport", "coming-from", "errors")]
PAGES += [ROOT / "docs" / f"{name}.md" for name in ("environment", "performance", "trust")]
PAGES += sorted((ROOT / "docs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```(.+?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(f"{page.stem}-{number}", *found) for page in PAGES for number, found in enumerate(BLOCK.findall(page.read_text()), 1)]
RUN = [pytest.param(code, id=name) for name, kind, code in BLOCKS if kind == "python"]
NOT_RUN = [pytest.param(code, id=name) for name, kind, code in BLOCKS if kind == "{.python .not-run}"]
COMMANDS = [
    pytest.param(words, id=f"{name}: {' '.join(words[:3])}")
    for name, kind, code in BLOCKS
    if kind == "sh"
    for line in code.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]


def test_every_block_is_of_a_kind_that_is_looked_at() -> None:
    assert {kind for _, kind, _ in BLOCKS} == {"python", "{.python .not-run}", "sh"}


@pytest.mark.ranks
@pytest.mark.parametrize("code", RUN)
def test_a_program_runs_as_it_stands(code: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(code)
    if "run_ranks" not in code:
        exec(compile(code, str(path), "exec"), {"__name__": "page"})
        return
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", NOT_RUN)
def test_a_program_that_needs_more_is_python(code: str) -> None:
    ast.parse(code)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_names_what_is_there(words: list[str]) -> None:
    """Examples are run by tests/ranks/test_examples.py, `make demo` and `doctor` by tests of the command line."""
    if words[0] in ("python", "torchrun"):
        assert [word for word in words if word.endswith(".py") and not (ROOT / word).exists()] == []
    elif words[0] == "make":
        assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text()
    elif words[0] == "tokenferry":
        positional = [word for word in words[1:3] if not word.startswith("-")]
        done = subprocess.run(
            [sys.executable, "-m", "tokenferry.cli", *positional, "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        plain = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
        assert [word for word in words if word.startswith("--") and word not in plain] == []
    else:
        assert words[0] in ("pip", "vllm")


def test_the_figures_of_the_page_on_transports_are_those_of_the_records() -> None:
    curves, library = round_trips.curves(7168), round_trips.faster_of_nccl(7168)
    text = (ROOT / "docs" / "which-transport.md").read_text()
    for pair in (curves["p2p"], library):
        assert f"{pair[8]:.2g} and {pair[4096]:.0f} µs" in text


@pytest.mark.parametrize("name", performance.TABLES)
def test_a_table_has_rows_and_says_where_they_are_from(name: str) -> None:
    lines = performance.TABLES[name]().splitlines()
    assert sum(line.startswith("| ") for line in lines) > 3
    assert re.search(r"`benchmarks/results/.+`: 2 × NVIDIA H\d00.*, torch 2.*, 2026-.*, commit \w+\.$", lines[-1])


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_a_picture_is_up_to_date_and_no_text_leaves_it(name: str) -> None:
    drawn = draw.DRAWINGS[name]()
    assert drawn == (draw.FOLDER / name).read_text(), "run `make figures`"
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn).groups())
    starts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start" [^>]*font-size="(\d+)"[^>]*>([^<]*)<', drawn)
    assert starts
    assert [text for x, y, size, text in starts if float(x) + 0.58 * int(size) * len(text) > width or float(y) > height] == []


def test_every_error_and_every_variable_is_in_its_table() -> None:
    import tokenferry
    from tokenferry import env

    errors, variables = site_pages.error_table(), site_pages.variable_table()
    assert [name for name in tokenferry.__all__ if name.endswith("Error") and f"| `{name}` |" not in errors] == []
    assert [variable.name for variable in env.table() if f"`{variable.name}`" not in variables] == []


def test_every_mark_on_a_page_names_something_that_is_made() -> None:
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- made: (.+?) -->", page.read_text())]
    assert sorted(marks) == sorted(site_pages.MADE)
    assert all(site_pages.MADE[mark]() for mark in marks)


def test_every_public_name_is_in_the_reference() -> None:
    import tokenferry

    page = site_pages.api_page("tokenferry")
    assert [name for name in tokenferry.__all__ if name != "reference" and f".{name}\n" not in page] == []
