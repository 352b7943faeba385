"""`tokenferry`: the commands and their options. A new command is a function here that calls a module beside this one.

Each imports that module when it runs, within `loading()`: torch comes with it, and `--help` must not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import typer

import tokenferry
from tokenferry.cli import options
from tokenferry.cli.failure import EXIT_CODE, fail, one_line_errors
from tokenferry.cli.names import MODEL_CONFIGS, PRESETS, REHEARSAL_PRESETS, WAYS
from tokenferry.cli.terminal import accept_any_text
from tokenferry_command import loading

TYPER_INTERRUPTED: Final = 130
"""The exit code with which typer leaves, without a word, on a Ctrl-C that comes before or after a command's own work."""

COMBINE_FORMATS_HELP: Final = (
    "same, fp8_block128 (quantized by the combine) or fp8_block128-quantized (before it), or several with commas."
)
FORMATS_HELP: Final = (
    "Of hidden rows, several with commas: same, fp8_block128, fp8_block128-quantized (before the timed part), bytes."
)
PRESETS_HELP: Final = (
    f"Names with commas between them, or all: {', '.join(PRESETS)}. With --rehearse: {', '.join(REHEARSAL_PRESETS)}."
)

PLAN_HELP: Final = f"One of {', '.join(dict.fromkeys((*MODEL_CONFIGS, *PRESETS)))}, or the path of a config.json."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixture-of-experts inference under expert parallelism.",
)


def print_version(wanted: bool) -> None:
    """Print it and leave, if wanted."""
    if wanted:
        typer.echo(f"tokenferry {tokenferry.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: bool = typer.Option(False, "--version", callback=print_version, is_eager=True, help="Print the version and leave."),
) -> None:
    """Mixture-of-experts inference under expert parallelism."""


@app.command()
def generate(
    ranks: options.Ranks = None,
    model: options.Model = "demo",
    random_init: options.RandomInit = None,
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 64,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.auto,
    transport: options.Transport = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Answer prompts with a mixture-of-experts model whose experts are spread over ranks. Runs under torchrun too."""
    with one_line_errors():
        with loading():
            from tokenferry.cli import run
            from tokenferry.cli.request import request_of

        request = request_of(
            "generate",
            ranks,
            model,
            prompts,
            max_new_tokens,
            dtype,
            device,
            transport,
            seed,
            json,
            random_init=random_init,
        )
        raise typer.Exit(run.generate(request))


@app.command()
def verify(
    ranks: options.Ranks = None,
    model: options.Model = "demo",
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 32,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.auto,
    transport: options.Transport = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
    exact: options.Exact = False,
    dispatch_format: options.DispatchFormat = "same",
    combine_dtype: options.CombineDtype = "float32",
) -> None:
    """Generate, and compare every token with the unmodified model in one process. Exit code 0: all equal, 1: not.

    With rows or sums that are rounded on their way, tokens that differ are counted, and the exit code stays 0.
    """
    with one_line_errors():
        with loading():
            from tokenferry.cli import run
            from tokenferry.cli.request import request_of

        given = (ranks, model, prompts, max_new_tokens, dtype, device, transport, seed, json, exact)
        request = request_of("verify", *given, dispatch_format=dispatch_format, combine_dtype=combine_dtype)
        raise typer.Exit(run.verify(request))


@app.command()
def inspect(
    ranks: options.Ranks = None,
    model: options.Model = "demo",
    random_init: options.RandomInit = None,
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 32,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.auto,
    transport: options.Transport = "auto",
    seed: options.Seed = 0,
    output: Path = typer.Option(Path("tokenferry-report"), help="Folder for report.html and the pictures."),
    json: options.Json = False,
) -> None:
    """Run prompts, and report where tokens went, what the ranks waited for, and whether balancing experts would pay."""
    with one_line_errors():
        with loading():
            from tokenferry.cli.inspect import inspect as inspect_run
            from tokenferry.cli.request import request_of

        request = request_of(
            "inspect",
            ranks,
            model,
            prompts,
            max_new_tokens,
            dtype,
            device,
            transport,
            seed,
            json,
            random_init=random_init,
        )
        raise typer.Exit(inspect_run(request, output))


@app.command()
def doctor(
    json: options.Json = False,
    selftest: bool = typer.Option(True, "--selftest/--no-selftest", help="Whether transports are opened and tried here."),
    nvls: bool = typer.Option(False, "--nvls", help="Try nvls on the GPUs too: it has not run on any yet."),
    plan: str = typer.Option(None, metavar="PRESET|CONFIG", help=f"Bytes and times for a model instead. {PLAN_HELP}"),
    ep: int = typer.Option(None, "--ep", min=1, help="With --plan: ranks that share the experts."),
    max_tokens: int = typer.Option(None, "--max-tokens", min=1, help="With --plan: most tokens that a rank brings to a step."),
) -> None:
    """Show this machine and which transports run on it, and try each. Exit code 0: healthy, 1: degraded, 3: broken."""
    with one_line_errors():
        if plan is None and (ep, max_tokens) != (None, None):
            fail("--ep and --max-tokens belong to --plan, which is not given")
        if selftest and plan is None:
            from tokenferry.supervisor import start_fork_server

            start_fork_server()  # it imports torch while we do
        with loading():
            from tokenferry.cli.doctor import print_plan, print_report

        if plan is not None:
            raise typer.Exit(print_plan(plan, ep, max_tokens, as_json=json))
        raise typer.Exit(print_report(as_json=json, with_selftest=selftest, with_nvls=nvls))


bench = typer.Typer(no_args_is_help=True, help="Measure on this machine's GPUs.")
app.add_typer(bench, name="bench")


@bench.command("roundtrip")
def bench_roundtrip(
    ranks: int = typer.Option(2, min=1, help="GPUs to use."),
    capacity: int = typer.Option(None, min=1, help="Rows a rank that workspaces are opened for. Default: as many as it brings."),
    exact_too: bool = typer.Option(
        False, "--exact-too", help="With --capacity: p2p also in workspaces of as many rows as it brings."
    ),
    formats: str = typer.Option("same", "--format", help=FORMATS_HELP),
    combine_formats: str = typer.Option("same", "--combine-format", help=COMBINE_FORMATS_HELP),
    output: Path = typer.Option(None, help="Write the records there, one JSON object a line."),
    rehearse: bool = typer.Option(False, help="On CPUs, with tiny sizes: every call and check, no figures."),
) -> None:
    """Time dispatch + combine on p2p and collective, beside a plain copy."""
    with one_line_errors():
        with loading():
            from tokenferry.cli.bench import round_trip_command

        how = formats.split(","), combine_formats.split(",")
        code = round_trip_command(
            ranks, output, capacity=capacity, exact_too=exact_too, formats=how[0], combine_formats=how[1], rehearse=rehearse
        )
        raise typer.Exit(code)


@bench.command("layer")
def bench_layer(
    ranks: int = typer.Option(2, min=1, help="GPUs to use."),
    presets: str = typer.Option("all", help=PRESETS_HELP),
    tokens: str = typer.Option("1,8,32,128,512,4096", help="Tokens per rank."),
    budget_s: float = typer.Option(200.0, "--budget-s", min=0.0, help="Begin no further point after so many seconds."),
    output: Path = typer.Option(None, help="Write the records there, one JSON object a line."),
    rehearse: bool = typer.Option(False, help="On CPUs, with tiny sizes: every call and check, no figures."),
    float8: bool = typer.Option(False, "--float8", help="Float8 weights: rows and terms in bfloat16 beside float8 ones."),
) -> None:
    """Time whole MoE layers beside their floor, the collective transport, and transformers' experts."""
    with one_line_errors():
        with loading():
            from tokenferry.cli.bench import layer_command

        raise typer.Exit(layer_command(ranks, presets, tokens, budget_s, output, rehearse=rehearse, float8=float8))


@bench.command("model")
def bench_model(
    ranks: options.Ranks = None,
    random_init: options.RandomInits = None,
    batches: str = typer.Option("8", help="Prompts of each rank, with --random-init."),
    prompts: str = typer.Option("128", help="Tokens of each prompt, with --random-init."),
    ways: str = typer.Option("all", help=f"Names with commas between them, or all: {', '.join(WAYS)}."),
    modes: str = typer.Option("", help="Names with commas between them, of docs/benchmarking.md.  [default: all]"),
    new_tokens: int = typer.Option(64, min=2, help="New tokens of each prompt."),
    capacity: int = typer.Option(4096, min=1, help="Most tokens of a forward on a rank (max_tokens_per_rank)."),
    transport: options.Transport = "p2p",
    budget_s: float = typer.Option(
        280.0, "--budget-s", min=0.0, help="Begin nothing after so many seconds, and say what is left."
    ),
    output: Path = typer.Option(None, help="Write the records there, one JSON object a line, each as it comes."),
    rehearse: bool = typer.Option(False, help="On CPUs, with tiny sizes: every call and comparison, no figures."),
) -> None:
    """Time decoding with transformers: ours, its own expert parallelism, the plain model. Runs under torchrun too."""
    with one_line_errors():
        with loading():
            from tokenferry.cli.bench_model import model_command

        raise typer.Exit(
            model_command(
                ranks,
                random_init or (),
                batches,
                prompts,
                ways,
                budget_s,
                output,
                modes=modes,
                new_tokens=new_tokens,
                capacity=capacity,
                transport=transport,
                rehearse=rehearse,
            )
        )


def run() -> None:
    """The entry point of the command `tokenferry`."""
    accept_any_text()
    try:
        app()
    except SystemExit as leaving:
        if leaving.code != TYPER_INTERRUPTED:
            raise
        typer.echo("tokenferry: interrupted", err=True)
        raise SystemExit(EXIT_CODE) from None
