"""Decoding with transformers: `tokenferry bench model` as a script, and the picture of its records.

torchrun --nproc-per-node 2 benchmarks/model.py OUTPUT.jsonl [--random-init qwen3-30b-a3b:8] [--batches 1,8,32]
                            [--prompts 128,512] [--ways plain,p2p]
                            [--modes graph,eager] [--families qwen3_moe] [--budget-s 280] [--commit HASH]
python benchmarks/model.py OUTPUT.jsonl --ranks 2 --rehearse      # CPUs, tiny sizes: every call and comparison, no times
python benchmarks/model.py OUTPUT.jsonl --plot PICTURE.png        # the times of a file that is there

Without --random-init it measures the points of the published table.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenferry.benchmarking import TINY_FAMILIES
from tokenferry.benchmarking.model_tables import shown
from tokenferry.cli.bench_model import model_command

BARS = (
    ("p2p", "graph-compiled", "token_ms", "ours, graphs of compiled steps"),
    ("p2p", "graph", "token_ms", "ours, graphs"),
    ("p2p", "eager", "token_ms", "ours, eager"),
    ("collective", "eager", "token_ms", "ours over NCCL, eager"),
    ("transformers", "compile", "token_ms", "transformers, compiled, grouped_mm"),
    ("transformers", "compile-batched", "token_ms", "transformers, compiled, batched_mm"),
    ("transformers", "eager", "token_ms", "transformers, eager"),
    ("plain", "eager", "token_ms", "plain model on each GPU, eager"),
)
STEPS = (("p2p", "graph-compiled", 0), ("p2p", "graph", 1), ("transformers", "graph", 4))
"""Whose step alone, as a graph, is drawn as a mark, and in which bar."""


def plot(source: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in map(json.loads, source.read_text().splitlines()) if "mode" in record]
    points = list(
        dict.fromkeys((record["config"], record["batch"], record["prompt"]) for record in records if "token_ms" in record)
    )
    figure, axes = pyplot.subplots(1, len(points), figsize=(2.6 * len(points), 4.8), squeeze=False)
    for axis, point in zip(axes[0], points, strict=True):
        mine = {(r["way"], r["mode"]): r for r in records if (r["config"], r["batch"], r["prompt"]) == point}
        for place, (way, mode, name, label) in enumerate(BARS):
            value = mine.get((way, mode), {}).get(name)
            axis.bar(place, value or 0, color=f"C{place}", label=label)
            axis.text(place, value or 0, shown(value), ha="center", va="bottom", fontsize=6)
        for way, mode, place in STEPS:
            value = mine.get((way, mode), {}).get("step_ms")
            if value is not None:
                axis.plot(place, value, "k_", markersize=12, label="a step alone, as a graph")
        axis.set(title=f"{point[0]}\nbatch {point[1]}, prompt {point[2]}", xticks=[])
        axis.title.set_fontsize(8)
    axes[0][0].set_ylabel("ms a token in generate(), slowest rank")
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=min(4, len(points)), fontsize=7)
    first = records[0]
    figure.suptitle(
        f"{first['world_size']} x {first['gpu']}, transformers {first['transformers']}; batch of each rank", fontsize=9
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(target, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--random-init", nargs="+", default=[])
    parser.add_argument("--batches", default="8")
    parser.add_argument("--prompts", default="128")
    parser.add_argument("--ways", default="all")
    parser.add_argument("--modes", default="")
    parser.add_argument("--families", default=",".join(TINY_FAMILIES))
    parser.add_argument("--budget-s", type=float, default=280.0)
    parser.add_argument("--transport", default="p2p")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    code = 0
    if given.plot is None or given.rehearse:
        code = model_command(
            given.ranks,
            given.random_init,
            given.batches,
            given.prompts,
            given.ways,
            given.budget_s,
            given.output,
            modes=given.modes,
            families=given.families,
            transport=given.transport,
            commit=given.commit,
            rehearse=given.rehearse,
        )
    if given.plot is not None:
        plot(given.output, given.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
