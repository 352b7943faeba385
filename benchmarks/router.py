"""The router on one GPU: its kernel beside the chain of PyTorch operators, for the models of `tokenferry bench layer`.

python benchmarks/router.py                 # writes router.jsonl here, and prints a table last; a minute or two
python benchmarks/router.py OUTPUT.jsonl [--presets deepseek-v3,gpt-oss-120b] [--tokens 1,8,32] [--commit HASH]
python benchmarks/router.py --rehearse      # without a GPU: small sizes, the kernel interpreted, every comparison, no times

Both choose from logits that they compute themselves, so that experts whose scores are nearly equal may change places. Rows are
compared as sets of experts; where these differ, the experts in question must lie within TIE of one another. Exit code 1 where
some do not, or where a weight differs by more than TIE.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when a kernel is defined

import torch
import triton

from tokenferry import router as library
from tokenferry.benchmarking import PRESETS, Preset
from tokenferry.router import Router, RouterConfig

TOKENS = (1, 8, 32, 512, 4096)
CALLS, REPLAYS = 20, 15
TIE = 1e-4
"""float32 sums over H products in another order differ by less; scores are at most 1, logits of random rows a few."""

Routing = tuple[torch.Tensor, torch.Tensor]
"""Weights and expert numbers."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the kernel says beside the operators, of the rows of one call.

    Attributes:
        same, ties, other: rows with the same set of experts; with other experts that tie with those; with others.
        weight_difference: the largest, of the same expert in rows with the same set; None if there is no such row.
    """

    same: int
    ties: int
    other: int
    weight_difference: float | None

    @property
    def is_right(self) -> bool:
        return self.other == 0 and (self.weight_difference or 0.0) <= TIE


def compare(got: Routing, expected: Routing, logits_TE: torch.Tensor, router: Router) -> Comparison:
    """`got` beside `expected`, which were chosen from logits near `logits_TE`. Their order within a row does not count."""
    choice_TE = choice_of(logits_TE, router)
    is_got_TE, is_expected_TE = chosen(got[1], choice_TE), chosen(expected[1], choice_TE)
    same_T = (is_got_TE == is_expected_TE).all(1)
    difference = None
    if bool(same_T.any()):
        by_expert = [torch.zeros_like(choice_TE).scatter_(1, idx.long(), weights) for weights, idx in (got, expected)]
        difference = (by_expert[0] - by_expert[1])[same_T].abs().max().item()
    others = torch.nonzero(~same_T).flatten().tolist()
    ties = sum(is_tie(choice_TE[row], is_got_TE[row], is_expected_TE[row], router.config) for row in others)
    return Comparison(len(same_T) - len(others), ties, len(others) - ties, difference)


def choice_of(logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """What experts are chosen by, before groups are dropped."""
    config, logits_TE = router.config, logits_TE.float()
    if config.topk_before_score:
        return logits_TE
    scores_TE = logits_TE.sigmoid() if config.score_function == "sigmoid" else logits_TE.softmax(-1)
    return scores_TE if router.score_correction_bias is None else scores_TE + router.score_correction_bias


def chosen(idx_TK: torch.Tensor, like_TE: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like_TE, dtype=torch.bool).scatter_(1, idx_TK.long(), True)


def is_tie(choice_E: torch.Tensor, is_got_E: torch.Tensor, is_expected_E: torch.Tensor, config: RouterConfig) -> bool:
    """Whether two choices of a row differ only where scores of experts, or of whole groups, lie within TIE of one another."""
    if int(is_got_E.sum()) != int(is_expected_E.sum()):
        return False
    if config.num_groups > 1:
        used = [mask.view(config.num_groups, -1).any(1) for mask in (is_got_E, is_expected_E)]
        scores_G = choice_E.view(config.num_groups, -1).topk(config.group_score_topk, dim=1).values.sum(1)
        ordered = scores_G.sort(descending=True).values
        last_kept = ordered[config.topk_groups - 1]
        first_dropped = ordered[min(config.topk_groups, config.num_groups - 1)]
        disputed = scores_G[used[0] != used[1]]
        near = torch.minimum((disputed - last_kept).abs(), (disputed - first_dropped).abs())
        if bool((near <= 2 * TIE).any()) and bool(last_kept - first_dropped <= 2 * TIE):
            return True  # another group was kept: its experts have scores of their own
    got, expected = choice_E[is_got_E].sort().values, choice_E[is_expected_E].sort().values
    return bool(((got - expected).abs() <= TIE).all())


def time_us(call: Callable[[torch.Tensor], object], rows: list[torch.Tensor]) -> float:
    """Microseconds of a call: a graph of CALLS with other rows each, of REPLAYS the median."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for hidden in rows:
            call(hidden)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for hidden in rows:
            call(hidden)
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(rows))
    return statistics.median(times[3:])


def with_kernel(router: Router, used: bool) -> Callable[[torch.Tensor], Routing]:
    """The router with its kernel, or with PyTorch's operators in its place."""

    def call(hidden: torch.Tensor) -> Routing:
        with mock.patch.object(library, "_has_kernel", return_value=used), torch.no_grad():
            return router(hidden)

    return call


def twin_of(router: Router) -> Router:
    """As before there was a kernel: a float32 weight where logits are float32."""
    dtype = torch.float32 if router.config.float32_logits else router.weight.dtype
    twin = Router(router.config, dtype=dtype, device=router.weight.device)
    twin.load_state_dict(router.state_dict())
    return twin


def logits_of(router: Router, hidden: torch.Tensor) -> torch.Tensor:
    seen = {}

    def keep(logits_TE: torch.Tensor, *_: object) -> None:
        seen["logits"] = logits_TE

    with mock.patch.object(library, "route", keep), torch.no_grad():
        router(hidden)
    return seen["logits"]


def measure(preset: Preset, tokens: list[int], device: str) -> list[dict]:
    torch.manual_seed(1)
    config = RouterConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk, **preset.router)
    router = Router(config, device=device)
    if router.score_correction_bias is not None:
        router.score_correction_bias.normal_(std=0.05)
    twin = twin_of(router)
    by_kernel, by_operators = with_kernel(router, True), with_kernel(twin, False)
    records = []
    for count in tokens:
        rows = [torch.randn(count, preset.hidden_size, device=device).bfloat16() for _ in range(CALLS)]
        times = {"operators_us": [], "kernel_us": []}
        for _ in range(2 if device == "cuda" else 0):
            times["operators_us"].append(round(time_us(by_operators, rows), 2))
            times["kernel_us"].append(round(time_us(by_kernel, rows), 2))
        comparison = compare(by_kernel(rows[0]), by_operators(rows[0]), logits_of(twin, rows[0]), router)
        records.append(
            {"preset": preset.name, "tokens": count, **times, **dataclasses.asdict(comparison), "is_right": comparison.is_right}
        )
        print(f"{preset.name}, {count} rows: {'right' if comparison.is_right else 'WRONG'}", file=sys.stderr, flush=True)
    return records


def table(records: list[dict]) -> str:
    """Times are the smaller of both measurements."""
    times = f"{'operators us':>14}{'kernel us':>11}{'ratio':>7}"
    lines = [f"{'preset':<15}{'T':>6}{times}{'same':>7}{'ties':>6}{'other':>7}{'weights':>10}"]
    for record in records:
        slow, fast = (min(record[name], default=None) for name in ("operators_us", "kernel_us"))
        times = (
            f"{'-':>14}{'-':>11}{'-':>7}" if slow is None or fast is None else f"{slow:>14.2f}{fast:>11.2f}{slow / fast:>7.1f}"
        )
        weights = "-" if record["weight_difference"] is None else f"{record['weight_difference']:.1e}"
        counts = f"{record['same']:>7}{record['ties']:>6}{record['other']:>7}{weights:>10}"
        lines.append(f"{record['preset']:<15}{record['tokens']:>6}{times}{counts}{'' if record['is_right'] else '  WRONG'}")
    return "\n".join(lines)


def commit_of_this_tree() -> str:
    """With "+" where files were changed since; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def chosen_presets(names: str, rehearse: bool) -> list[Preset]:
    by_name = {preset.name: preset for preset in PRESETS}
    unknown = [name for name in names.split(",") if names != "all" and name not in by_name]
    if unknown:
        sys.exit(f"no preset {', '.join(unknown)}; there are {', '.join(by_name)}")
    presets = list(PRESETS) if names == "all" else [by_name[name] for name in names.split(",")]
    return [dataclasses.replace(preset, hidden_size=64) for preset in presets] if rehearse else presets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("router.jsonl"))
    parser.add_argument("--presets", default="all")
    parser.add_argument("--tokens", default=None, help="default: 1,8,32,512,4096; rehearsing: 1,8")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks/router.py needs a CUDA GPU and there is none; --rehearse runs without")
    device = "cpu" if options.rehearse else "cuda"
    tokens = (
        [int(count) for count in options.tokens.split(",")] if options.tokens else list(TOKENS[: 2 if options.rehearse else None])
    )
    common = {
        "what": "router rehearsal" if options.rehearse else "router",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": options.commit or commit_of_this_tree(),
        "date": time.strftime("%Y-%m-%d"),
    }
    records = []
    with options.output.open("a") as file:
        for preset in chosen_presets(options.presets, options.rehearse):
            for record in measure(preset, tokens, device):
                records.append(record)
                file.write(json.dumps({**record, **common}) + "\n")
            file.flush()
    print(f"{common['gpu'] or 'rehearsed without a GPU'}, torch {common['torch']}, Triton {common['triton']}, {common['commit']}")
    print(table(records))
    return 0 if all(record["is_right"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
