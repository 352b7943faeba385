"""What rank processes do with quantized rows in a small vLLM."""

import torch

import tokenferry as tf
from fake_vllm import forward
from vllm_work import COUNTS, HIDDEN, LAYERS, managers, partial_of, rows, same

QUANTIZED = {
    "fp8 with a scale for 128 columns": (torch.float8_e4m3fn, 128, torch.float32, 1),
    "fp8 with a scale for 32 columns": (torch.float8_e4m3fn, 64, torch.uint8, 2),
    "fp8 with a scale for a row": (torch.float8_e4m3fn, 72, torch.float32, 1),
    "fp8 with one scale for all": (torch.float8_e4m3fn, 64, None, 0),
    "int8": (torch.int8, 60, torch.float32, 1),
    "packed fp4": (torch.uint8, 32, torch.float8_e4m3fn, 4),
}
"""Dtype and columns of quantized rows, dtype and number of their scales."""


def quantized_rows(name: str, count: int, seed: int) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Rows and their scales, as vLLM's quantizers give them, of any bytes but NaNs, which may arrive as other NaNs."""
    dtype, columns, scale_dtype, num_scales = QUANTIZED[name]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(0, 127, (count, columns), dtype=torch.uint8, generator=generator).view(dtype)
    if scale_dtype is None:
        return hidden, None
    scales = torch.randint(1, 120, (count, num_scales), dtype=torch.uint8, generator=generator)
    return hidden, [scales.view(scale_dtype) if scale_dtype.itemsize == 1 else scales.to(scale_dtype) / 7]


def run_quantized(group: tf.EPGroup, transport: str, name: str, logits: bool) -> tuple[str, str]:
    """Quantized rows with their scales, and 16-bit rows in the next forward: the bits of plain gathers. Returns the transport
    and the format of the quantized rows. `logits`: router logits travel instead of expert numbers."""
    stock, ours = managers(group, {"transport": transport})
    dtype, columns, _, _ = QUANTIZED[name]
    hidden_size = columns * 2 if dtype == torch.uint8 else columns
    for seed, sizes in enumerate(COUNTS[group.size]):
        own, weights, ids = rows(group.rank, sizes[group.rank], seed, torch.bfloat16)
        hidden, scales = quantized_rows(name, len(own), 100 * seed + group.rank)
        terms = torch.randn(sum(sizes), hidden_size, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        for layer in range(LAYERS):
            want, got = ([], [])
            for manager, told in ((stock, want), (ours, got)):
                with forward(sizes):
                    if logits:
                        given = manager.dispatch_router_logits(hidden, torch.cat([weights] * 4, dim=1), False, scales)
                    else:
                        given = manager.dispatch(hidden, weights, ids, False, scales)
                    for each in given:  # a list of the scales is the last one
                        # Copies: gathered rows are the workspace's own again from combine on, and poisoned in debug mode.
                        told += [part.view(torch.uint8).clone() for part in (each if isinstance(each, list) else [each])]
                    told.append(manager.combine(partial_of(terms, group.rank)))
            same(f"{sizes}, layer {layer}", tuple(got), tuple(want))
        with forward(sizes):
            same(f"{sizes}: 16 bits", ours.dispatch(own, weights, ids), stock.dispatch(own, weights, ids))
            ours.combine(torch.zeros(sum(sizes), HIDDEN, dtype=torch.bfloat16))
    assert ours.calls == []
    quantizing, plain = ours.exchange.workspaces()
    assert plain.dispatch_format.is_same
    return quantizing.transport, str(quantizing.dispatch_format)


def run_forms_of_scales(group: tf.EPGroup) -> list[str]:
    """Whether our manager carries rows ("ours"), leaves them to vLLM ("theirs") or raises, forward after forward."""
    _, ours = managers(group, {})
    found = []
    forwards = (
        # rows of the ranks, columns, scales of the ranks
        ([1, 3], 64, [1, 1]),
        ([1, 1], 64, [1, 1]),
        ([0, 1], 72, [1, 1]),
        ([1, 3], 80, [1, 3]),
        ([1, 1], 80, [1, 1]),
        ([1, 0], 88, [1, 0]),
        ([1, 1], 96, [1, 1]),
        ([3, 1], 96, [1, 1]),
        ([1, 1], 104, [2, 2]),
        ([2, 3], 80, [1, 1]),
    )
    for sizes, columns, num_scales in forwards:
        own, weights, ids = rows(group.rank, sizes[group.rank], 0, torch.bfloat16)
        hidden = torch.ones(len(own), columns).to(torch.float8_e4m3fn)
        with forward(sizes):
            try:
                refused = ours._refusal(hidden, weights, ids, False, [torch.ones(num_scales[group.rank], 1)])
                found.append("ours" if refused is None else "theirs")
            except tf.StateError as error:
                found.append(str(error))
    return found


def run_float8_terms(group: tf.EPGroup, transport: str) -> tuple[str, str]:
    """Partial rows that travel as float8: the bits of the reference. Returns the transport and the dtype of the terms."""
    stock, ours = managers(group, {"transport": transport, "combine_dtype": "float8_e4m3fn"})
    for seed, sizes in enumerate(COUNTS[group.size]):
        own = rows(group.rank, sizes[group.rank], seed, torch.bfloat16)
        terms = torch.randn(sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        partials = [partial_of(terms, rank) for rank in range(group.size)]
        wanted = tf.reference.combine(partials, sizes, torch.float8_e4m3fn, torch.bfloat16)[group.rank]
        for layer in range(LAYERS):
            with forward(sizes):
                want, got = stock.dispatch(*own), ours.dispatch(*own)
                same(f"{sizes}, layer {layer}: dispatch", got, want)
                mine = ours.combine(partials[group.rank])
                stock.combine(partials[group.rank])
            same(f"{sizes}, layer {layer}: combine", (mine,), (wanted,))
    assert ours.calls == []
    (workspace,) = ours.exchange.workspaces()
    return workspace.transport, str(workspace.combine_dtype)
