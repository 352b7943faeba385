"""Wrong configurations and groups."""

from collections.abc import Callable
from typing import Any

import torch

import tokenferry as tf
from bad_calls.scene import ConfigError, Scene, Table

TABLE = Table()
add = TABLE.add

# --- configurations and groups ----------------------------------------------------------------------------------------

for name in ("hidden_size", "num_experts", "topk"):
    for label, value in {"zero": 0, "a-float": 4.0, "a-string": "4", "None": None, "a-bool": True}.items():
        add(
            f"config-{name}-is-{label}",
            "stepped",
            ConfigError,
            f"{name} must be a positive int, got",
            lambda s, n=name, v=value: tf.MoEConfig(**{"hidden_size": 8, "num_experts": 6, "topk": 2, n: v}),
        )
add(
    "config-topk-over-experts",
    "stepped",
    ConfigError,
    "topk is 7 but there are only 6 experts; lower topk",
    lambda s: tf.MoEConfig(hidden_size=8, num_experts=6, topk=7),
)
for label, value in {"float64": torch.float64, "int32": torch.int32, "a-string": "bfloat16", "None": None}.items():
    add(
        f"config-dtype-is-{label}",
        "stepped",
        ConfigError,
        "dtype must be one of torch.bfloat16, torch.float16, torch.float32, got",
        lambda s, v=value: tf.MoEConfig(hidden_size=8, num_experts=6, topk=2, dtype=v),
    )

store = torch.distributed.HashStore()
GROUPS: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "process_group-is-a-string": (
        lambda s: tf.EPGroup("nccl"),
        "process_group must be a torch.distributed process group, got str",
    ),
    "process_group-is-a-size": (lambda s: tf.EPGroup(8), "process_group must be a torch.distributed process group, got int"),
    "device-is-nonsense": (lambda s: tf.EPGroup(device="gpu"), "device must be a torch.device or its name, got 'gpu'"),
    "device-is-a-list": (lambda s: tf.EPGroup(device=["cpu"]), "device must be a torch.device or its name"),
    "device-is-meta": (lambda s: tf.EPGroup(device="meta"), "device is 'meta', where no rows can lie"),
    "store-is-a-path": (lambda s: tf.EPGroup.from_store("/tmp/store", 0, 1), "store must be a torch.distributed store, got str"),
    "rank-over-size": (lambda s: tf.EPGroup.from_store(store, 2, 2), r"rank must lie in \[0, 2\), got 2"),
    "rank-below-zero": (lambda s: tf.EPGroup.from_store(store, -1, 2), r"rank must lie in \[0, 2\), got -1"),
    "rank-is-a-string": (lambda s: tf.EPGroup.from_store(store, "0", 2), r"rank must lie in \[0, 2\), got '0'"),
    "size-is-a-float": (lambda s: tf.EPGroup.from_store(store, 0, 2.0), "rank must lie in"),
    "subset-empty": (lambda s: s.ws.group.subset([]), "holds this rank, 0; got"),
    "subset-without-this-rank": (lambda s: s.ws.group.subset([1]), "holds this rank, 0; got"),
    "subset-rank-too-large": (lambda s: s.ws.group.subset([0, 1]), "a part of 0..0 that holds this rank, 0"),
    "subset-rank-below-zero": (lambda s: s.ws.group.subset([-1, 0]), "a part of 0..0"),
    "subset-is-a-string": (lambda s: s.ws.group.subset("0"), "ranks must be a list of ints, got '0'"),
    "subset-is-a-number": (lambda s: s.ws.group.subset(0), "ranks must be a list of ints, got 0"),
    "subset-is-None": (lambda s: s.ws.group.subset(None), "ranks must be a list of ints, got None"),
    "subset-holds-strings": (lambda s: s.ws.group.subset(["0"]), "ranks must be a list of ints"),
    "subset-holds-bools": (lambda s: s.ws.group.subset([False]), "ranks must be a list of ints"),
    "expert_range-none": (lambda s: s.ws.group.expert_range(0), "0 experts cannot be spread over 1 ranks"),
    "expert_range-a-float": (lambda s: s.ws.group.expert_range(6.0), "num_experts must be an int, got 6.0"),
    "expert_range-rank-too-large": (lambda s: s.ws.group.expert_range(6, 1), r"rank must lie in \[0, 1\), got 1"),
    "expert_range-rank-below-zero": (lambda s: s.ws.group.expert_range(6, -1), r"rank must lie in \[0, 1\), got -1"),
}
for label, (call, said) in GROUPS.items():
    add(f"group-{label}", "stepped", ConfigError, said, call)
