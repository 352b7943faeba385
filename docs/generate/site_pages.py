"""What MkDocs builds beside the pages in docs/: the API reference, and tables, all from the code and the data.

A page holds a line `<!-- made: NAME -->` where a table stands. Nothing that is made here is
committed. Pictures are, since the README shows them: `make figures`.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import performance
from result_files import table

ROOT = Path(__file__).parents[2]
API = {
    "tokenferry": "Ranks, workspaces, steps and dispatchers.",
    "tokenferry.reference": "The specification that every transport is compared with.",
    "tokenferry.layer": "A whole mixture-of-experts layer.",
    "tokenferry.router": "Which experts a token goes to, and with what weight.",
    "tokenferry.experts": "This rank's experts.",
    "tokenferry.shared_experts": "Experts that every token goes to.",
    "tokenferry.fixed_linear": "Linear layers whose rows do not depend on the batch.",
    "tokenferry.activations": "What stands between the two products of an expert.",
    "tokenferry.telemetry": "What ranks wait for, and where tokens go.",
    "tokenferry.placement": "Where experts should live, and whether moving them would pay.",
    "tokenferry.testing": "Rank processes for tests, and comparison of bits.",
    "tokenferry.supervisor": "Rank processes under one supervisor.",
    "tokenferry.transports.base": "For transports of your own.",
    "tokenferry.integrations.transformers": "Models of Hugging Face transformers.",
    "tokenferry.integrations.megatron": "Megatron-Core's dispatchers.",
    "tokenferry.integrations.vllm": "The plug-in for vLLM.",
    "tokenferry.benchmarking": "The methods of `tokenferry bench`.",
}
"""The public modules, each a page of the reference."""
WITHOUT_LIST = {
    "tokenferry.reference", "tokenferry.layer", "tokenferry.router", "tokenferry.shared_experts", "tokenferry.fixed_linear",
    "tokenferry.activations", "tokenferry.supervisor",
}  # fmt: skip
"""Modules without `__all__`: what they define under a public name is shown."""


def api_page(module: str) -> str:
    head = f"# {module}\n\n{API[module]}\n\n"
    if module in WITHOUT_LIST:
        return head + f"::: {module}\n    options:\n      heading_level: 2\n      show_root_heading: false\n"
    names = importlib.import_module(module).__all__
    names = [name for name in names if not (module == "tokenferry" and name == "reference")]
    return head + "\n\n".join(f"::: {home_of(module, name)}\n    options:\n      heading_level: 2" for name in names) + "\n"


def home_of(module: str, name: str) -> str:
    """Where a name is defined, since the reference reads the source and does not follow lazy imports."""
    loaded = importlib.import_module(module)
    try:
        value = getattr(loaded, name)
    except ImportError:  # vLLM's own worker is not there
        return f"{module}.{name.lower()}.{name}"
    home = getattr(value, "__module__", None)
    return f"{home}.{name}" if home and home.startswith("tokenferry") and inspect.getmodule(value) else f"{module}.{name}"


def error_table() -> str:
    errors = importlib.import_module("tokenferry.errors")
    classes = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.TokenferryError)]
    rows = [[f"`{cls.__name__}`", f"`{cls.__bases__[0].__name__}`", *when_and_what_to_do(cls)] for cls in classes]
    return table(["class", "is a", "when", "what to do"], rows)


def when_and_what_to_do(cls: type) -> tuple[str, str]:
    """The first two paragraphs of an exception's docstring."""
    when, what = (" ".join(paragraph.split()) for paragraph in str(inspect.getdoc(cls)).split("\n\n")[:2])
    head, found, what_to_do = what.partition("What to do: ")
    if head or not found:
        raise ValueError(f"the docstring of {cls.__name__} does not say what to do in its second paragraph")
    return when, what_to_do


def variable_table() -> str:
    env = importlib.import_module("tokenferry.env")
    sections = []
    for concern in env.CONCERNS:
        rows = [[f"`{field.metadata['name']}`", field.metadata["doc"]] for field in concern.__dataclass_fields__.values()]
        sections.append(f"## {inspect.getdoc(concern)}\n\n" + table(["variable", "meaning"], rows))
    return "\n\n".join(sections)


def engine_loop() -> str:
    """The function `serve` of the example, so that the page shows what the tests run."""
    text = (ROOT / "examples" / "engine_loop.py").read_text()
    serve = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "serve")
    return f"```python\n{ast.get_source_segment(text, serve)}\n```"


MADE = {"engine loop": engine_loop, "errors": error_table, "variables": variable_table, **performance.TABLES}


def on_files(files: Any, config: Any) -> Any:
    """Of MkDocs: the files that are made."""
    from mkdocs.structure.files import File

    texts = {f"api/{module.replace('.', '-')}.md": api_page(module) for module in API}
    texts["api/index.md"] = "# API reference\n\nMade from the docstrings.\n\n" + "\n".join(
        f"- [`{module}`]({module.replace('.', '-')}.md): {what}" for module, what in API.items()
    )
    for page, paper in {
        "contributing.md": "CONTRIBUTING.md",
        "security.md": "SECURITY.md",
        "changelog.md": "CHANGELOG.md",
    }.items():
        texts[page] = (ROOT / paper).read_text()
    for path, content in texts.items():
        files.append(File.generated(config, path, content=content))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Of MkDocs: tables in their places; links from the repository's papers as links within the site."""
    del page, config, files
    for before, after in {
        "](../benchmarks/results/": "](results/", "](../README.md)": "](index.md)", "](SECURITY.md)": "](security.md)",
        "](CONTRIBUTING.md)": "](contributing.md)", "](CHANGELOG.md)": "](changelog.md)",
    }.items():  # fmt: skip
        markdown = markdown.replace(before, after)
    return re.sub(r"<!-- made: (.+?) -->", lambda found: MADE[found[1]](), markdown)
