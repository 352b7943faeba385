"""The router's product of a few rows: a program for each expert, so that all SMs read the weight, and no launch stands alone.

A library's product begins when the kernel before it has ended, and the one after it when it has. With its few programs, that was
six microseconds of a decode step's layer.

Legend: T rows, H hidden size, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenferry.kernels import wire
from tokenferry.kernels.launch import POINTER_ALIGNMENT, BoundLaunch, has_pdl, launch_unbound, load, specify

SIGNATURE = {
    "rows": "*ROWS",
    "weight": "*ROWS",
    "bias": "*ROWS",
    "out": "*OUT",
    "num_rows": "i32",
    "E": "constexpr",
    "H": "constexpr",
    "BIAS": "constexpr",
    "BLOCK": "constexpr",
    "BT": "constexpr",
    "PDL": "constexpr",
}
ROWS_OF_PROGRAM = 4
MAX_BLOCK = 2048


@triton.jit(do_not_specialize=["num_rows"])  # one form for all numbers of rows: a peer would wait while another is compiled
def router_linear_kernel(
    rows,
    weight,
    bias,
    out,
    num_rows,
    E: tl.constexpr,
    H: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e of each E computes one column for BT rows. Sums are float32, and a row's do not depend on the other rows.

    Args:
        rows, weight, bias, out: [T, H], [E, H], [E] (read if BIAS) and [T, E].

    Example:
        Rows [1, 2] and [3, 4], weight [[1, 1], [0, 2]], bias [10, 20]: [13, 24] and [17, 28].
    """
    expert = tl.program_id(0) % E
    row = tl.program_id(0) // E * BT + tl.arange(0, BT)
    depth = tl.arange(0, BLOCK)
    a = rows + row.to(tl.int64)[:, None] * H + depth[None, :]
    b = weight + expert.to(tl.int64) * H + depth
    terms = tl.zeros([BT, BLOCK], tl.float32)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    for h in tl.static_range(0, H, BLOCK):
        w = tl.load(b + h, mask=h + depth < H, other=0.0).to(tl.float32)
        x = tl.load(a + h, mask=(row < num_rows)[:, None] & (h + depth < H)[None, :], other=0.0).to(tl.float32)
        terms += x * w[None, :]
    total = tl.sum(terms, 1)
    if BIAS:
        total += tl.load(bias + expert).to(tl.float32)
    tl.store(out + row.to(tl.int64) * E + expert, total.to(out.dtype.element_ty), mask=row < num_rows)


def warps_of(H: int) -> int:
    """So many that no register of a program spills."""
    return 4 if H <= 4096 else 8


def constants_of(E: int, H: int, *, has_bias: bool, pdl: bool) -> dict[str, object]:
    """The kernel's constants."""
    block = min(MAX_BLOCK, triton.next_power_of_2(H))
    return {"E": E, "H": H, "BIAS": has_bias, "BLOCK": block, "BT": ROWS_OF_PROGRAM, "PDL": pdl}


def load_for(weight_EH: torch.Tensor, bias_E: torch.Tensor | None, out_dtype: torch.dtype) -> BoundLaunch:
    """The kernel, loaded, for products with a weight and a bias like these: the host need not look for it at each call."""
    E, H = weight_EH.shape
    constants = constants_of(E, H, has_bias=bias_E is not None, pdl=has_pdl(weight_EH.device))
    dtypes = {"ROWS": weight_EH.dtype, "OUT": out_dtype}
    spec = specify(router_linear_kernel, SIGNATURE, constants, num_warps=warps_of(H), dtypes=dtypes, aligned=True)
    return load(spec, weight_EH.device).bind({}, ("rows", "weight", "bias", "out", "num_rows"))


def router_linear(
    rows_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    out_dtype: torch.dtype,
    launch: BoundLaunch | None = None,
) -> torch.Tensor:
    """[T, E] of `out_dtype`, on the current stream: float32 sums, the bias added to the sum, rounded once. All of one dtype.

    Args:
        launch: of `load_for`, for such a weight, bias and `out_dtype`.
    """
    (T, H), E = rows_TH.shape, weight_EH.shape[0]
    out_TE = torch.empty(T, E, dtype=out_dtype, device=rows_TH.device)
    if T == 0:
        return out_TE
    rows_TH, weight_EH = rows_TH.contiguous(), weight_EH.contiguous()
    if rows_TH.data_ptr() % POINTER_ALIGNMENT:  # else another form would be compiled
        rows_TH = rows_TH.clone()
    constants = constants_of(E, H, has_bias=bias_E is not None, pdl=has_pdl(rows_TH.device))
    bias_E = weight_EH if bias_E is None else bias_E.contiguous()  # without one the pointer is not followed
    arguments, programs = (rows_TH, weight_EH, bias_E, out_TE, T), E * triton.cdiv(T, ROWS_OF_PROGRAM)
    is_aligned = all(tensor.data_ptr() % POINTER_ALIGNMENT == 0 for tensor in (weight_EH, bias_E))
    if launch is not None and is_aligned:
        launch(programs, *arguments)
    else:
        launch_unbound(router_linear_kernel, programs, arguments, constants, num_warps=warps_of(H), device=rows_TH.device)
    return out_TE
