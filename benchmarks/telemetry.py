"""What telemetry costs a round trip, and a layer with experts of our own: on 2 GPUs.

python benchmarks/telemetry.py OUTPUT.jsonl [--commit HASH] [--hidden 7168,2048] [--tokens 1,32,512] [--layers qwen3-30b-a3b]
    [--ranks 2] [--cpu]

Ways: "off" without telemetry, measured first and last; "waits" with it, the experts' rows counted by the experts, as our own do;
"numbers" with the gathered numbers counted by the combine, as where experts are somebody else's; "stopped" after stop().
Each is the median of a graph of round trips in a workspace of C = 4096, results compared with the reference. Both workspaces are
open at once and are measured in turn. --cpu rehearses it, in Triton's interpreter; its times say nothing.

python benchmarks/telemetry.py RECORDS.jsonl --table

prints the tables of docs/telemetry.md.
"""

import argparse
import json
from pathlib import Path

import torch

import tokenferry as tf
from tokenferry.benchmarking.layer_model import LayerModel
from tokenferry.benchmarking.layer_times import time_layer
from tokenferry.benchmarking.machine import environment
from tokenferry.benchmarking.presets import PRESETS, REHEARSAL
from tokenferry.benchmarking.round_trip import measure_in
from tokenferry.benchmarking.round_trip_data import RoundTripPoint
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.testing import run_ranks

CAPACITY = 4096
WAYS = ("off", "waits", "numbers", "stopped", "off", "waits")


def round_trips(timer, hidden_size, tokens, capacity):
    """A record for each number of tokens: microseconds by way, and the waits that were counted in the last."""
    points = [
        RoundTripPoint(transport="p2p", hidden_size=hidden_size, tokens=(count,) * timer.group.size, capacity=capacity)
        for count in tokens
    ]
    sizes = {"max_tokens_per_rank": capacity, "transport": "p2p"}
    with (
        tf.Workspace(points[0].config, timer.group, **sizes, telemetry=False) as plain,
        tf.Workspace(points[0].config, timer.group, **sizes, telemetry=True) as counting,
    ):
        for point in points:
            record = {"hidden_size": hidden_size, "tokens": point.tokens[0], "capacity": capacity, "correct": True}
            for way in WAYS:
                ws = plain if way == "off" else counting
                if ws is counting:
                    counting._settings.recorder.counts_ids = way == "numbers"
                    (ws.telemetry.stop if way == "stopped" else ws.telemetry.start)()
                measured = measure_in(ws, timer, point)
                record["correct"] &= measured["correct"]
                record.setdefault(f"{way}_us", []).append(measured["round_trip_us"])
                record.setdefault(f"{way}_spread_us", []).append(measured["spread_us"])
            yield record | added(record)


def added(record):
    """What each way costs beside both measurements without."""
    off_us = sum(record["off_us"]) / len(record["off_us"])
    ways = [way for way in dict.fromkeys(WAYS) if way != "off" and f"{way}_us" in record]
    return {f"{way}_adds_us": round(sum(record[f"{way}_us"]) / len(record[f"{way}_us"]) - off_us, 3) for way in ways}


@torch.no_grad()
def layers(timer, preset, tokens, capacity):
    """A record for each number of tokens: microseconds of a whole layer with telemetry off and on, twice."""
    model = LayerModel(timer.group, preset, capacity)
    config = tf.MoEConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk)
    opened = [
        tf.Workspace(config, timer.group, max_tokens_per_rank=capacity, transport="p2p", telemetry=on) for on in (False, True)
    ]
    made = {way: (ws, model.layer(ws)) for way, ws in zip(("off", "waits"), opened, strict=True)}
    for count in tokens:
        record = {"preset": preset.name, "tokens": count, "capacity": capacity}
        for way in ("off", "waits", "off", "waits"):
            us, _ = time_layer(timer, *made[way], model.rows(timer.group.rank, count))
            record.setdefault(f"{way}_us", []).append(round(us, 2))
        yield record | added(record)
    for ws in opened:
        ws.close()


def worker(group, path, hidden_sizes, tokens, presets, commit):
    timer = GroupTimer(group)
    capacity = CAPACITY if group.device.type == "cuda" else max(tokens)
    sources = [round_trips(timer, hidden_size, tokens, capacity) for hidden_size in hidden_sizes]
    sources += [layers(timer, preset, tokens, capacity) for preset in (*PRESETS, *REHEARSAL) if preset.name in presets]
    written = 0
    for source in sources:
        for record in source:
            line = json.dumps(record | environment(group.device) | {"world_size": group.size, "commit": commit})
            written += 1
            if group.rank == 0:
                print(line, flush=True)
                with Path(path).open("a") as file:
                    file.write(line + "\n")
    return written


ROUND_TRIPS = (
    "| H | T | round trip without | telemetry adds | somebody else's experts, more | stopped |",
    "|---|---|---|---|---|---|",
)
LAYERS = ("| layer | T | without | telemetry adds |", "|---|---|---|---|")


def tables(records):
    """The lines of both tables, in microseconds. A record that was not right in its results is an error."""
    trips = sorted((each for each in records if "hidden_size" in each), key=lambda each: (-each["hidden_size"], each["tokens"]))
    wrong = [(each["hidden_size"], each["tokens"]) for each in trips if not each["correct"]]
    if wrong:
        raise SystemExit(f"these round trips differed from the reference: {wrong}")
    yield from ROUND_TRIPS if trips else ()
    for each in trips:
        numbers = each["numbers_adds_us"] - each["waits_adds_us"]
        figures = f"{without(each)} | {each['waits_adds_us']:.2f} | {numbers:.2f} | {each['stopped_adds_us']:.2f}"
        yield f"| {each['hidden_size']} | {each['tokens']} | {figures} |"
    whole = [each for each in records if "preset" in each]
    yield from ("", *LAYERS) if whole else ()
    for each in whole:
        yield f"| {each['preset']} | {each['tokens']} | {without(each)} | {each['waits_adds_us']:.2f} |"


def without(record):
    """Both measurements without, the first and the last."""
    return " / ".join(f"{us:.2f}" for us in record["off_us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--hidden", default="7168,2048")
    parser.add_argument("--tokens", default="1,32,512")
    parser.add_argument("--layers", default="")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is in the file, and measure nothing")
    given = parser.parse_args()
    if given.table:
        print(*tables([json.loads(line) for line in given.output.read_text().splitlines()]), sep="\n")
        return
    hidden_sizes, tokens = ([int(size) for size in text.split(",")] for text in (given.hidden, given.tokens))
    arguments = str(given.output), hidden_sizes, tokens, given.layers.split(","), given.commit
    backend, env = ("gloo", {"TRITON_INTERPRET": "1"}) if given.cpu else ("nccl", None)
    run_ranks(worker, given.ranks, *arguments, backend=backend, timeout_s=600.0, env=env)


if __name__ == "__main__":
    main()
