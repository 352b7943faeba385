"""Megatron-Core's API by name: class attributes, methods and signatures."""

import ast
import importlib.util
import inspect
import re
import warnings
from types import SimpleNamespace

import pytest

import tokenferry as tf
from megatron_classes import BASE, NCCL, NVLS, config, fresh_classes
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.known_versions import DISPATCHERS, EXPERT_NAMES, NAMES, differences
from tokenferry.testing import run_ranks

__all__ = ["fresh_classes"]  # a fixture that every test here gets


MEGATRON_SIGNATURES = """
class InferenceAllGatherDispatcherBase(*args, runs_metadata_sync: bool = True, **kwargs)
attribute InferenceAllGatherDispatcherBase._valid_tokens_tensor: Optional[torch.Tensor] = None
attribute InferenceAllGatherDispatcherBase._host_valid_tokens_estimate: Optional[int] = None
classmethod InferenceAllGatherDispatcherBase._valid_tokens() -> torch.Tensor
classmethod InferenceAllGatherDispatcherBase._get_host_valid_tokens_estimate() -> Optional[int]
classmethod InferenceAllGatherDispatcherBase.allocate_valid_tokens_tensor() -> None
method InferenceAllGatherDispatcherBase.update_metadata(local_tokens: int) -> None
class NCCLAllGatherDispatcher(num_local_experts: int, local_expert_indices: List[int], config: TransformerConfig, pg_collection: Optional[ProcessGroupCollection] = None, runs_metadata_sync: bool = True)
attribute NCCLAllGatherDispatcher._use_allgather_v: bool = False
attribute NCCLAllGatherDispatcher._local_tokens_per_rank: Optional[List[int]] = None
classmethod NCCLAllGatherDispatcher.allocate_buffers() -> None
method NCCLAllGatherDispatcher.update_metadata(local_tokens: int) -> None
method NCCLAllGatherDispatcher.token_dispatch(hidden_states, probs)
method NCCLAllGatherDispatcher.dispatch_postprocess(hidden_states, probs)
method NCCLAllGatherDispatcher.combine_preprocess(expert_output)
method NCCLAllGatherDispatcher.token_combine(hidden_states)
class NVLSAllGatherVDispatcher(num_local_experts: int, local_expert_indices: List[int], config: TransformerConfig, pg_collection: Optional[ProcessGroupCollection] = None, runs_metadata_sync: bool = True)
attribute NVLSAllGatherVDispatcher._step_metadata: Optional[torch.Tensor] = None
attribute NVLSAllGatherVDispatcher._per_rank_worst_case_token_count: int = 2048
attribute NVLSAllGatherVDispatcher._symm_agv_hidden: Optional[dict] = None
attribute NVLSAllGatherVDispatcher._symm_agv_routing: Optional[dict] = None
attribute NVLSAllGatherVDispatcher._symm_agv_probs: Optional[dict] = None
attribute NVLSAllGatherVDispatcher._symm_rsv: Optional[dict] = None
classmethod NVLSAllGatherVDispatcher._get_rsv_tensor() -> Optional[torch.Tensor]
classmethod NVLSAllGatherVDispatcher._rank_token_offset() -> torch.Tensor
classmethod NVLSAllGatherVDispatcher._ep_max_tokens() -> torch.Tensor
classmethod NVLSAllGatherVDispatcher._delete_buffers()
classmethod NVLSAllGatherVDispatcher.allocate_buffers(per_rank_worst_case_token_count: int, topk: int, hidden_size: int, ep_group: ProcessGroup) -> None
method NVLSAllGatherVDispatcher.update_metadata(local_tokens: int) -> None
method NVLSAllGatherVDispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
method NVLSAllGatherVDispatcher.token_dispatch(hidden_states, probs)
method NVLSAllGatherVDispatcher.dispatch_postprocess(hidden_states, probs)
method NVLSAllGatherVDispatcher.combine_preprocess(expert_output)
method NVLSAllGatherVDispatcher.token_combine(hidden_states)
method NVLSAllGatherVDispatcher.combine_postprocess(hidden_states)
"""  # noqa: E501
"""Megatron-Core's signatures, one a line."""

TABLE = {
    BASE: {
        "attributes": {"_valid_tokens_tensor": None, "_host_valid_tokens_estimate": None},
        "class methods": {"_valid_tokens", "_get_host_valid_tokens_estimate", "allocate_valid_tokens_tensor"},
        "methods": {"update_metadata"},
    },
    NCCL: {
        "attributes": {"_use_allgather_v": False, "_local_tokens_per_rank": None},
        "class methods": {"allocate_buffers"},
        "methods": {"update_metadata", "token_dispatch", "dispatch_postprocess", "combine_preprocess", "token_combine"},
    },
    NVLS: {
        "attributes": {
            "_step_metadata": None,
            "_per_rank_worst_case_token_count": 2048,
            "_symm_agv_hidden": None,
            "_symm_agv_routing": None,
            "_symm_agv_probs": None,
            "_symm_rsv": None,
        },
        "class methods": {"_get_rsv_tensor", "_rank_token_offset", "_ep_max_tokens", "_delete_buffers", "allocate_buffers"},
        "methods": {
            "update_metadata",
            "dispatch_preprocess",
            "token_dispatch",
            "dispatch_postprocess",
            "combine_preprocess",
            "token_combine",
            "combine_postprocess",
        },
    },
}
"""The names that code written for Megatron-Core's classes uses."""

BEYOND_THE_LISTED = {
    NCCL: {"dispatch_preprocess", "combine_postprocess", "set_shared_experts", "get_expert_zero_copy_buffers"},
    NVLS: {
        "_real_token_count_tensor",
        "_symm_metadata",
        "set_real_token_count_tensor",
        "modify_real_token_count_for_mtp",
        "set_shared_experts",
        "get_expert_zero_copy_buffers",
    },
}
"""Names that the running system has and its documentation does not list."""

INSTANCE_ATTRIBUTES = (
    "config", "shared_experts", "use_nccl_stream", "cudagraph_attrs", "num_local_experts", "local_expert_indices", "router_topk",
    "add_bias", "global_local_map", "topk", "_runs_metadata_sync", "ep_group", "ep_size", "ep_rank", "tp_group", "tp_size",
    "tp_rank", "tp_ep_group",
)  # fmt: skip
NVLS_INSTANCE_ATTRIBUTES = ("sp_rank", "_local_tokens", "_shared_expert_output", "_external_shared_expert_launch")


def listed_entries():
    for line in MEGATRON_SIGNATURES.strip().splitlines():
        kind, rest = line.split(" ", 1)
        owner, _, name = re.match(r"(\w+)(\.(\w+))?", rest).groups()
        yield kind, owner, name, rest


def test_the_table_is_megatrons() -> None:
    listed = {kind: {} for kind in ("attribute", "classmethod", "method")}
    for kind, owner, name, rest in listed_entries():
        if kind == "attribute":
            listed[kind].setdefault(owner, {})[name] = ast.literal_eval(rest.split("= ")[1])
        elif kind != "class":
            listed[kind].setdefault(owner, set()).add(name)
    assert {owner: row["attributes"] for owner, row in TABLE.items()} == listed["attribute"]
    assert {owner: row["class methods"] for owner, row in TABLE.items()} == listed["classmethod"]
    assert {owner: row["methods"] for owner, row in TABLE.items()} == listed["method"]


def parameters_listed(rest: str) -> str:
    """Of a line of `MEGATRON_SIGNATURES`: the names of its parameters."""
    arguments = ast.parse(f"def f{rest[rest.index('(') :].split(') ->')[0].rstrip(')')}): ...").body[0].args
    for each in (*arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    return ast.unparse(arguments)


@pytest.mark.parametrize(("kind", "owner", "name", "rest"), list(listed_entries()))
def test_what_install_compares_is_megatrons(kind: str, owner: str, name: str | None, rest: str) -> None:
    path = owner if name is None else f"{owner}.{name}"
    assert NAMES[DISPATCHERS][path] == (None if kind == "attribute" else parameters_listed(rest))


def test_install_compares_nothing_that_ours_lacks() -> None:
    ours = SimpleNamespace(__name__="ours", **{owner: getattr(megatron, owner) for owner in (BASE, NCCL, NVLS)})
    assert differences({DISPATCHERS: ours}, {DISPATCHERS: NAMES[DISPATCHERS]}) == []


def run_comparison(group: tf.EPGroup) -> list[str]:
    warnings.simplefilter("ignore")
    modules = {name: importlib.import_module(name) for name in (*NAMES, *EXPERT_NAMES)}
    classes = {owner: getattr(megatron, owner) for owner in (BASE, NCCL, NVLS)}
    return differences(modules, {**NAMES, **EXPERT_NAMES}, classes)


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (it needs Python 3.12)")
def test_the_tables_agree_with_megatron_core_itself() -> None:
    assert run_ranks(run_comparison, 1, env={"NO_VCS_VERSION": "1"}, timeout_s=120.0) == [[]]


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, row in TABLE.items() for n in row["attributes"]])
def test_class_attribute_and_its_default(owner: str, name: str) -> None:
    assert getattr(getattr(megatron, owner), name) == TABLE[owner]["attributes"][name]


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, row in TABLE.items() for n in sorted(row["class methods"])])
def test_class_method_is_one(owner: str, name: str) -> None:
    assert isinstance(inspect.getattr_static(getattr(megatron, owner), name), classmethod)


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, names in BEYOND_THE_LISTED.items() for n in sorted(names)])
def test_a_name_that_megatron_does_not_document(owner: str, name: str) -> None:
    assert hasattr(getattr(megatron, owner), name)


@pytest.mark.parametrize(("kind", "owner", "name", "rest"), [e for e in listed_entries() if e[0] != "attribute"])
def test_signature_is_megatrons(kind: str, owner: str, name: str | None, rest: str) -> None:
    arguments = ast.parse(f"def f{rest[rest.index('(') :].split(') ->')[0].rstrip(')')}): ...").body[0].args
    expected = {arg.arg: inspect.Parameter.empty for arg in arguments.args}
    defaults = [ast.literal_eval(value) for value in arguments.defaults]
    expected |= dict(zip([arg.arg for arg in arguments.args][len(arguments.args) - len(defaults) :], defaults, strict=True))
    expected |= {a.arg: ast.literal_eval(v) for a, v in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    for star in (arguments.vararg, arguments.kwarg):
        expected |= {} if star is None else {star.arg: inspect.Parameter.empty}
    cls = getattr(megatron, owner)
    found = inspect.signature(cls if name is None else getattr(cls, name)).parameters
    assert {n: p.default for n, p in found.items() if n != "self"} == expected


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_instance_attributes(name: str) -> None:
    dispatcher = getattr(megatron, name)(2, [0, 1], config())
    expected = INSTANCE_ATTRIBUTES + (NVLS_INSTANCE_ATTRIBUTES if name == NVLS else ())
    assert [attribute for attribute in expected if not hasattr(dispatcher, attribute)] == []
    assert isinstance(dispatcher, megatron.InferenceAllGatherDispatcherBase)
    assert (dispatcher.cudagraph_attrs, dispatcher.use_nccl_stream, dispatcher.shared_experts) == (["routing_map"], False, None)
    assert (dispatcher.topk, dispatcher.router_topk, dispatcher._runs_metadata_sync) == (2, 2, True)


def test_base_leaves_update_metadata_to_its_subclasses() -> None:
    base = megatron.InferenceAllGatherDispatcherBase(2, [0, 1], config=config(), runs_metadata_sync=False)
    assert base._runs_metadata_sync is False
    with pytest.raises(NotImplementedError):
        base.update_metadata(3)


def test_a_config_with_little_and_no_groups_serves() -> None:
    dispatcher = megatron.NCCLAllGatherDispatcher(2, [0, 1], SimpleNamespace(moe_router_topk=1), SimpleNamespace())
    assert (dispatcher.ep_size, dispatcher.ep_rank, dispatcher.tp_size, dispatcher.add_bias) == (1, 0, 1, False)
