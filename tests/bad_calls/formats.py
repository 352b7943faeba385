"""Wrong formats of rows and of terms: when a workspace is opened, and in a dispatch or a combine."""

from typing import Any

import torch

import tokenferry as tf
from bad_calls.opening import sizes
from bad_calls.scene import (
    ConfigError,
    DeviceError,
    DtypeError,
    H,
    K,
    LayoutError,
    Scene,
    ShapeError,
    T,
    Table,
    UsageError,
    open_workspace,
)
from tokenferry.dispatched import FLOAT8, QuantizedRows, RowFormat

TABLE = Table()
add = TABLE.add

WIDE, S = 272, 3
"""Columns of the workspaces that take other formats: the scene's own are too few for them. A row has three scales."""
WIDE_CONFIG = tf.MoEConfig(hidden_size=WIDE, num_experts=4, topk=K)

# --- opening, and sizes in advance ------------------------------------------------------------------------------------

FORMATS: list[tuple[str, dict[str, Any], str]] = [
    *((f"dispatch_format-is-{label}", {"dispatch_format": value}, "one of same, fp8_block128, bytes, got")
      for label, value in {"unknown": "fp8", "upper-case": "BYTES", "None": None, "a-dtype": FLOAT8, "a-list": ["same"]}.items()),
    ("dispatch_format-has-rows-too-short", {"dispatch_format": "fp8_block128"}, "hidden_size to be a multiple of 16, got 8"),
    ("combine_dtype-has-rows-too-short", {"combine_dtype": FLOAT8}, "hidden_size to be a multiple of 16, got 8"),
    ("combine_dtype-is-another-float8", {"combine_dtype": torch.float8_e5m2}, "combine_dtype must be one of"),
    ("combine_dtype-is-a-format", {"combine_dtype": "fp8_block128"}, "combine_dtype must be one of"),
    ("result_dtype-is-float8", {"result_dtype": FLOAT8}, "result_dtype must be one of"),
]  # fmt: skip
for label, changed, said in FORMATS:
    add(f"open-{label}", "stepped", ConfigError, said, lambda s, c=changed: open_workspace("local", **c))
    if "result" not in label:
        add(f"required_bytes-{label}", "stepped", ConfigError, said, lambda s, c=changed: sizes(**c))
ROW_FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "name-unknown": ({"name": "fp4"}, "one of same, fp8_block128, bytes, got 'fp4'"),
    "bytes-of-rows-zero": ({"name": "bytes", "row_bytes": 0}, "row_bytes"),
    "bytes-of-rows-a-float": ({"name": "bytes", "row_bytes": 8.0}, "row_bytes"),
    "bytes-of-rows-of-fp8": ({"name": "fp8_block128", "row_bytes": 64}, "row_bytes"),
    "powers-of-two-of-bytes": ({"name": "bytes", "power_of_two_scales": True}, "power_of_two_scales"),
}
for label, (changed, said) in ROW_FORMATS.items():
    add(f"RowFormat-{label}", "stepped", ConfigError, said, lambda s, c=changed: RowFormat(**c))

# --- rows that a workspace does not take ------------------------------------------------------------------------------


def quantized(columns: int = WIDE, **changed: Any) -> QuantizedRows:
    return QuantizedRows(
        changed.get("values", torch.zeros(T, columns, dtype=FLOAT8)), changed.get("scales", torch.ones(T, -(-columns // 128)))
    )


add("hidden-quantized-for-same", "stepped", UsageError, "hidden is QuantizedRows but the workspace was opened with",
    lambda s: s.dispatch_with(hidden=quantized(H)))  # fmt: skip
add("hidden-float8-for-same", "stepped", DtypeError, "got torch.float8_e4m3fn",
    lambda s: s.dispatch_with(hidden=torch.zeros(T, H).to(FLOAT8)))  # fmt: skip
add("partial-quantized-for-float32-terms", "dispatched", UsageError, "partial is QuantizedRows but the workspace was opened with",
    lambda s: s.dispatcher.combine(quantized(H), s.got))  # fmt: skip

QUANTIZED: dict[str, tuple[Any, type[Exception], str]] = {
    "values-bfloat16": (quantized(values=torch.zeros(T, WIDE, dtype=torch.bfloat16)), DtypeError, "values must be torch.float8"),
    "values-too-short": (quantized(values=torch.zeros(T, WIDE - 16, dtype=FLOAT8)), ShapeError, r"must have shape \[rows, 272\]"),
    "values-transposed": (quantized(values=torch.zeros(WIDE, T, dtype=FLOAT8).t()), LayoutError, "values must be contiguous"),
    "values-on-meta": (quantized(values=torch.zeros(T, WIDE, dtype=FLOAT8, device="meta")), DeviceError, "values is on meta"),
    "values-no-tensor": (quantized(values=[0.0]), UsageError, r"values must be a torch\.Tensor, got list"),
    "scales-bfloat16": (quantized(scales=torch.ones(T, S, dtype=torch.bfloat16)), DtypeError, "scales must be torch.float32"),
    "scales-too-few": (quantized(scales=torch.ones(T, S - 1)), ShapeError, r"scales must have shape \[rows, 3\], got \[3, 2\]"),
    "scales-a-row-too-many": (quantized(scales=torch.ones(T + 1, S)), ShapeError, "scales has 4 rows but"),
    "scales-column-major": (quantized(scales=torch.ones(S, T).t()), LayoutError, "scales must be contiguous"),
    "scales-on-meta": (quantized(scales=torch.ones(T, S, device="meta")), DeviceError, "scales is on meta"),
    "scales-no-tensor": (quantized(scales=None), UsageError, r"scales must be a torch\.Tensor, got NoneType"),
    "float8-without-scales": (torch.zeros(T, WIDE, dtype=FLOAT8), DtypeError, "got torch.float8_e4m3fn"),
}  # fmt: skip


def beside(scene: Scene, rows: Any, combines: bool, **format: Any) -> None:
    """A dispatch, or a combine, of wrong rows in another workspace of the scene's transport, of another format."""
    group = tf.EPGroup(device="cpu")
    with tf.Workspace(WIDE_CONFIG, group, max_tokens_per_rank=T, transport=scene.ws.transport, **format) as ws:
        dispatcher = ws.dispatcher()
        ws.begin_step(T)
        right = torch.zeros(T, WIDE, dtype=torch.bfloat16)
        got = dispatcher.dispatch(right if combines else rows, torch.zeros(T, K, dtype=torch.int32), torch.ones(T, K))
        dispatcher.combine(rows, got)


for label, (rows, error, said) in QUANTIZED.items():
    add(f"hidden-{label}", "stepped", error, f"hidden.*{said}",
        lambda s, r=rows: beside(s, r, combines=False, dispatch_format="fp8_block128"))  # fmt: skip
    add(f"partial-{label}", "stepped", error, f"partial.*{said}",
        lambda s, r=rows: beside(s, r, combines=True, combine_dtype=FLOAT8))  # fmt: skip
BYTES: dict[str, tuple[Any, type[Exception], str]] = {
    "bfloat16": (torch.zeros(T, 2 * WIDE, dtype=torch.bfloat16), DtypeError, "hidden must be torch.uint8, got torch.bfloat16"),
    "int8": (torch.zeros(T, 2 * WIDE, dtype=torch.int8), DtypeError, "hidden must be torch.uint8, got torch.int8"),
    "as-many-as-columns": (torch.zeros(T, WIDE, dtype=torch.uint8), ShapeError, r"must have shape \[rows, 544\], got \[3, 272\]"),
    "quantized": (quantized(), UsageError, "hidden is QuantizedRows but the workspace was opened with"),
}  # fmt: skip
for label, (rows, error, said) in BYTES.items():
    add(f"hidden-for-bytes-{label}", "stepped", error, said, lambda s, r=rows: beside(s, r, False, dispatch_format="bytes"))
