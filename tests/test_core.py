"""Config, groups, selection, errors and the order of calls, on one rank."""

import pickle

import pytest
import torch

import tokenferry as tf
from tokenferry.kernels.control_block import MAX_LAYERS
from tokenferry.transports.selection import TRANSPORTS, Accepted, Rejected, agree, choose

CONFIG = tf.MoEConfig(hidden_size=8, num_experts=6, topk=2, dtype=torch.float32)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(count, 8), torch.zeros(count, 2, dtype=torch.int64), torch.ones(count, 2)


@pytest.fixture(params=["local", "collective"])
def ws(request: pytest.FixtureRequest):
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4, transport=request.param) as workspace:
        yield workspace


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive int, got 0"),
        ({"num_experts": True}, "num_experts must be a positive int"),
        ({"topk": 7}, "topk is 7 but there are only 6 experts"),
        ({"dtype": torch.float64}, "dtype must be one of"),
    ],
    ids=["no-columns", "bool", "topk-over-experts", "float64"],
)
def test_config_validates_itself(changes: dict, said: str) -> None:
    with pytest.raises(tf.ConfigError, match=said):
        tf.MoEConfig(**{"hidden_size": 8, "num_experts": 6, "topk": 2, **changes})


@pytest.mark.parametrize(
    ("num_experts", "size", "lengths"), [(8, 4, [2, 2, 2, 2]), (4, 3, [2, 1, 1]), (7, 5, [2, 2, 1, 1, 1]), (3, 3, [1, 1, 1])]
)
def test_experts_lie_in_blocks_the_first_ranks_hold_one_more(num_experts: int, size: int, lengths: list[int]) -> None:
    store = torch.distributed.HashStore()
    ranges = [tf.EPGroup.from_store(store, rank, size).expert_range(num_experts) for rank in range(size)]
    assert [len(r) for r in ranges] == lengths
    assert [expert for r in ranges for expert in r] == list(range(num_experts))


def test_fewer_experts_than_ranks_is_an_error() -> None:
    group = tf.EPGroup.from_store(torch.distributed.HashStore(), 0, 7)
    with pytest.raises(tf.ConfigError, match="6 experts cannot be spread over 7 ranks"):
        tf.Workspace(CONFIG, group, max_tokens_per_rank=4)


def test_the_first_to_claim_a_name_keeps_it() -> None:
    """So that all ranks blame the rank that was blamed first."""
    first, second = (
        tf.EPGroup.from_store(store, rank, 2).channel for store in [torch.distributed.HashStore()] for rank in range(2)
    )
    assert [first.claim("abort", 0), second.claim("abort", 1), first.claim("abort", 2)] == [0, 0, 0]


def test_every_candidate_gets_a_decision() -> None:
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4) as ws:
        assert sorted(decision.name for decision in ws.decisions) == sorted(TRANSPORTS)
        assert ws.transport == "local"


def test_a_transport_that_one_rank_rejects_is_rejected_for_all() -> None:
    yes, no = Accepted("p2p", "mapped"), Rejected("p2p", "no peer access")
    (agreed,) = agree([[yes], [no]])
    assert isinstance(agreed, Rejected) and agreed.reason == "no peer access (on rank 1)"


def test_an_unavailable_transport_says_why_for_each() -> None:
    decisions = [Rejected("p2p", "no peer access"), Accepted("collective", "gloo")]
    with pytest.raises(tf.TransportUnavailableError, match="p2p: rejected, no peer access") as caught:
        choose("p2p", decisions)
    assert caught.value.decisions == tuple(decisions)
    assert choose("auto", decisions) == "collective"


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_required_bytes_is_nbytes(transport: str) -> None:
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4, transport=transport) as ws:
        assert tf.Workspace.required_bytes(CONFIG, 1, 4, transport=transport) == ws.nbytes


def test_the_tree_of_errors_survives_a_process_border() -> None:
    for error in (tf.PeerTimeoutError(2, "not-entered", 5, 1, 3.5), tf.PeerFailedError(1, "gone", 4), tf.RankFailedError(0, "x")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)


def test_a_combined_row_never_aliases_the_partial(ws: tf.Workspace) -> None:
    dispatcher = ws.dispatcher()
    ws.begin_step(2)
    got = dispatcher.dispatch(*rows(2))
    partial = got.hidden.clone()
    out = dispatcher.combine(partial, got)
    before = out.clone()
    partial.zero_()
    assert torch.equal(out, before)


def test_a_rank_alone_rounds_its_term_too(ws: tf.Workspace) -> None:
    """1 + 2^-9 is 1 in bfloat16."""
    with tf.Workspace(CONFIG, ws.group, max_tokens_per_rank=1, transport=ws.transport, combine_dtype=torch.bfloat16) as rounding:
        dispatcher = rounding.dispatcher()
        rounding.begin_step(1)
        dispatcher.dispatch(*rows(1))
        assert torch.equal(dispatcher.combine(torch.full((1, 8), 1 + 2**-9)), torch.ones(1, 8))


def test_combine_input_has_a_row_for_each_gathered_row(ws: tf.Workspace) -> None:
    dispatcher = ws.dispatcher()
    ws.begin_step(3)
    got = dispatcher.dispatch(*rows(3))
    dispatcher.combine_input().copy_(got.hidden)
    assert torch.equal(dispatcher.combine(dispatcher.combine_input(), got), got.hidden)


def test_padding_by_a_device_scalar_is_read_late(ws: tf.Workspace) -> None:
    real = torch.tensor([3], dtype=torch.int32)
    ws.begin_step(3, real)
    real.fill_(1)
    got = ws.dispatcher().dispatch(*rows(3))
    assert (got.topk_idx[:, 0]).tolist() == [0, -1, -1]


@pytest.mark.parametrize("wrong", [2**32 + 3, -(2**32) + 1, 2**31, 6, -2])
def test_a_number_out_of_range_is_refused_by_its_own_value(ws: tf.Workspace, wrong: int) -> None:
    hidden, idx, weights = rows(2)
    idx[1, 1] = wrong
    ws.begin_step(2)
    with pytest.raises(tf.UsageError, match=f"topk_idx holds {wrong}, but expert numbers are -1"):
        ws.dispatcher().dispatch(hidden, idx, weights)


def test_fewer_rows_than_announced_travel_with_rows_of_no_expert(ws: tf.Workspace) -> None:
    dispatcher = ws.dispatcher()
    ws.begin_step(4)
    got = dispatcher.dispatch(*rows(1))
    assert got.valid_tokens.tolist() == [4] and got.topk_idx.tolist() == [[0, 0], [-1, -1], [-1, -1], [-1, -1]]
    assert dispatcher.combine(got.hidden.clone()).shape == (1, 8)


def test_solo_runs_without_the_peers_and_leaves_no_step() -> None:
    group = tf.EPGroup(device="cpu")
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport="collective") as ws:
        dispatcher = ws.dispatcher()
        with ws.solo():
            ws.begin_step(2)
            got = dispatcher.dispatch(*rows(2))
            dispatcher.combine(got.hidden.clone())
        with pytest.raises(tf.StateError, match="dispatch in layer 0: the workspace is without a step; call begin_step"):
            dispatcher.dispatch(*rows(2))


def test_after_solo_there_is_no_step_to_read_but_numbers_go_on(ws: tf.Workspace) -> None:
    ws.begin_step(1)
    with ws.solo():
        ws.begin_step(2)
    with pytest.raises(tf.StateError, match="no step has begun"):
        _ = ws.step
    assert ws.begin_step(3).index == 2


def test_dispatchers_are_given_out_up_to_the_limit_and_not_beyond(ws: tf.Workspace) -> None:
    last = [ws.dispatcher() for _ in range(MAX_LAYERS)][-1]
    with pytest.raises(tf.StateError, match="has given out 65535 dispatchers, and 65535 is the most; make one for each layer"):
        ws.dispatcher()
    ws.begin_step(2)
    assert last.layer == MAX_LAYERS - 1
    assert last.combine(last.dispatch(*rows(2)).hidden.clone()).shape == (2, 8)


def test_in_debug_mode_a_write_to_the_counts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFERRY_DEBUG", "1")
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4) as ws:
        for _ in range(3):
            ws.begin_step(2)
            ws.check()
        ws.step.tokens_per_rank.fill_(1)
        with pytest.raises(tf.StateError, match="the tensors of step 3 were written 1 times"):
            ws.check()
        with pytest.raises(tf.StateError, match="were written"):
            ws.begin_step(2)


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_the_callers_default_device_does_not_matter(transport: str) -> None:
    given = rows(2)
    with torch.device("meta"), tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4, transport=transport) as ws:
        step, dispatcher = ws.begin_step(2), ws.dispatcher()
        got = dispatcher.dispatch(*given)
        out = dispatcher.combine(got.hidden, got)
    assert torch.equal(out, given[0]) and step.valid_tokens.tolist() == [2]


def test_the_halves_equal_the_whole(ws: tf.Workspace) -> None:
    dispatcher = ws.dispatcher()
    ws.begin_step(2)
    given = rows(2)
    dispatcher.dispatch_begin(*given)
    got = dispatcher.dispatch_end()
    dispatcher.combine_begin(got.hidden.clone(), got)
    assert torch.equal(dispatcher.combine_end(), given[0])


def dispatched(ws: tf.Workspace):
    dispatcher = ws.dispatcher()
    ws.begin_step(2)
    return dispatcher, dispatcher.dispatch(*rows(2))


def closed(ws: tf.Workspace) -> None:
    ws.close()
    ws.begin_step(1)


def combined_twice(ws: tf.Workspace) -> None:
    dispatcher, got = dispatched(ws)
    dispatcher.combine(got.hidden, got)
    dispatcher.combine(got.hidden, got)


def foreign_dispatched(ws: tf.Workspace) -> None:
    with tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), max_tokens_per_rank=4) as other:
        _, foreign = dispatched(other)
        dispatcher, got = dispatched(ws)
        dispatcher.combine(got.hidden, foreign)


def other_layers_combine(ws: tf.Workspace) -> None:
    _, got = dispatched(ws)
    ws.dispatcher().combine(got.hidden)


MISUSES = {
    "no-step": (lambda ws: ws.dispatcher().dispatch(*rows(1)), tf.StateError, "call begin_step"),
    "too-many-tokens": (lambda ws: ws.begin_step(5), tf.CapacityError, "num_tokens is 5 but the workspace was opened for 4"),
    "negative-tokens": (lambda ws: ws.begin_step(-1), tf.ShapeError, "got -1"),
    "real-over-tokens": (lambda ws: ws.begin_step(2, 3), tf.CapacityError, "between 0 and num_tokens, 2; got 3"),
    "real-int64": (lambda ws: ws.begin_step(2, torch.tensor([1])), tf.DtypeError, "torch.int32, got torch.int64"),
    "step-inside-layer": (lambda ws: (dispatched(ws), ws.begin_step(1)), tf.StateError, "between a dispatch and its combine"),
    "dispatch-twice": (lambda ws: dispatched(ws)[0].dispatch(*rows(2)), tf.StateError, "call combine"),
    "combine-first": (lambda ws: (ws.begin_step(1), ws.dispatcher().combine(torch.zeros(1, 8))), tf.StateError, "dispatch"),
    "closed": (closed, tf.StateError, "closed"),
    "combined-twice": (combined_twice, tf.StateError, "combined already"),
    "foreign-dispatched": (foreign_dispatched, tf.StateError, "another dispatch or workspace"),
    "other-layer": (other_layers_combine, tf.StateError, "dispatcher of layer 1"),
    "more-rows-than-announced": (
        lambda ws: (ws.begin_step(1), ws.dispatcher().dispatch(*rows(2))), tf.CapacityError, "2 rows but begin_step announced 1"),
    "hidden-columns": (
        lambda ws: (ws.begin_step(1), ws.dispatcher().dispatch(torch.zeros(1, 9), *rows(1)[1:])), tf.ShapeError, r"\[rows, 8\]"),
    "hidden-dtype": (
        lambda ws: (ws.begin_step(1), ws.dispatcher().dispatch(rows(1)[0].bfloat16(), *rows(1)[1:])), tf.DtypeError, "float32"),
    "hidden-strides": (
        lambda ws: (ws.begin_step(2), ws.dispatcher().dispatch(torch.zeros(8, 2).T, *rows(2)[1:])), tf.LayoutError, "contiguous"),
    "ids-too-large": (
        lambda ws: (ws.begin_step(1), ws.dispatcher().dispatch(rows(1)[0], torch.full((1, 2), 6), rows(1)[2])), tf.UsageError,
        "topk_idx holds 6"),
    "ids-below-minus-one": (
        lambda ws: (ws.begin_step(1), ws.dispatcher().dispatch(rows(1)[0], torch.full((1, 2), -2), rows(1)[2])), tf.UsageError,
        "topk_idx holds -2"),
    "weights-rows": (
        lambda ws: (ws.begin_step(2), ws.dispatcher().dispatch(*rows(2)[:2], rows(1)[2])), tf.ShapeError, "but hidden has 2"),
    "partial-rows": (
        lambda ws: dispatched(ws)[0].combine(torch.zeros(3, 8)), tf.ShapeError, "3 rows but dispatch returned 2"),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES, ids=str)
def test_misuse_names_the_argument_and_the_remedy(ws: tf.Workspace, misuse: str) -> None:
    call, error, said = MISUSES[misuse]
    with pytest.raises(error, match=said):
        call(ws)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank must be a positive int"),
        ({"combine_dtype": torch.int8}, "combine_dtype must be one of"),
        ({"combine_order": "random"}, "combine_order must be 'rank' or 'any'"),
        ({"counts": "odd"}, "counts must be 'uneven' or 'equal'"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"timeout_s": "30"}, "timeout_s must be positive, got '30'"),
        ({"max_ctas": 0}, "max_ctas must be a positive int or None, got 0"),
        ({"transport": "carrier-pigeon"}, "transport must be 'auto' or one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked(settings: dict, error: str) -> None:
    with pytest.raises(tf.ConfigError, match=error):
        tf.Workspace(CONFIG, tf.EPGroup(device="cpu"), **{"max_tokens_per_rank": 4, **settings})


@pytest.mark.parametrize(
    ("config", "group", "said"), [({}, None, "config must be a MoEConfig"), (CONFIG, None, "make one with EPGroup")]
)
def test_what_is_no_config_and_no_group_is_named(config: object, group: object, said: str) -> None:
    with pytest.raises(tf.ConfigError, match=said):
        tf.Workspace(config, group, max_tokens_per_rank=4)
