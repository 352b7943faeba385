"""The records of `vllm_engine.py` as text."""

from collections.abc import Sequence
from typing import Any


def table(records: Sequence[dict[str, Any]]) -> str:
    """A line for each way that rows went, and for each load what its exchange takes."""
    head = records[0]
    lines = [
        f"{head['device']}, torch {head['torch']}, vLLM {head['vllm']}, {head['attention']}, transport {head['transports']}, "
        f"engine started in {head['start_s']:.0f} s",
        f"{'mode':9}{'load':>7}  {'exchange':18}{'step ms':>9}{'forward ms':>11}{'meeting ms':>11}{'tokens/s':>10}",
    ]
    timed = [record for record in records if "step_ms" in record]
    for record in timed:
        requests = sum(int(count) for count in record["load"].split("/"))
        step_ms, forward_ms, meeting_ms = record["step_ms"], record["forward_ms"], record["meeting_ms"]
        lines.append(
            f"{record['mode']:9}{record['load']:>7}  {record['arm']:18}{step_ms:9.3f}{forward_ms:11.3f}{meeting_ms:11.3f}"
            f"{1e3 * requests / step_ms:10.0f}"
        )
    for mode, load in dict.fromkeys((record["mode"], record["load"]) for record in timed):
        lines.append(verdict(mode, load, [each for each in timed if (each["mode"], each["load"]) == (mode, load)], head))
    lines += [f"{each['mode']} {each['load']} tokens alike: {each['tokens_alike']}" for each in records if "tokens_alike" in each]
    lines += [exchange_line(each) for each in records if "exchange" in each]
    return "\n".join(lines)


def exchange_line(record: dict[str, Any]) -> str:
    """What a layer's exchange consists of."""
    found = record["exchange"]
    parts = ", ".join(
        f"{name} {'/'.join(f'{us:.1f}' for us in found[f'{name}_us'])}"
        for name in ("dispatch", "experts", "combine", "attention", "gap_before_dispatch", "gap_behind_combine")
    )
    own, wait = found["own_us"], found["wait_us"]
    return f"{record['mode']} {record['load']}: kernels {own:.1f} us a layer, wait {wait:.1f}; by rank: {parts}"


def verdict(mode: str, load: str, records: Sequence[dict[str, Any]], head: dict[str, Any]) -> str:
    """What the exchange takes of a step, vLLM's and ours, and how much faster steps are."""
    of = {record["arm"]: record["forward_ms"] or record["step_ms"] for record in records}
    for record in records:
        if record["arm"].startswith("none") and record["forward_ms"]:  # no rank waits: the slower one decides
            of[record["arm"]] = max(record["forward_ms_of_ranks"])
    steps = {record["arm"]: record["step_ms"] for record in records}
    theirs, ours = (1e3 * (of[arm] - of["none"]) / head["model"]["num_hidden_layers"] for arm in ("stock", "ours"))
    gone = f"{1 - ours / theirs:.0%} gone" if theirs > 0 else "nothing to save"
    padding = f", padding rows {1e3 * (of['none'] - of['none, no padding']):.0f} us a step" if "none, no padding" in of else ""
    masked = f", without padding rows x{steps['stock'] / steps['ours, no padding']:.3f}" if "ours, no padding" in steps else ""
    return (
        f"{mode} {load}: exchange {theirs:.1f} us a layer, ours {ours:.1f} ({gone}){padding}; "
        f"forward x{of['stock'] / of['ours']:.3f}, steps/s x{steps['stock'] / steps['ours']:.3f}{masked}"
    )
