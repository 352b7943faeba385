"""What a decode layer takes with and without a promise of the step's largest batch, in turn, on 2 GPUs.

python benchmarks/promise.py OUTPUT.jsonl [--seconds S]       python benchmarks/promise.py OUTPUT.jsonl --rehearse (on CPUs)

The promise is `begin_step(max_tokens=T)`. Each form is captured and timed ROUNDS times, in turn; a record has all times and the
medians. No point begins later than S seconds after the start.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from tokenferry.benchmarking.layer_checks import expected_rows, is_right
from tokenferry.benchmarking.layer_model import LayerModel
from tokenferry.benchmarking.layer_times import time_layer
from tokenferry.benchmarking.machine import environment
from tokenferry.benchmarking.presets import PRESETS, REHEARSAL
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.testing import run_ranks

CAPACITY = 4096
NAMES = ("qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-20b-mxfp4")
TOKENS = (1, 8, 32)
ROUNDS = 3


def measured(timer, ws, model, layer, count):
    """A point's record. Collective."""
    rows, expected = model.rows(ws.group.rank, count), expected_rows(model, count)
    times, right = {"without": [], "with": []}, True
    for _ in range(ROUNDS):
        for form in times:
            taken_us, outputs = time_layer(timer, ws, layer, rows, promised=form == "with")
            times[form].append(round(taken_us, 2))
            right &= is_right(timer, outputs, expected)
    medians = {f"{form}_us": statistics.median(taken) for form, taken in times.items()}
    gain_us = round(medians["without_us"] - medians["with_us"], 2)
    return {"tokens": count, **medians, "gain_us": gain_us, "times_us": times, "correct": right}


@torch.no_grad()
def worker(group, path, seconds, rehearse):
    started_s, timer, records = time.time(), GroupTimer(group), []
    chosen = REHEARSAL if rehearse else [preset for name in NAMES for preset in PRESETS if preset.name == name]
    for preset in chosen:
        if timer.slowest(time.time() - started_s) > seconds:
            break
        model = LayerModel(group, preset, 8 if rehearse else CAPACITY)
        with model.open("collective" if rehearse else "p2p") as ws:
            layer = model.layer(ws)
            for count in (1, 8) if rehearse else TOKENS:
                if timer.slowest(time.time() - started_s) > seconds:
                    break
                found = measured(timer, ws, model, layer, count)
                records.append(
                    {"what": "promise", "preset": preset.name, "capacity": ws.max_tokens_per_rank}
                    | found
                    | environment(group.device)
                )
                if group.rank == 0:
                    Path(path).write_text("".join(json.dumps(each) + "\n" for each in records))
            timer.meet()
        del model, layer
        torch.cuda.empty_cache()
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rehearse", action="store_true", help="every call and check on CPUs, with small layers")
    given = parser.parse_args()
    backend = "gloo" if given.rehearse else "nccl"
    arguments = (given.output, given.seconds, given.rehearse)
    records = run_ranks(worker, 2, *arguments, backend=backend, timeout_s=given.seconds + 120)[0]
    print("preset               T   without      with   gain")
    for each in records:
        said = f"{each['preset']:18} {each['tokens']:3} {each['without_us']:9.1f} {each['with_us']:9.1f} {each['gain_us']:6.2f}"
        print(said, "" if each["correct"] else "WRONG")


if __name__ == "__main__":
    main()
