"""Wrong calls of a workspace's other methods, wrong settings for opening one, and wrong sizes."""

import math
from typing import Any

import torch

import tokenferry as tf
from bad_calls.scene import (
    CONFIG,
    C,
    ConfigError,
    Scene,
    StateError,
    Table,
    open_workspace,
)

TABLE = Table()
add = TABLE.add

# --- the workspace's other calls ------------------------------------------------------------------------------------


def nested_solo(scene: Scene) -> None:
    with scene.ws.solo(), scene.ws.solo():
        pass


def reset_in_solo(scene: Scene) -> None:
    with scene.ws.solo():
        scene.ws.reset()


def enter_solo(scene: Scene) -> None:
    with scene.ws.solo():
        pass


def reenter(scene: Scene) -> None:
    with scene.ws:
        pass


for stage, said in (("dispatching", "call dispatch_end"), ("dispatched", r"call combine\(\)"), ("combining", "call combine_end")):
    add(f"solo-while-{stage}", stage, StateError, said, enter_solo)
add("solo-in-solo", "opened", StateError, r"already inside solo\(\)", nested_solo)
add("reset-in-solo", "opened", StateError, r"inside solo\(\); leave it first", reset_in_solo)
for label, value, said in (
    ("a-string", "all", "group must be an EPGroup, got str; make one with ws.group.subset"),
    ("a-list-of-ranks", [0], "group must be an EPGroup, got list"),
    ("a-number", 0, "group must be an EPGroup, got int"),
):
    add(f"reset-group-is-{label}", "stepped", ConfigError, said, lambda s, v=value: s.ws.reset(v))
for label, value in {
    "zero": 0,
    "below-zero": -1.0,
    "NaN": math.nan,
    "infinite": math.inf,
    "a-string": "1",
    "a-bool": True,
}.items():
    add(
        f"reset-timeout-is-{label}",
        "stepped",
        ConfigError,
        "timeout_s must be positive, got",
        lambda s, v=value: s.ws.reset(None, v),
    )
for name, call in {
    "begin_step": lambda s: s.ws.begin_step(1),
    "check": lambda s: s.ws.check(),
    "reset": lambda s: s.ws.reset(),
    "solo": enter_solo,
    "with": reenter,
    "dispatcher": lambda s: s.ws.dispatcher(),
}.items():
    add(f"{name}-when-closed", "closed", StateError, "the workspace is closed; open a new Workspace", call)

# --- opening ----------------------------------------------------------------------------------------------------------

POSITIVE = "must be a positive int, got"
SECONDS = "must be positive, got .*; give seconds"
OPENING: list[tuple[str, dict[str, Any], str]] = [
    *((f"max_tokens_per_rank-is-{label}", {"max_tokens_per_rank": v}, f"max_tokens_per_rank {POSITIVE}")
      for label, v in {"zero": 0, "below-zero": -4, "a-float": 4.0, "a-string": "4", "None": None, "a-bool": True}.items()),
    *((f"timeout_s-is-{label}", {"timeout_s": v}, f"timeout_s {SECONDS}")
      for label, v in {"zero": 0, "NaN": math.nan, "infinite": math.inf, "a-string": "30", "None": None}.items()),
    *((f"open_timeout_s-is-{label}", {"open_timeout_s": v}, f"open_timeout_s {SECONDS}")
      for label, v in {"below-zero": -1, "a-list": [1], "a-bool": True}.items()),
    *((f"telemetry-is-{label}", {"telemetry": v}, "telemetry must be True, False or None, got")
      for label, v in {"a-number": 1, "a-string": "0"}.items()),
    *((f"max_ctas-is-{label}", {"max_ctas": v}, "max_ctas must be a positive int or None, got")
      for label, v in {"zero": 0, "a-float": 8.0, "a-string": "8", "a-bool": True}.items()),
    *((f"combine_dtype-is-{label}", {"combine_dtype": v}, "combine_dtype must be one of torch.bfloat16, torch")
      for label, v in {"int8": torch.int8, "float64": torch.float64, "a-string": "bfloat16", "a-number": 2}.items()),
    *((f"index_dtype-is-{label}", {"index_dtype": v}, "index_dtype must be torch.int32 or torch.int64")
      for label, v in {"int16": torch.int16, "None": None, "a-string": "int32"}.items()),
    *((f"result_dtype-is-{label}", {"result_dtype": v}, "result_dtype must be one of torch.bfloat16, torch")
      for label, v in {"int8": torch.int8, "a-string": "float32"}.items()),
    *((f"combine_order-is-{label}", {"combine_order": v}, "combine_order must be 'rank' or 'any'")
      for label, v in {"unknown": "random", "None": None}.items()),
    *((f"counts-is-{label}", {"counts": v}, "counts must be 'uneven' or 'equal'")
      for label, v in {"unknown": "odd", "None": None}.items()),
    *((f"transport-is-{label}", {"transport": v}, "transport must be 'auto' or one of local, ")
      for label, v in {"unknown": "carrier-pigeon", "upper-case": "P2P", "empty": "", "None": None, "a-list": ["local"]}.items()),
]  # fmt: skip
for label, changed, said in OPENING:
    add(f"open-{label}", "stepped", ConfigError, said, lambda s, c=changed: open_workspace(**{"transport": "local", **c}))


def open_on(config: Any = CONFIG, group: Any = None) -> tf.Workspace:
    return tf.Workspace(config, tf.EPGroup(device="cpu") if group is None else group, max_tokens_per_rank=C)


add("open-config-is-None", "stepped", ConfigError, "config must be a MoEConfig, got NoneType", lambda s: open_on(config=None))
add(
    "open-config-is-a-dict", "stepped", ConfigError, "config must be a MoEConfig, got dict", lambda s: open_on(config={"topk": 2})
)
add("open-group-is-a-number", "stepped", ConfigError, "group must be an EPGroup, got int", lambda s: open_on(group=1))
add(
    "open-group-and-config-swapped",
    "stepped",
    ConfigError,
    "config must be a MoEConfig, got EPGroup",
    lambda s: open_on(config=s.ws.group, group=CONFIG),
)
add("open-p2p-on-a-cpu", "stepped", tf.TransportUnavailableError, "p2p: rejected, ", lambda s: open_workspace("p2p"))

# --- sizes in advance -------------------------------------------------------------------------------------------------


def sizes(config: Any = CONFIG, ep_size: Any = 1, rows: Any = C, **changed: Any) -> int:
    return tf.Workspace.required_bytes(config, ep_size, rows, **{"transport": "local", **changed})


SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "transport-auto": ({"transport": "auto"}, "transport must be one of local, .*, got 'auto'"),
    "transport-None": ({"transport": None}, "transport must be one of"),
    "transport-a-list": ({"transport": []}, "transport must be one of"),
    "config-None": ({"config": None}, "config must be a MoEConfig"),
    "ep_size-zero": ({"ep_size": 0}, "ep_size must be a positive int, got 0"),
    "ep_size-a-float": ({"ep_size": 2.0}, "ep_size must be a positive int, got 2.0"),
    "ep_size-a-group": ({"ep_size": "8"}, "ep_size must be a positive int, got '8'"),
    "rows-zero": ({"rows": 0}, "max_tokens_per_rank must be a positive int, got 0"),
    "rows-None": ({"rows": None}, "max_tokens_per_rank must be a positive int, got None"),
    "combine_dtype-int": ({"combine_dtype": torch.int32}, "combine_dtype must be one of"),
    "index_dtype-float": ({"index_dtype": torch.float32}, "index_dtype must be torch.int32 or torch.int64"),
}
for label, (changed, said) in SIZES.items():
    add(f"required_bytes-{label}", "stepped", ConfigError, said, lambda s, c=changed: sizes(**c))
