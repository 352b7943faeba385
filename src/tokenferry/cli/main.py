"""`tokenferry`: the commands and their options. A new command is a function here that calls a module beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import typer

from tokenferry.benchmarking import ALL_WAYS, PRESETS, REHEARSAL
from tokenferry.cli import options
from tokenferry.cli.failure import EXIT_CODE, one_line_errors
from tokenferry.cli.terminal import accept_any_text

TYPER_INTERRUPTED: Final = 130
"""The exit code with which typer leaves, without a word, on a Ctrl-C that comes before or after a command's own work."""

FORMATS_HELP: Final = (
    "Of hidden rows, several with commas: same, fp8_block128, fp8_block128-quantized (before the timed part), bytes."
)
PRESETS_HELP: Final = (
    f"Names with commas between them, or all: {', '.join(preset.name for preset in PRESETS)}. "
    f"With --rehearse: {', '.join(preset.name for preset in REHEARSAL)}."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixture-of-experts inference under expert parallelism.",
)


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
        from tokenferry.cli import run

        request = options.request(
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
) -> None:
    """Generate, and compare every token with the unmodified model in one process. Exit code 0: all equal, 1: not."""
    with one_line_errors():
        from tokenferry.cli import run

        request = options.request("verify", ranks, model, prompts, max_new_tokens, dtype, device, transport, seed, json, exact)
        raise typer.Exit(run.verify(request))


@app.command()
def doctor(json: options.Json = False) -> None:
    """Show this machine's topology, versions and environment, and which transports it can run and why."""
    with one_line_errors():
        from tokenferry.cli.doctor import print_report

        print_report(as_json=json)


bench = typer.Typer(no_args_is_help=True, help="Measure on this machine's GPUs.")
app.add_typer(bench, name="bench")


@bench.command("roundtrip")
def bench_roundtrip(
    ranks: int = typer.Option(2, min=1, help="GPUs to use."),
    capacity: int = typer.Option(None, min=1, help="Rows a rank that workspaces are opened for. Default: as many as it brings."),
    formats: str = typer.Option("same", "--format", help=FORMATS_HELP),
    output: Path = typer.Option(None, help="Write the records there, one JSON object a line."),
) -> None:
    """Time dispatch + combine on p2p and collective, beside a plain copy."""
    with one_line_errors():
        from tokenferry.cli.bench import round_trip_command

        raise typer.Exit(round_trip_command(ranks, output, capacity=capacity, formats=formats.split(",")))


@bench.command("layer")
def bench_layer(
    ranks: int = typer.Option(2, min=1, help="GPUs to use."),
    presets: str = typer.Option("all", help=PRESETS_HELP),
    tokens: str = typer.Option("1,8,32,128,512,4096", help="Tokens per rank."),
    budget_s: float = typer.Option(200.0, "--budget-s", min=0.0, help="Begin no further point after so many seconds."),
    output: Path = typer.Option(None, help="Write the records there, one JSON object a line."),
    rehearse: bool = typer.Option(False, help="On CPUs, with tiny sizes: every call and check, no figures."),
) -> None:
    """Time whole MoE layers beside their floor, the collective transport, and transformers' experts."""
    with one_line_errors():
        from tokenferry.cli.bench import layer_command

        raise typer.Exit(layer_command(ranks, presets, tokens, budget_s, output, rehearse=rehearse))


@bench.command("model")
def bench_model(
    ranks: options.Ranks = None,
    random_init: options.RandomInits = None,
    batches: str = typer.Option("8", help="Prompts of each rank, with --random-init."),
    prompts: str = typer.Option("128", help="Tokens of each prompt, with --random-init."),
    ways: str = typer.Option("all", help=f"Names with commas between them, or all: {', '.join(ALL_WAYS)}."),
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
