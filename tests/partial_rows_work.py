"""Ranks whose combine gets fewer partial rows than there are tokens, or as many and not one more."""

import ctypes
import mmap

import torch

import tokenferry as tf
from cases import BULK_ROWS, Case, StepCase, begin, run_layer, settle
from tokenferry.testing.data import make_inputs

COUNTS = {"slots": (2, 1), "bulk": (BULK_ROWS, 1)}
CAPACITY = 1025


def too_few(group: tf.EPGroup, transport: str, way: str, halves: bool) -> list[object]:
    """Rank 1 gives its combine one partial row less than the ranks bring tokens. What this rank raises, and that after a reset
    all is right again."""
    tokens, config = COUNTS[way], Case().config
    num_valid = sum(tokens)
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport=transport, timeout_s=20) as ws:
        layer = [ws.dispatcher() for _ in range(3)][2]
        own = make_inputs(config, tokens, seed=3)[group.rank]
        given = [each.to(ws.device) for each in (own.hidden, own.topk_idx, own.topk_weights)]
        partial = own.partial.to(ws.device)[: num_valid - (group.rank == 1)]
        error: tf.PeerError | None = None
        try:  # rank 0 may hear of it as soon as its rows have left
            ws.begin_step(tokens[group.rank])
            got = layer.dispatch(*given)
            if halves:
                layer.combine_begin(partial, got)
                layer.combine_end()
            else:
                layer.combine(partial, got)
            settle(ws)
            ws.check()
        except tf.PeerError as found:
            error = found
        told = [type(error).__name__, getattr(error, "rank", None), "fewer partial rows" in str(error), "layer 2" in str(error)]
        ws.reset(timeout_s=30)
        step = StepCase((3, 2), spare=0)
        begin(ws, step)
        run_layer(ws, layer, step, 0)
        return told


def overlaps(group: tf.EPGroup, transport: str) -> dict[str, str]:
    """What combine says to memory for its sums that others read, and whether it takes memory beside that."""
    config, said = Case().config, {}
    with tf.Workspace(config, group, max_tokens_per_rank=4, transport=transport) as ws:
        layer = ws.dispatcher()
        own = make_inputs(config, (2,) * group.size, seed=5)[group.rank]
        given = [each.to(ws.device) for each in (own.hidden, own.topk_idx, own.topk_weights)]
        for name in ("next to it", "one row of it", "gathered rows", "combine_input"):
            ws.begin_step(2)
            got = layer.dispatch(*given)
            memory = torch.zeros(2 * group.size + 2, config.hidden_size, dtype=config.dtype, device=ws.device)
            partial = memory[:-2].copy_(own.partial)
            out = {
                "next to it": memory[-2:],
                "one row of it": memory[-3:-1],
                "gathered rows": got.hidden[1:3],
                "combine_input": layer.combine_input()[:2],
            }[name]
            try:
                assert layer.combine(partial, got, out) is out
                said[name] = ""
            except tf.LayoutError as error:
                said[name] = str(error)
                layer.combine(partial, got)
            settle(ws)
    return said


def rows_behind_the_first(group: tf.EPGroup, transport: str, way: str, halves: bool) -> list[str]:
    """Combines partial rows that lie in `combine_input()`, one row behind its begin: a copy to the place from which peers fetch
    them would write over rows that are still to be copied. Once more with floats of another kind in the first rows."""
    tokens, config = COUNTS[way], Case().config
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport=transport, timeout_s=20) as ws:
        layer, said = ws.dispatcher(), []
        inputs = make_inputs(config, tokens, seed=6)
        own, first = inputs[group.rank], sum(tokens[: group.rank])
        given = [each.to(ws.device) for each in (own.hidden, own.topk_idx, own.topk_weights)]
        for dtype, begin in ((torch.bfloat16, 1), (torch.float16, 0)):
            terms = [each.partial.nan_to_num(0.5, 2.0, -2.0).clamp(-4, 4).to(dtype) for each in inputs]
            total = sum(term.float() if dtype == config.dtype else term.to(config.dtype).float() for term in terms)
            wanted = total[first : first + tokens[group.rank]].to(config.dtype)
            ws.begin_step(tokens[group.rank])
            got = layer.dispatch(*given)
            partial = layer.combine_input().view(dtype)[begin : begin + sum(tokens)].copy_(terms[group.rank])
            if halves:
                layer.combine_begin(partial, got)
                sums = layer.combine_end()
            else:
                sums = layer.combine(partial, got)
            settle(ws)
            said.append("" if torch.equal(sums.cpu(), wanted) else f"{dtype}: other sums")
        return said


WANTED = ["PeerFailedError", 1, True, True]


def before_a_forbidden_page(num_rows: int, config: tf.MoEConfig) -> tuple[torch.Tensor, mmap.mmap]:
    """Rows whose last byte is the last that may be read: the kernel ends a process that reads on."""
    row_bytes, page = config.hidden_size * config.dtype.itemsize, mmap.PAGESIZE
    pages = -(-num_rows * row_bytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    all_rows = torch.frombuffer(memory, dtype=config.dtype, count=pages * page // config.dtype.itemsize)
    return all_rows[all_rows.numel() - num_rows * config.hidden_size :].view(num_rows, config.hidden_size), memory


def no_row_more(group: tf.EPGroup, way: str) -> list[list[float]]:
    """Combines rows behind which nothing may be read: as many as there are tokens, and, on rank 1, one less."""
    tokens, config = COUNTS[way], Case().config
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=20) as ws:
        layer = ws.dispatcher()
        own = make_inputs(config, tokens, seed=4)[group.rank]
        sums: list[list[float]] = []
        for missing in (0, group.rank):
            partial, _memory = before_a_forbidden_page(sum(tokens) - missing, config)
            partial.fill_(1.0 + group.rank)
            try:
                ws.begin_step(tokens[group.rank])
                got = layer.dispatch(own.hidden, own.topk_idx, own.topk_weights)
                sums.append(layer.combine(partial, got).unique().tolist())
            except tf.PeerFailedError as error:
                sums.append([error.rank])
        return sums
