"""Papers around the code that must not fall behind it: the README, the citation, issue forms, the hooks, the list of releases."""

import re
from pathlib import Path

import pytest
import yaml

import tokenferry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").rglob("*.md"))
MOST_CHARACTERS = 160
"""Of a line of text: source is read in terminals and in reviews too."""
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def test_the_readme_has_fewer_than_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_every_record_is_named_where_its_figures_stand():
    """In a page or a comment, whole or by how it ends: `2xH100-2026-11-22-tune.jsonl` also as `…-tune.jsonl`."""
    sources = [*PAGES, *(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    names = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.jsonl")]
    ends = {name: [name] + [name[dash.start() :] for dash in re.finditer("-", name)] for name in names}
    assert [name for name in names if not any(re.search(rf"(?<![\w-]){re.escape(end)}", text) for end in ends[name])] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_of_text_can_be_read_in_a_terminal(page):
    """Rows of tables cannot be broken."""
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > MOST_CHARACTERS and not line.startswith("|")] == []


@pytest.mark.parametrize(
    "paper", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/doctor.md", "docs/install.md", "docs/releasing.md"]
)
def test_files_that_a_paper_names_are_there(paper):
    text = (ROOT / paper).read_text()
    linked = {(ROOT / paper).parent / target for target in re.findall(r"\]\(([\w./-]+)\)", text)}
    named = {ROOT / name for name in re.findall(r"(?:docs|benchmarks/results|tests)/[\w./-]+\.(?:md|jsonl|py)", text)}
    assert [str(path) for path in sorted(linked | named) if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_records_that_a_page_names_are_there(page):
    """A name may be cut at its beginning: "…-26-capacity.jsonl"."""
    records = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.jsonl")]
    named = re.findall(r"(?:…|\b\dx(?:H\d00|CPU))-[\w-]+\.jsonl", page.read_text())
    assert [name for name in named if not any(record.endswith(name.removeprefix("…")) for record in records)] == []


def test_the_layout_in_contributing_names_every_module():
    layout = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    parts = {
        path.name for path in (ROOT / "src" / "tokenferry").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(part for part in parts if part not in layout) == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (str(citation["version"]), citation["license"]) == (tokenferry.__version__, "Apache-2.0")


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_doctor(form):
    fields = {field["id"]: field for field in yaml.safe_load(form.read_text())["body"]}
    assert "`tokenferry doctor --json`" in fields["doctor"]["attributes"]["label"]
    assert form.stem == "wish" or fields["doctor"]["validations"]["required"]


def test_hooks_run_the_linters_of_make_lint():
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = [re.sub(r" (--check|\.)", "", line.strip().removeprefix("$(BIN)/")) for line in lint[1].splitlines()]
    run = [re.sub(r" --(fix|force-exclude)", "", hook["entry"].removeprefix(".venv/bin/")) for hook in hooks]
    assert run == made
