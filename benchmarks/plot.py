"""The picture of a results file: round-trip time against tokens per rank.

python benchmarks/plot.py benchmarks/results/2xH100-2026-11-22.jsonl OUTPUT.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main(source: Path, target: Path) -> None:
    records = [json.loads(line) for line in source.read_text().splitlines()]
    records = [record for record in records if "round_trip_us" in record and len(set(record["tokens"])) == 1]
    sizes = sorted({record["hidden_size"] for record in records}, reverse=True)
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(6 * len(sizes), 4.5), sharey=True, squeeze=False)
    for axis, hidden_size in zip(axes[0], sizes, strict=True):
        mine = [record for record in records if record["hidden_size"] == hidden_size]
        for transport, order in sorted({(record["transport"], record["combine_order"]) for record in mine}, reverse=True):
            line = sorted(
                (r for r in mine if (r["transport"], r["combine_order"]) == (transport, order)), key=lambda r: r["tokens"]
            )
            label = transport if transport != "collective" else f"collective (NCCL), order {order}"
            axis.plot([r["tokens"][0] for r in line], [r["round_trip_us"] for r in line], "o-", label=label)
        floor = sorted((r for r in mine if r["transport"] == "p2p"), key=lambda r: r["tokens"])
        axis.plot(
            [r["tokens"][0] for r in floor],
            [r["wire_bytes"] / r["copy_gb_per_s"] / 1e3 for r in floor],
            "k--",
            label="plain copy",
        )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens per rank",
            title=f"H = {hidden_size}, K = 8, bfloat16, {mine[0]['gpu']} x 2",
        )
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("dispatch + combine, µs")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
