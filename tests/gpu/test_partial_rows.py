"""Fewer partial rows than gathered ones, and memory of the caller's for the sums: on GPUs, and in graphs."""

import pytest
import torch

import tokenferry as tf
from cases import ON_GPUS, Case, same
from partial_rows_work import COUNTS, WANTED, overlaps, rows_behind_the_first, too_few
from rank_pool import RankPools
from tokenferry.testing import run_ranks
from tokenferry.testing.data import make_inputs

two_gpus = pytest.mark.gpu(count=2)


@two_gpus
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("way", COUNTS)
def test_a_combine_of_too_few_rows_fails_on_all_ranks_and_names_its_own(way: str, halves: bool) -> None:
    assert run_ranks(too_few, 2, "p2p", way, halves, backend="nccl", timeout_s=120) == [WANTED] * 2


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_sums_go_to_no_memory_that_others_read(on_ranks: RankPools, transport: str) -> None:
    for said in on_ranks(overlaps, 2, transport, backend="nccl"):
        assert said["next to it"] == ""
        assert "out overlaps partial" in said["one row of it"]
        assert "out overlaps the gathered rows" in said["gathered rows"] or transport == "collective"
        assert "out overlaps the workspace's buffer" in said["combine_input"] or transport == "collective"


@two_gpus
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("way", COUNTS)
def test_rows_behind_the_first_of_combine_input_are_summed_as_they_were(way: str, halves: bool) -> None:
    assert run_ranks(rows_behind_the_first, 2, "p2p", way, halves, backend="nccl", timeout_s=120) == [["", ""]] * 2


def in_graphs(group: tf.EPGroup) -> list[str]:
    """A graph with memory for its sums, whose partial rows are enough beside 3 rows of each other rank, and not beside 4."""
    config, own_rows, said = Case().config, 2, []
    rows = own_rows + 3 * (group.size - 1)
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="p2p", timeout_s=20) as ws:
        layer, stream = ws.dispatcher(), torch.cuda.Stream()
        partial = torch.ones(rows, config.hidden_size, dtype=config.dtype, device=ws.device)
        out = torch.zeros(own_rows, config.hidden_size, dtype=config.dtype, device=ws.device)
        own = make_inputs(config, (own_rows,) * group.size, seed=1)[group.rank]
        given = [each.to(ws.device) for each in (own.hidden, own.topk_idx, own.topk_weights)]

        def forward() -> None:
            ws.begin_step(own_rows)
            layer.combine(partial, layer.dispatch(*given), out)

        with torch.cuda.stream(stream), ws.solo():
            forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with ws.capturing(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            forward()
        for count in (3, 4):
            more = [torch.zeros(count, *each.shape[1:], dtype=each.dtype, device=ws.device) for each in given]
            try:
                with torch.cuda.stream(stream):
                    if group.rank == 0:
                        with ws.replaying():
                            graph.replay()
                    else:  # eagerly, with enough partial rows
                        ws.begin_step(count)
                        layer.combine(torch.ones(group.size * 8, config.hidden_size, device=ws.device), layer.dispatch(*more))
                stream.synchronize()
                ws.check()
                said.append("")
                if group.rank == 0:
                    same("sums", out, torch.full_like(out, float(group.size)))
            except tf.PeerFailedError as error:
                said.append(f"{error.rank}: {error.reason}")
    return said


@ON_GPUS
def test_a_replayed_graph_finds_that_it_has_too_few_rows(world_size: int) -> None:
    for first, second in run_ranks(in_graphs, world_size, backend="nccl", timeout_s=120):
        assert first == ""
        assert second.startswith("0: combine in layer 0 was given fewer partial rows")
