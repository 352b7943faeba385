"""Fills Triton's cache with the kernels of a benchmark, many at a time: a run on a bare machine is mostly compiling.

python benchmarks/precompile.py [--presets qwen3-30b-a3b,deepseek-v3] [--float8 deepseek-v3] [--processes 16]
python benchmarks/precompile.py --presets "" --round-trips 7168,2048 [--capacities 1,8,4096] [--formats] [--telemetry]

`--presets` are those of `tokenferry bench layer`, `--float8` those whose weights it quantizes; `--round-trips` are hidden sizes
of `tokenferry bench roundtrip`, in workspaces of C = 4096 also with float8 rows and terms (`--formats`), and with what
`benchmarks/telemetry.py` measures (`--telemetry`). It needs no GPU, and compiles for Hopper with 132 SMs: what another GPU
needs is compiled when it is asked for. Where there is a GPU, the routers' choice is compiled there too, which only a call can
do.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from compiling import compile_all
from expert_plans import variant_of
from tokenferry import MoEConfig
from tokenferry.benchmarking.layer_formats import FORMATS, Formats
from tokenferry.benchmarking.presets import PRESETS, Preset
from tokenferry.benchmarking.round_trip_data import NUM_EXPERTS, RoundTripPoint
from tokenferry.dispatched import FLOAT8, RowFormat
from tokenferry.experts import variants
from tokenferry.kernels import abort, control_words, counts, launch, load_counts, router_linear
from tokenferry.kernels.launch import KernelSpec, specify
from tokenferry.router import Router, RouterConfig
from tokenferry.transports.collective.rows import KernelRowWork
from tokenferry.transports.symmetric import layout, loading, tuning

CAPACITY, EP, SMS = 4096, 2, 132
PLAIN = FORMATS["same"]


class Notes:
    """Stands in for what loads kernels, and keeps what was asked for."""

    def __init__(self) -> None:
        self.specs: dict[KernelSpec, None] = {}

    def load(self, spec: KernelSpec, device: Any) -> Any:
        """In the place of `launch.load`."""
        self.specs[spec] = None
        return SimpleNamespace(resident=2 * SMS, bind=lambda *args, **kwargs: None)

    def prepare(self, kernel, signature, constants, num_warps, device, *, max_registers=None) -> Any:
        """In the place of `launch.prepare`."""
        return self.load(specify(kernel, signature, constants, num_warps=num_warps, max_registers=max_registers), device)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, what would be loaded is noted, as on a GPU with SMS multiprocessors."""

        def has_pdl(device: Any) -> bool:
            return True

        with ExitStack() as stack:
            for module, name, stand_in in (
                (loading, "has_pdl", has_pdl), (tuning, "_num_sms", lambda settings: SMS),
                (launch, "load", self.load), (launch, "has_pdl", has_pdl), (variants, "has_pdl", has_pdl),
                (router_linear, "load", self.load), (router_linear, "has_pdl", has_pdl),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(module, name, stand_in))
            yield


def exchange_specs(config: MoEConfig, formats: Formats, capacity: int = CAPACITY, *, telemetry: bool = False) -> list[KernelSpec]:
    """Every kernel of a workspace, on p2p and on collective."""
    settings: Any = SimpleNamespace(
        config=config, group=SimpleNamespace(device=torch.device("cuda"), size=EP, rank=0), max_tokens_per_rank=capacity,
        combine_dtype=formats.combine_dtype, combine_order="rank", result_dtype=torch.bfloat16, index_dtype=torch.int32,
        dispatch_format=RowFormat.of(formats.dispatch_format), recorder=() if telemetry else None, max_ctas=None,
    )  # fmt: skip
    notes = Notes()
    with notes.taken():
        cut = layout.plan(config, EP, capacity, formats.combine_dtype, dispatch_format=settings.dispatch_format)
        chosen = tuning.choose_tuning(settings, cut)
        few = tuning.choose_few_tokens(settings, cut, chosen)
        specs = [*loading.specify_rows(settings, chosen, multicast=False).all]
        if few is not None:
            specs += loading.specify_rows(settings, few.tuning, multicast=False, flag_block=chosen.block).all
        notes.prepare(counts.counts_kernel, counts.SIGNATURE, {"LANES": 32, "TELEMETRY": int(telemetry), "PDL": 1}, 1, None)
        notes.prepare(abort.abort_kernel, abort.SIGNATURE, {"PDL": 0}, 1, None)
        notes.prepare(control_words.add_kernel, control_words.SIGNATURE, {"PDL": 0}, 1, None)
        KernelRowWork(settings)
    return [*specs, *notes.specs]


def expert_specs(preset: Preset, formats: Formats | None = None) -> list[KernelSpec]:
    """Every kernel of the preset's experts; with formats those of float8 weights, in a workspace of these formats."""
    changes: list[dict[str, Any]] = [{"weight_dtype": torch.int32} if preset.mxfp4 else {}]
    if formats is not None:
        rows = {"weight_dtype": FLOAT8, "quantized_rows": RowFormat.of(formats.dispatch_format).is_quantized}
        changes = [{**rows, "out_dtype": out} for out in {torch.bfloat16, formats.combine_dtype}]
    with Notes().taken():
        made = (variant_of(preset, max_rows=CAPACITY * EP, **each) for each in changes)
        return [spec for variant in made for spec in variants.specs(variant, torch.device("cpu")).all]


def router_of(preset: Preset, device: str) -> Router:
    """With weights on the device, or without any on "meta"."""
    sizes = {"hidden_size": preset.hidden_size, "num_experts": preset.num_experts, "topk": preset.topk}
    return Router(RouterConfig(**sizes, **preset.router), device=device)


def router_specs(preset: Preset) -> list[KernelSpec]:
    """The router's product of few rows."""
    router, notes = router_of(preset, "meta"), Notes()
    with notes.taken():
        router_linear.load_for(router.weight, router.bias, router._logits_dtype)
    return list(notes.specs)


def layer_specs(preset: Preset, *, float8: bool) -> dict[KernelSpec, None]:
    """Every kernel of a benchmark of the preset's layer."""
    config = MoEConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk)
    found = [*exchange_specs(config, PLAIN), *expert_specs(preset), *router_specs(preset)]
    for formats in FORMATS.values() if float8 else ():
        found += [*exchange_specs(config, formats), *expert_specs(preset, formats)]
    return dict.fromkeys(found)


def round_trip_specs(
    hidden_size: int, capacities: list[int], *, formats: bool = False, telemetry: bool = False
) -> dict[KernelSpec, None]:
    """Every kernel of a benchmark of round trips, in workspaces of these capacities; of the largest with more settings."""
    topk = RoundTripPoint(transport="p2p", hidden_size=hidden_size, tokens=(1,), capacity=1).topk
    config = MoEConfig(hidden_size=hidden_size, num_experts=NUM_EXPERTS, topk=topk)
    found = [spec for capacity in capacities for spec in exchange_specs(config, PLAIN, capacity)]
    for rows, terms in product(("same", "fp8_block128"), (torch.bfloat16, FLOAT8)) if formats else ():
        found += exchange_specs(config, Formats(rows, terms))
    if telemetry:
        found += [*exchange_specs(config, PLAIN, telemetry=True), *counting_specs(topk)]
    return dict.fromkeys(found)


def counting_specs(topk: int) -> list[KernelSpec]:
    """What counts experts' rows: a launch of its own, or the table of our own experts."""
    notes, some = Notes(), next(preset for preset in PRESETS if preset.topk == topk)
    with notes.taken():
        constants = {"K": topk, "BLOCK": load_counts.BLOCK, "PDL": 1}
        notes.prepare(load_counts.load_counts_kernel, load_counts.SIGNATURE, constants, load_counts.NUM_WARPS, None)
        table = variants.table_spec(variant_of(some, max_rows=CAPACITY * EP), torch.device("cpu"), counts_loads=True)
    return [*notes.specs, table]


def choose(presets: list[Preset]) -> None:
    """One choice of each router, whose kernel Triton compiles for the arguments of a call."""
    for preset in presets:
        router_of(preset, "cuda")(torch.randn(2, preset.hidden_size, dtype=torch.bfloat16, device="cuda"))


def numbers(text: str) -> list[int]:
    """Those of a list with commas, which may be empty."""
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default=",".join(preset.name for preset in PRESETS))
    parser.add_argument("--float8", default="", help="presets that are measured with float8 weights too, with commas")
    parser.add_argument("--round-trips", type=numbers, default=[], help="hidden sizes, with commas")
    parser.add_argument("--capacities", type=numbers, default=[1, 8, 32, 128, 512, 4096])
    parser.add_argument("--formats", action="store_true", help="of --round-trips: float8 rows and terms too")
    parser.add_argument("--telemetry", action="store_true", help="of --round-trips: with telemetry too")
    parser.add_argument("--processes", type=int, default=16)
    given = parser.parse_args()
    start, specs = time.monotonic(), dict[KernelSpec, None]()
    presets = [preset for preset in PRESETS if preset.name in given.presets.split(",")]
    for preset in presets:
        specs |= layer_specs(preset, float8=preset.name in given.float8.split(","))
    for hidden_size in given.round_trips:
        specs |= round_trip_specs(hidden_size, given.capacities, formats=given.formats, telemetry=given.telemetry)
    failed = compile_all(specs, given.processes, partial(choose, presets) if torch.cuda.is_available() else None)
    print(f"{len(specs)} kernels compiled in {time.monotonic() - start:.0f} s", *failed, sep="\n")


if __name__ == "__main__":
    main()
