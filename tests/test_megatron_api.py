"""The seed's API by name, and what of it needs one process only: a group of one, validation, the fused experts, install()."""

import ast
import inspect
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tokenferry.activations import Activation
from tokenferry.errors import ConfigError, DeviceError, DtypeError, ShapeError, StateError, UsageError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron.base import StandaloneBase

BASE, NCCL, NVLS = "InferenceAllGatherDispatcherBase", "NCCLAllGatherDispatcher", "NVLSAllGatherVDispatcher"

SEED_SIGNATURES = """
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
"""The seed's signatures, one a line."""

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
"""The names that code written for the seed's classes uses."""

BEYOND_THE_SEED = {
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


@pytest.fixture(autouse=True)
def fresh_classes():
    """Every test finds the class attributes as after import."""
    kept = {}
    for name in TABLE:
        cls = getattr(megatron, name)
        kept[cls] = {key: value for key, value in vars(cls).items() if not callable(value) and not key.startswith("__")}
    yield
    megatron.close()
    for cls, values in kept.items():
        for key, value in values.items():
            if not isinstance(value, classmethod):
                setattr(cls, key, value)
    megatron.InferenceAllGatherDispatcherBase._registry.scalar = None


def config(**changes) -> megatron.InferenceMoEConfig:
    return megatron.InferenceMoEConfig(**{"moe_router_topk": 2, "num_moe_experts": 4, "hidden_size": 8, **changes})


def seed_entries():
    for line in SEED_SIGNATURES.strip().splitlines():
        kind, rest = line.split(" ", 1)
        owner, _, name = re.match(r"(\w+)(\.(\w+))?", rest).groups()
        yield kind, owner, name, rest


# --- names ----------------------------------------------------------------------------------------------------------


def test_table_is_the_seed() -> None:
    listed = {kind: {} for kind in ("attribute", "classmethod", "method")}
    for kind, owner, name, rest in seed_entries():
        if kind == "attribute":
            listed[kind].setdefault(owner, {})[name] = ast.literal_eval(rest.split("= ")[1])
        elif kind != "class":
            listed[kind].setdefault(owner, set()).add(name)
    assert {owner: row["attributes"] for owner, row in TABLE.items()} == listed["attribute"]
    assert {owner: row["class methods"] for owner, row in TABLE.items()} == listed["classmethod"]
    assert {owner: row["methods"] for owner, row in TABLE.items()} == listed["method"]


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, row in TABLE.items() for n in row["attributes"]])
def test_class_attribute_and_its_default(owner: str, name: str) -> None:
    assert getattr(getattr(megatron, owner), name) == TABLE[owner]["attributes"][name]


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, row in TABLE.items() for n in sorted(row["class methods"])])
def test_class_method_is_one(owner: str, name: str) -> None:
    assert isinstance(inspect.getattr_static(getattr(megatron, owner), name), classmethod)


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, names in BEYOND_THE_SEED.items() for n in sorted(names)])
def test_name_that_the_seed_does_not_list(owner: str, name: str) -> None:
    assert hasattr(getattr(megatron, owner), name)


@pytest.mark.parametrize(("kind", "owner", "name", "rest"), [e for e in seed_entries() if e[0] != "attribute"])
def test_signature_is_the_seeds(kind: str, owner: str, name: str | None, rest: str) -> None:
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


# --- a group of one -------------------------------------------------------------------------------------------------


def rows(num_rows: int = 5, topk: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_rows, 1, 8, generator=generator).bfloat16(),
        torch.randint(4, (num_rows, topk), generator=generator),
        torch.rand(num_rows, topk, generator=generator),
    )


def preprocessed(dispatcher, num_rows: int = 5):
    hidden, routing, probs = rows(num_rows)
    return dispatcher.dispatch_preprocess(hidden, routing, probs)


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_group_of_one_hands_back_what_it_was_given(name: str) -> None:
    dispatcher = getattr(megatron, name)(4, [0, 1, 2, 3], config())
    hidden, probs = preprocessed(dispatcher)
    got_hidden, got_probs = dispatcher.token_dispatch(hidden, probs)
    assert got_hidden is hidden
    assert got_probs is probs
    assert dispatcher.dispatch_postprocess(hidden, probs) == (hidden, None, probs)
    assert dispatcher.combine_preprocess(hidden) is hidden
    combined = dispatcher.combine_postprocess(dispatcher.token_combine(hidden.float()))
    assert (combined.dtype, combined.shape) == (torch.bfloat16, (5, 1, 8))


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_group_of_one_publishes_its_counts(name: str) -> None:
    cls = getattr(megatron, name)
    cls.allocate_valid_tokens_tensor()
    address = megatron.InferenceAllGatherDispatcherBase._valid_tokens().data_ptr()
    dispatcher = cls(4, [0, 1, 2, 3], config())
    dispatcher.token_dispatch(*preprocessed(dispatcher))
    assert cls._valid_tokens().tolist() == [5]
    assert cls._valid_tokens().dtype == torch.int32
    assert cls._valid_tokens().data_ptr() == address
    assert cls._get_host_valid_tokens_estimate() == 5


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_only_the_first_layer_publishes(name: str) -> None:
    cls = getattr(megatron, name)
    first, second = cls(4, [0, 1, 2, 3], config()), cls(4, [0, 1, 2, 3], config(), runs_metadata_sync=False)
    first.token_dispatch(*preprocessed(first, 5))
    second.token_dispatch(*preprocessed(second, 3))
    assert cls._valid_tokens().tolist() == [5]


@pytest.mark.parametrize("name", [NCCL, NVLS])
def test_group_of_one_masks_padding_rows(name: str) -> None:
    cls = getattr(megatron, name)
    real = torch.tensor([3], dtype=torch.int32)
    cls.set_real_token_count_tensor(real)
    dispatcher = cls(4, [0, 1, 2, 3], config())
    hidden, probs = preprocessed(dispatcher)
    given = dispatcher.routing_map
    before = given.clone()
    dispatcher.token_dispatch(hidden, probs)
    assert (dispatcher.routing_map[3:] == -1).all()
    assert torch.equal(dispatcher.routing_map[:3], before[:3])
    assert torch.equal(given, before), "the router's tensor was written"


def test_buffers_of_a_group_of_one_are_the_scalars() -> None:
    cls = megatron.NVLSAllGatherVDispatcher
    cls.allocate_buffers(16, 2, 8, None)
    assert cls._get_rsv_tensor() is None, "experts would write [G, H] where rows are [T, H]"
    dispatcher = cls(4, [0, 1, 2, 3], config())
    dispatcher.token_dispatch(*preprocessed(dispatcher))
    assert cls._step_metadata.tolist() == [5, 0, 5]
    assert (cls._valid_tokens().item(), cls._rank_token_offset().item(), cls._ep_max_tokens().item()) == (5, 0, 5)
    assert cls._valid_tokens().data_ptr() == cls._step_metadata.data_ptr()
    cls._delete_buffers()
    assert (cls._step_metadata, cls._symm_rsv, cls._symm_metadata, cls._real_token_count_tensor) == (None,) * 4


def test_router_output_squeezed_at_top_1_is_taken() -> None:
    dispatcher = megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config(moe_router_topk=1))
    hidden, routing, probs = rows(topk=1)
    assert dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing[:, 0], probs[:, 0]))[0].shape == (5, 8)


# --- wrong use ------------------------------------------------------------------------------------------------------


def test_real_token_count_tensor_is_checked() -> None:
    cls = megatron.NVLSAllGatherVDispatcher
    with pytest.raises(StateError, match="set_real_token_count_tensor"):
        cls.modify_real_token_count_for_mtp(1)
    with pytest.raises(DtypeError, match="int32"):
        cls.set_real_token_count_tensor(torch.zeros(1))
    with pytest.raises(ShapeError, match="one element"):
        cls.set_real_token_count_tensor(torch.zeros(2, dtype=torch.int32))


def test_overlap_must_be_on_for_shared_experts() -> None:
    with pytest.raises(ValueError, match="moe_shared_expert_overlap"):
        megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config()).set_shared_experts(torch.nn.Identity())


@pytest.mark.parametrize(
    ("routing", "error", "text"),
    [
        (torch.zeros(5, 4, dtype=torch.bool), ShapeError, r"dense, \[5, 2\]"),
        (torch.zeros(5, 2), DtypeError, "expert numbers"),
        (torch.full((5, 2), 4), UsageError, "4 experts"),
    ],
    ids=["sparse", "float", "too-large"],
)
def test_routing_is_checked(routing: torch.Tensor, error: type, text: str) -> None:
    dispatcher = megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config())
    hidden, _, probs = rows()
    with pytest.raises(error, match=text):
        dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing, probs))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, [0], config()), "num_local_experts is 0"),
        ((1, [], config()), "local_expert_indices has 0"),
        ((1, [0], SimpleNamespace()), "moe_router_topk"),
    ],
    ids=["no-experts", "no-indices", "no-topk"],
)
def test_constructor_is_checked(arguments: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        megatron.NVLSAllGatherVDispatcher(*arguments)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor"),
        ({"moe_router_padding_for_quantization": True}, "moe_router_padding_for_quantization"),
        ({"moe_router_dtype": None}, "moe_router_dtype"),
        ({"moe_router_dtype": "fp64"}, "--moe-router-dtype"),
        ({"inference_grouped_gemm_backend": "cutlass"}, "inference_grouped_gemm_backend"),
        ({"gated_linear_unit": True, "inference_grouped_gemm_backend": "flashinfer"}, "gated_linear_unit"),
        ({"batch_invariant_mode": True, "inference_grouped_gemm_backend": "flashinfer"}, "batch_invariant_mode"),
        (
            {"batch_invariant_mode": True, "expert_model_parallel_size": 2, "inference_moe_token_dispatcher_type": "nccl"},
            "inference_moe_token_dispatcher_type",
        ),
        ({"batch_invariant_mode": True, "fp8": "e4m3"}, "batch_invariant_mode"),
        ({"batch_invariant_mode": True, "moe_permute_fusion": True}, "moe_permute_fusion"),
        ({"batch_invariant_mode": True, "moe_pad_experts_for_cuda_graph_inference": True}, "moe_pad_experts"),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, "fp8_param"),
        (
            {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param": True, "inference_grouped_gemm_backend": "vllm"},
            "inference_grouped_gemm_backend",
        ),
        (
            {
                "moe_shared_expert_overlap": True,
                "moe_shared_expert_intermediate_size": 8,
                "moe_token_dispatcher_type": "allgather",
            },
            "moe_shared_expert_overlap",
        ),
        (
            {"moe_shared_expert_overlap": True, "moe_latent_size": 4, "inference_moe_token_dispatcher_type": "nccl"},
            "moe_shared_expert_overlap",
        ),
        ({"num_moe_experts": 5, "expert_model_parallel_size": 2}, "num_moe_experts"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_config_that_excludes_itself(changes: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        config(**changes)
    fields = {"moe_router_topk": 2, "num_moe_experts": 4, "hidden_size": 8, "moe_router_dtype": "fp32"}
    fields |= {"transformer_impl": "inference_optimized", "moe_token_dispatcher_type": "alltoall"}
    with pytest.raises(ConfigError, match=field):
        megatron.NVLSAllGatherVDispatcher(2, [0, 1], SimpleNamespace(**{**fields, **changes}))


def test_config_of_another_implementation_is_not_judged() -> None:
    megatron.validate_config(config(transformer_impl="transformer_engine", moe_router_dtype=None))


def test_settings_are_checked() -> None:
    before = megatron.configure()
    with pytest.raises(ConfigError, match="combine_dtype"):
        megatron.configure(combine_dtype=torch.float16)
    assert megatron.configure() == before


# --- the fused experts ----------------------------------------------------------------------------------------------


@pytest.fixture
def experts() -> Experts:
    torch.manual_seed(0)
    shape = ExpertsConfig(hidden_size=8, intermediate_size=16, num_experts=4, activation=Activation("squared_relu"))
    return Experts(shape, range(1, 3), dtype=torch.float32)


def fused(experts: Experts, hidden, probs, routing, valid: int, **changes):
    arguments = {
        "activation_type": "squared_relu",
        "num_local_experts": 2,
        "local_expert_start": 1,
        "valid_tokens": torch.tensor([valid], dtype=torch.int32),
        "routing_map": routing,
        **changes,
    }
    return megatron.fused_moe(hidden, probs, experts.up_proj, experts.down_proj, **arguments)


def test_fused_experts_against_loops(experts: Experts) -> None:
    hidden, routing, probs = rows(6)
    hidden = hidden[:, 0].float()
    got = fused(experts, hidden, probs, routing, 6)
    assert got.dtype == torch.float32
    for r in range(6):
        expected = torch.zeros(8)
        for k in range(2):
            local = int(routing[r, k]) - 1
            if 0 <= local < 2:
                up = torch.relu(experts.up_proj[local] @ hidden[r]).square()
                expected += probs[r, k] * (experts.down_proj[local] @ up)
        torch.testing.assert_close(got[r], expected)


def test_rows_behind_the_valid_ones_are_not_read(experts: Experts) -> None:
    hidden, routing, probs = rows(6)
    hidden = hidden[:, 0].float()
    poisoned = hidden.clone()
    poisoned[4:], out = float("nan"), torch.full((6, 8), 7.0)
    got = fused(experts, poisoned, probs, torch.full_like(routing, 1), 4, out=out)
    assert got is out
    assert torch.equal(got[:4], fused(experts, hidden, probs, torch.full_like(routing, 1), 6)[:4])
    assert (got[4:] == 0).all()


def test_activation_by_megatrons_enum(experts: Experts) -> None:
    hidden, routing, probs = rows(3)
    hidden = hidden[:, 0].float()
    kind = SimpleNamespace(value="squared_relu")
    assert torch.equal(fused(experts, hidden, probs, routing, 3, activation_type=kind), fused(experts, hidden, probs, routing, 3))
    with pytest.raises(ValueError, match="activation_type"):
        fused(experts, hidden, probs, routing, 3, activation_type="tanh")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"num_local_experts": 3}, ShapeError, "num_local_experts, 3"),
        ({"routing_map": torch.zeros(2, 2, dtype=torch.int64)}, ShapeError, "a row for each hidden row"),
        ({"out": torch.zeros(2, 8)}, ShapeError, "out is"),
        ({"valid_tokens": torch.tensor([3])}, DtypeError, r"one torch\.int32, got \[1\] of torch\.int64"),
        ({"valid_tokens": torch.zeros(1, dtype=torch.int32, device="meta")}, DeviceError, "valid_tokens is on meta"),
    ],
    ids=["experts", "routing", "out", "count-dtype", "count-device"],
)
def test_fused_experts_check_their_operands(experts: Experts, changes: dict, error: type, text: str) -> None:
    hidden, routing, probs = rows(3)
    with pytest.raises(error, match=text):
        fused(experts, hidden[:, 0].float(), probs, routing, 3, **changes)


# --- install --------------------------------------------------------------------------------------------------------

FAKE_MODULES = {
    "megatron": "",
    "megatron.core": "",
    "megatron.core.package_info": "__version__ = '0.19.2+abc'",
    "megatron.core.transformer": "",
    "megatron.core.transformer.moe": "",
    "megatron.core.transformer.moe.token_dispatcher": """
class MoETokenDispatcher:
    def __init__(self, config, pg_collection=None):
        self.made_by_megatron = (pg_collection.ep, pg_collection.expt_tp, pg_collection.tp_ep)

class MoEAllGatherTokenDispatcher(MoETokenDispatcher):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None):
        super().__init__(config, pg_collection)
""",
    "megatron.core.transformer.moe.token_dispatcher_inference": """
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

class InferenceAllGatherDispatcherBase(MoEAllGatherTokenDispatcher):
    def __init__(self, *args, runs_metadata_sync=True, **kwargs): ...

class NCCLAllGatherDispatcher(InferenceAllGatherDispatcherBase):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None, runs_metadata_sync=True): ...

class NVLSAllGatherVDispatcher(InferenceAllGatherDispatcherBase):
    def __init__(self, num_local_experts, local_expert_indices, config, pg_collection=None, runs_metadata_sync=True): ...
""",
    "megatron.core.transformer.moe.moe_layer": """
from megatron.core.transformer.moe.token_dispatcher_inference import NCCLAllGatherDispatcher, NVLSAllGatherVDispatcher as Renamed
""",
}
DISPATCHERS = "megatron.core.transformer.moe.token_dispatcher_inference"
LAYER = "megatron.core.transformer.moe.moe_layer"


@pytest.fixture
def fake_megatron(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A megatron.core that has the modules and classes that install() looks for, and no more."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    made = {}
    for name, source in FAKE_MODULES.items():
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, vars(module))
        made[name] = module
    return made


def test_install_replaces_the_names_wherever_they_were_imported(fake_megatron: dict[str, ModuleType]) -> None:
    undo = megatron.install()
    assert undo.version == "0.19.2"
    assert set(undo.replaced) == {f"{DISPATCHERS}.{name}" for name in TABLE} | {f"{LAYER}.{NCCL}", f"{LAYER}.Renamed"}
    assert fake_megatron[LAYER].Renamed is megatron.NVLSAllGatherVDispatcher
    assert all(getattr(fake_megatron[DISPATCHERS], name) is getattr(megatron, name) for name in TABLE)
    undo()


def test_installed_classes_are_megatrons(fake_megatron: dict[str, ModuleType]) -> None:
    theirs = fake_megatron["megatron.core.transformer.moe.token_dispatcher"].MoEAllGatherTokenDispatcher
    with megatron.install():
        dispatcher = megatron.NVLSAllGatherVDispatcher(4, [0, 1, 2, 3], config())
        assert isinstance(dispatcher, theirs)
        assert dispatcher.made_by_megatron == (None, None, None)
        assert dispatcher.token_dispatch(*preprocessed(dispatcher))[0].shape == (5, 8)
    assert not issubclass(megatron.NVLSAllGatherVDispatcher, theirs)


def test_undo_puts_everything_back(fake_megatron: dict[str, ModuleType]) -> None:
    before = {name: dict(vars(module)) for name, module in fake_megatron.items()}
    undo = megatron.install()
    undo()
    undo()
    assert {name: dict(vars(module)) for name, module in fake_megatron.items()} == before
    assert megatron.InferenceAllGatherDispatcherBase.__bases__ == (StandaloneBase,)


def test_an_original_kept_under_another_name_stays(fake_megatron: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    users = ModuleType("users")
    users.kept = users.NVLSAllGatherVDispatcher = original = fake_megatron[DISPATCHERS].NVLSAllGatherVDispatcher
    monkeypatch.setitem(sys.modules, "users", users)
    with megatron.install():
        assert users.NVLSAllGatherVDispatcher is megatron.NVLSAllGatherVDispatcher
        assert users.kept is original


def test_installing_twice_is_refused(fake_megatron: dict[str, ModuleType]) -> None:
    with megatron.install(), pytest.raises(StateError, match="already"):
        megatron.install()


@pytest.mark.parametrize("version", ["0.18.0", "0.190.0", "1.0"])
def test_unknown_version_is_named(fake_megatron: dict[str, ModuleType], version: str) -> None:
    fake_megatron["megatron.core.package_info"].__version__ = version
    with pytest.raises(ConfigError, match=rf"{re.escape(version)} is not known.*0\.19"):
        megatron.install()
    with megatron.install(allow_unknown_version=True) as installation:
        assert installation.version == version


def test_other_constructor_is_refused(fake_megatron: dict[str, ModuleType]) -> None:
    class NVLSAllGatherVDispatcher:
        def __init__(self, config): ...

    fake_megatron[DISPATCHERS].NVLSAllGatherVDispatcher = NVLSAllGatherVDispatcher
    with pytest.raises(ConfigError, match=r"constructed with \['config'\]"):
        megatron.install(allow_unknown_version=True)
    assert megatron.InferenceAllGatherDispatcherBase.__bases__ == (StandaloneBase,)


def test_without_megatron_install_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ConfigError, match="megatron-core"):
        megatron.install()
