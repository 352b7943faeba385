"""A whole MoE layer beside its floor, the collective transport and transformers' experts: `tokenferry bench layer` as a script.

python benchmarks/layer.py OUTPUT.jsonl [--presets qwen3-30b-a3b,deepseek-v3] [--tokens 1,8,32] [--budget-s 200] [--commit HASH]
python benchmarks/layer.py OUTPUT.jsonl --rehearse          # CPUs, tiny sizes: every call and check, no times
python benchmarks/layer.py OUTPUT.jsonl --float8            # float8 weights: rows and terms in bfloat16 beside float8 ones
python benchmarks/layer.py OUTPUT.jsonl --float8-too qwen3-30b-a3b,deepseek-v3    # of these presets both, in one run
python benchmarks/layer.py OUTPUT.jsonl --plot PICTURE.png  # the stacked times of a file that is there

All numbers of tokens of a call share a workspace of the largest one; two calls with few and with many tokens measure the small
sizes as a decoder would be opened.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenferry.cli.bench import layer_command

STACKED = ("router", "dispatch", "experts", "combine", "shared")
LINES = {"total": "k_", "floor": "g_", "collective": "r_", "grouped_mm": "b_"}


def plot(source: Path, target: Path) -> None:
    """Draws each preset's stages, stacked, in parts of the layer's total, with its floor and its rivals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in map(json.loads, source.read_text().splitlines()) if "total_us" in record]
    names = list(dict.fromkeys(record["preset"] for record in records))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 4.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = sorted((record for record in records if record["preset"] == name), key=lambda record: record["tokens"])
        places, bottom = range(len(mine)), [0.0] * len(mine)
        scale = [record["total_us"] for record in mine]  # each column in parts of the layer's total, which span decades
        for stage in STACKED:
            heights = [record.get(f"{stage}_us", 0.0) / total for record, total in zip(mine, scale, strict=True)]
            axis.bar(places, heights, bottom=bottom, label=stage, width=0.6)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for line, style in LINES.items():
            pairs = [(place, record.get(f"{line}_us"), total) for place, record, total in zip(places, mine, scale, strict=True)]
            shown = [(place, value / total) for place, value, total in pairs if value]
            axis.plot(*zip(*shown, strict=True), style, label=line, markersize=18, markeredgewidth=2)
        axis.set_xticks(list(places), [f"{record['tokens']}\n{record['total_us']:.0f} µs" for record in mine], fontsize=8)
        axis.set(title=name, xlabel="tokens per rank, total", ylim=(0, 4))
    axes[0][0].set_ylabel("parts of the layer's total")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{records[0]['world_size']} x {records[0]['gpu']}, graph replay, slowest rank")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--presets", default="all")
    parser.add_argument("--tokens", default="1,8,32,128,512,4096")
    parser.add_argument("--budget-s", type=float, default=200.0)
    parser.add_argument("--transport", default="p2p")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--float8-too", default="", help="presets that are measured with float8 weights too, with commas")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    code = 0
    if given.plot is None or given.rehearse:
        code = layer_command(
            given.ranks,
            given.presets,
            given.tokens,
            given.budget_s,
            given.output,
            transport=given.transport,
            commit=given.commit,
            rehearse=given.rehearse,
            float8=given.float8,
            float8_too=given.float8_too.split(",") if given.float8_too else (),
        )
    if given.plot is not None:
        plot(given.output, given.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
