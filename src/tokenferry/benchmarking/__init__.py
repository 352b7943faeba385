"""The methods of `tokenferry bench`, for programs that measure shapes of their own: round trips, whole MoE layers, the timer.

    presets                        the MoE layers of known models
    timing                         how a call is timed: CUDA graphs, medians, the slowest rank
    machine                        what the hardware can do at most, and what it is
    round_trip, round_trip_data    dispatch + combine: what is measured, and what the results are compared with
    host_times                     begin_step alone, and the host's time in each call
    layer, layer_times             whole layers: the points of a table, and how each is timed
    layer_model, layer_checks      the layer that is built, its floor, and what its results are compared with
    layer_formats                  layers with float8 weights, in each format of their rows
    transformers_experts           transformers' own experts functions on the same weights
    model, model_request           models of transformers: the run, and what it measures
    model_plan                     in which order
    model_ways, model_modes        how a model is spread over the ranks, and how its decode steps run
    model_times, model_batching    a step by itself, within `generate()`, and within `generate_batch()`
    model_checks                   whether all of them make the same tokens
    records, tables, model_tables  JSON lines, and text

Nothing here prints. Progress goes to a callable, results come back as records, and a table is a string.

A name is imported from its module at its first mention: whoever times round trips must not wait for transformers and for
PyTorch's compiler, which whole layers and models bring with them (a second on an idle core).
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tokenferry.benchmarking.layer import LayerRequest, run_layer
    from tokenferry.benchmarking.machine import Device, copy_rate, device_rates, environment
    from tokenferry.benchmarking.model import is_right, run_model, run_model_as_rank
    from tokenferry.benchmarking.model_request import (
        ALL_WAYS,
        MODEL_POINTS,
        REHEARSED_NEW_TOKENS,
        REHEARSED_POINTS,
        TINY_FAMILIES,
        ModelPoint,
        ModelRequest,
    )
    from tokenferry.benchmarking.model_tables import model_table
    from tokenferry.benchmarking.presets import PRESETS, REHEARSAL, Preset
    from tokenferry.benchmarking.records import check_output, write_records
    from tokenferry.benchmarking.round_trip import round_trip_points, run_round_trips
    from tokenferry.benchmarking.round_trip_data import RoundTripPoint
    from tokenferry.benchmarking.tables import layer_table, round_trip_table
    from tokenferry.benchmarking.timing import GroupTimer, Progress

__all__ = [
    "ALL_WAYS",
    "MODEL_POINTS",
    "PRESETS",
    "REHEARSAL",
    "REHEARSED_NEW_TOKENS",
    "REHEARSED_POINTS",
    "TINY_FAMILIES",
    "Device",
    "GroupTimer",
    "LayerRequest",
    "ModelPoint",
    "ModelRequest",
    "Preset",
    "Progress",
    "RoundTripPoint",
    "check_output",
    "copy_rate",
    "device_rates",
    "environment",
    "is_right",
    "layer_table",
    "model_table",
    "round_trip_points",
    "round_trip_table",
    "run_layer",
    "run_model",
    "run_model_as_rank",
    "run_round_trips",
    "write_records",
]

_HOMES: Final = {
    "ALL_WAYS": "model_request",
    "Device": "machine",
    "GroupTimer": "timing",
    "LayerRequest": "layer",
    "MODEL_POINTS": "model_request",
    "ModelPoint": "model_request",
    "ModelRequest": "model_request",
    "PRESETS": "presets",
    "Preset": "presets",
    "Progress": "timing",
    "REHEARSAL": "presets",
    "REHEARSED_NEW_TOKENS": "model_request",
    "REHEARSED_POINTS": "model_request",
    "RoundTripPoint": "round_trip_data",
    "TINY_FAMILIES": "model_request",
    "check_output": "records",
    "copy_rate": "machine",
    "device_rates": "machine",
    "environment": "machine",
    "is_right": "model",
    "layer_table": "tables",
    "model_table": "model_tables",
    "round_trip_points": "round_trip",
    "round_trip_table": "tables",
    "run_layer": "layer",
    "run_model": "model",
    "run_model_as_rank": "model",
    "run_round_trips": "round_trip",
    "write_records": "records",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """A public name, imported now. Python asks only for what is not here yet."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
