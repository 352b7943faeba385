"""Loads a transformers model with its experts spread over a group of ranks."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from tokenferry.dispatched import RowFormat
from tokenferry.errors import ConfigError, StateError
from tokenferry.groups import EPGroup
from tokenferry.integrations.transformers.as_stored import AsStored
from tokenferry.integrations.transformers.checkpoint import check_files
from tokenferry.integrations.transformers.continuous_batching import adopt, limit
from tokenferry.integrations.transformers.decode_masks import check_dimensions
from tokenferry.integrations.transformers.expert_parallel import ExpertParallel
from tokenferry.integrations.transformers.graph_choice import check_asked_for
from tokenferry.integrations.transformers.graphed_generation import GraphedGeneration
from tokenferry.integrations.transformers.layer import LOCAL_EXPERTS, install_layers, register
from tokenferry.integrations.transformers.loading import open_tensors, own_tensors
from tokenferry.integrations.transformers.packed_experts import is_packed
from tokenferry.integrations.transformers.packed_loading import LayerPacker, take_packed
from tokenferry.integrations.transformers.random_init import random_state
from tokenferry.integrations.transformers.settings import CudaGraphs, Options
from tokenferry.precision import refuse_conversion
from tokenferry.transports.opening import telling_the_others

_NOT_OURS: Final = ("distributed_config", "device_map", "device_mesh", "tp_plan", "tp_size")
"""Arguments of transformers' `from_pretrained` that place a model otherwise."""


def from_pretrained(
    path_or_id: str,
    *,
    group: EPGroup,
    max_tokens_per_rank: int,
    transport: str = "auto",
    dtype: torch.dtype | str = "auto",
    exact: bool = False,
    serialize: bool = False,
    combine_dtype: torch.dtype | None = torch.float32,
    dispatch_format: str | RowFormat = "same",
    timeout_s: float = 30.0,
    open_timeout_s: float = 300.0,
    cuda_graphs: CudaGraphs = "auto",
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> Any:
    """A model of transformers, of which this rank holds its own experts and everything that is no expert. Collective.

    `generate()` and `generate_batch()` work as ever, with other prompts, lengths and numbers of calls on every rank. When a
    rank has no more of them it calls `model.expert_parallel.finish()`, and takes part in the others' steps until all are done.

    Args:
        path_or_id: as in transformers; a checkpoint of safetensors.
        group: the ranks that share the experts. The model goes to `group.device`.
        max_tokens_per_rank: the most tokens (batch times length) that one forward may have on a rank.
        transport: see `Workspace`.
        dtype: of the weights; "auto" = as stored.
        exact: compute bit for bit what the unmodified model computes for a rank's batch, in any dtype, with K times the
            communication and one expert call for each rank: for verification.
        serialize: a second thread that calls the model waits until the first is through. Otherwise it gets a `StateError`.
        combine_dtype: in which the experts' partial sums travel. float32 keeps a bfloat16 model's tokens nearest to the
            unmodified model's; None = the model's own dtype, half the bytes; float8_e4m3fn with a scale for every 128 columns,
            half of these again, needs a hidden size that is a multiple of 16. `exact` leaves it unused, and refuses float8.
        dispatch_format: of hidden rows on their way: "same", or "fp8_block128" for half the bytes and float8's rounding of each
            row; the same on all ranks. `exact` takes "same" alone.
        timeout_s: how long to wait for another rank in a step.
        open_timeout_s: how long the ranks may take to load, one after another.
        cuda_graphs: decode steps of `generate()`, and steps of a rank without tokens, are CUDA graphs. "auto": on GPUs, unless
            the counts pass through the host, as on the collective transport, or transformers' own function runs experts. The
            ranks need not agree.
        auto_class: which of transformers' Auto classes picks the model class.
        kwargs: passed on, such as `attn_implementation`, `revision`, `trust_remote_code`. Experts in MXFP4, as gpt-oss's, stay
            packed in a bfloat16 model, unless `quantization_config=Mxfp4Config(dequantize=True)` is among them.

    Returns:
        The model, an instance of its usual class, in evaluation mode, with `.expert_parallel` (see `ExpertParallel`). Its
        experts pass no gradient on: it is for inference.

    Raises:
        ConfigError: no MoE layer that transformers can hand to us, fewer experts than ranks, a checkpoint that holds no
            safetensors, a file of it that is damaged, a tensor that is lacking, an argument that places the model otherwise, or
            CUDA graphs where none can be made.
        PeerFailedError: another rank could not load its part.
        TransportUnavailableError, PeerTimeoutError: as `Workspace`.
    """
    options = Options(
        max_tokens_per_rank=max_tokens_per_rank,
        transport=transport,
        combine_dtype=combine_dtype,
        exact=exact,
        serialize=serialize,
        own_kernels=not exact and kwargs.get("experts_implementation") in (None, LOCAL_EXPERTS),
        timeout_s=timeout_s,
        open_timeout_s=open_timeout_s,
        cuda_graphs=cuda_graphs,
        dispatch_format=dispatch_format,
    )

    def read(classes: Any, placement: dict[str, Any]) -> Any:
        check_files(Path(path_or_id, kwargs.get("subfolder") or ""))
        auto: Any = type(auto_class.__name__, (auto_class,), {"_model_mapping": classes})
        try:
            return auto.from_pretrained(path_or_id, dtype=dtype, **kwargs, **placement)
        except SafetensorError as error:  # a file that transformers opened for itself
            raise ConfigError(f"a file of the checkpoint {path_or_id} cannot be read: {error}") from error

    return _make(read, group, options, auto_class, kwargs)


def from_config(
    config: Any,
    *,
    group: EPGroup,
    max_tokens_per_rank: int,
    seed: int = 0,
    transport: str = "auto",
    dtype: torch.dtype | str = "auto",
    exact: bool = False,
    serialize: bool = False,
    combine_dtype: torch.dtype | None = torch.float32,
    dispatch_format: str | RowFormat = "same",
    timeout_s: float = 30.0,
    open_timeout_s: float = 300.0,
    cuda_graphs: CudaGraphs = "auto",
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> Any:
    """A model with random weights, for benchmarks and tests, otherwise as `from_pretrained`. Collective.

    Each rank makes its own experts, and everything that is no expert, directly on its device. The same seed gives the same
    weights on any number of ranks; CPUs and GPUs make different ones of it. They are normal numbers with the configuration's
    `initializer_range` (0.02 if it has none); weights of norms are 1, biases 0. `random_state` gives the same weights to an
    unmodified model: `Model.from_pretrained(None, config=config, state_dict=random_state(Model, config, dtype, device, seed))`.

    Args:
        config: a configuration of transformers. With a quantization by MXFP4 experts are packed, as `from_pretrained` would have
            them; any other is left out: the weights are of `dtype`.
        seed: of the weights.
        dtype: "auto" = the configuration's, else bfloat16.
        group, max_tokens_per_rank, transport, exact, serialize, combine_dtype, dispatch_format, timeout_s, open_timeout_s,
            cuda_graphs, auto_class, kwargs: as for `from_pretrained`.

    Raises:
        As `from_pretrained`; ConfigError also if `auto_class` has no model for such a configuration.
    """
    options = Options(
        max_tokens_per_rank=max_tokens_per_rank,
        transport=transport,
        combine_dtype=combine_dtype,
        exact=exact,
        serialize=serialize,
        own_kernels=not exact and kwargs.get("experts_implementation") in (None, LOCAL_EXPERTS),
        timeout_s=timeout_s,
        open_timeout_s=open_timeout_s,
        cuda_graphs=cuda_graphs,
        dispatch_format=dispatch_format,
    )

    def read(classes: Any, placement: dict[str, Any]) -> Any:
        if type(config) not in classes:
            raise ConfigError(f"{auto_class.__name__} has no model for a {type(config).__name__}; give another auto_class")
        plain = copy.deepcopy(config)
        if hasattr(plain, "quantization_config") and not is_packed(plain.quantization_config):
            del plain.quantization_config
        known = _known_dtype(dtype, plain)
        model_class, base = (_first(table[type(config)]) for table in (classes, auto_class._model_mapping))
        state = random_state(base, plain, known, group.device, seed)
        return model_class.from_pretrained(None, config=plain, state_dict=state, dtype=known, **kwargs, **placement)

    return _make(read, group, options, auto_class, kwargs)


def _make(
    read: Callable[[Any, dict[str, Any]], Any], group: EPGroup, options: Options, auto_class: Any, kwargs: Mapping[str, Any]
) -> Any:
    """What `read` makes of the model classes and of where the model is to go, under expert parallelism. Collective."""
    for name in _NOT_OURS:
        if kwargs.get(name) is not None:
            raise ConfigError(f"{name} and expert parallelism by tokenferry exclude one another; leave {name} out")
    if not isinstance(group, EPGroup):
        raise ConfigError(f"group must be an EPGroup, got {type(group).__name__}; make one with EPGroup(process_group)")
    if options.max_tokens_per_rank < 1:
        raise ConfigError(f"max_tokens_per_rank must be at least 1, got {options.max_tokens_per_rank!r}")
    check_asked_for(group, options)
    register()
    expert_parallel = ExpertParallel(group, options)
    loads_to_device = group.device.type != "cpu" and importlib.util.find_spec("accelerate") is not None
    with telling_the_others(group):
        classes = _OwnClasses(auto_class._model_mapping, expert_parallel)
        model = read(classes, {"device_map": {"": group.device}} if loads_to_device else {})
        if not loads_to_device:
            model.to(group.device)
        expert_parallel.probe(model)
    expert_parallel.open(model)
    return model


def _known_dtype(dtype: torch.dtype | str, config: Any) -> torch.dtype:
    """What `from_config` is to make, as a dtype. Raises ConfigError for a name of none."""
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ConfigError(f'dtype must be a torch dtype, the name of one such as "bfloat16", or "auto"; got {dtype!r}')
    return found


def _first(classes: Any) -> Any:
    return classes[0] if isinstance(classes, (list, tuple)) else classes


class ExpertParallelModel(AsStored, GraphedGeneration):
    """What a model class gains; mixed in before it."""

    expert_parallel: ExpertParallel

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' own, between an empty model and its weights: the place where the model shrinks to this rank's part."""
        load = super(ExpertParallelModel, model)._load_pretrained_model  # type: ignore[misc]  # noqa: UP008 - a static method
        parallel: ExpertParallel = model.expert_parallel
        if parallel.installed:  # an adapter on top of a model that is there already
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        install_layers(model, parallel)
        if not parallel.installed:
            raise ConfigError(_no_layers(model, load_config.hf_quantizer))
        _keep_local_experts(model)
        if state_dict is None and not (checkpoint_files and checkpoint_files[0].endswith(".safetensors")):
            raise ConfigError(
                f"{load_config.pretrained_model_name_or_path} holds no safetensors, so that a rank would have to read all "
                "experts; save it anew with save_pretrained()"
            )
        stored = open_tensors(checkpoint_files) if state_dict is None else contextlib.nullcontext(state_dict)
        with stored as tensors:
            own, packed = _own(model, tensors, load_config)
            loaded = load(model, own, checkpoint_files, load_config, *args, **kwargs)
        for experts in packed:
            experts.put()
        lacking = sorted(loaded[0].missing_keys & parallel.shards(model).keys())
        if lacking:
            raise ConfigError(
                f"the checkpoint lacks the weights of {len(lacking)} expert parameters, such as {lacking[0]}; fetch it again, or "
                "save it anew from a whole model"
            )
        return loaded

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()` and the like. Once the workspace is open, a dtype or device of another kind is refused, and what the
        model keeps in float32 beside bfloat16, such as the correction of a router's scores, stays so in a cast to bfloat16."""
        if not self.expert_parallel.is_open:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        workspace = self.expert_parallel.workspace
        refuse_conversion(fn, self.expert_parallel.shape.hidden_dtype, workspace.device, type(self).__name__)

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            return converted if converted.dtype == tensor.dtype else tensor

        return super()._apply(keep_dtype, recurse)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; at its end, an error that another rank caused is raised and no tokens are returned.

        Raises:
            StateError: another thread is in the middle of a call on this model (see `serialize`); that one goes on.
            ShapeError: `attention_mask` has more than two dimensions.
        """
        check_dimensions(kwargs.get("attention_mask"))
        parallel = self.expert_parallel
        with parallel.thread.inside("generate"), self._call_with_graphs():
            try:
                generated = super().generate(*args, **kwargs)  # type: ignore[misc]
            except BaseException as error:
                parallel.settle_forward(error)
                raise
            parallel.settle_forward(None)
            parallel.check()
            return self._with_growing_cache(generated)

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the model's own, with batches of at most `max_tokens_per_rank` tokens. While its manager runs and has no request,
        the rank takes part in the other ranks' steps.

        Raises:
            CapacityError: the configuration asks for larger batches.
            ConfigError: it asks for CUDA graphs, and this model's forward cannot be captured.
        """
        config = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
        limit(config, self.expert_parallel)
        manager = super().init_continuous_batching(generation_config, config, *args, **kwargs)  # type: ignore[misc]
        return adopt(manager, self.expert_parallel)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, but an error in a forward is raised, not turned into fewer tokens."""
        parallel = self.expert_parallel
        with parallel.thread.hosting("generate_batch"):  # its forwards run in a thread that transformers starts
            parallel.note_swallowed(None)
            generated = super().generate_batch(*args, **kwargs)  # type: ignore[misc]
            parallel.raise_swallowed()
            parallel.check()
            return generated

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises StateError: this rank holds a part of the experts only."""
        raise StateError(
            "this rank holds only its own experts; save the model from a process that loads it with transformers alone"
        )


class _OwnClasses(Mapping[Any, Any]):
    """An Auto class's table of model classes, each with `ExpertParallelModel` before it."""

    def __init__(self, model_mapping: Mapping[Any, Any], expert_parallel: ExpertParallel) -> None:
        self._model_mapping, self._expert_parallel = model_mapping, expert_parallel

    def __getitem__(self, config_class: Any) -> Any:
        classes = self._model_mapping[config_class]
        return tuple(map(self._derive, classes)) if isinstance(classes, (list, tuple)) else self._derive(classes)

    def __contains__(self, config_class: object) -> bool:
        return config_class in self._model_mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._model_mapping)

    def __len__(self) -> int:
        return len(self._model_mapping)

    def _derive(self, model_class: type) -> type:
        # transformers reads the source of the class's module to learn what the class can do, and goes by its name
        namespace = {
            "expert_parallel": self._expert_parallel,
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "__doc__": model_class.__doc__,
        }
        return type(model_class.__name__, (ExpertParallelModel, model_class), namespace)


def _no_layers(model: Any, quantizer: Any) -> str:
    packed = (
        ""
        if quantizer is None
        else "; if its experts are packed, have them unpacked (`dequantize=True` in the quantization config)"
    )
    return (
        f"{type(model).__name__} has no MoE layer whose experts can be spread: none of its modules carries transformers' "
        f"@use_experts_implementation, and it is not Llama 4{packed}. Otherwise load it with transformers alone"
    )


def _own(model: Any, tensors: Mapping[str, Any], load_config: Any) -> tuple[dict[str, Any], list[LayerPacker]]:
    """What transformers is to load, and the packed experts that it is not to see."""
    parallel: ExpertParallel = model.expert_parallel
    layers, mapping, packed = parallel.installed, load_config.weight_mapping, list[LayerPacker]()
    if parallel.keeps_packed:
        serves, device = parallel.options.own_kernels, parallel.group.device
        shards = parallel.shards(model)
        tensors, packed = take_packed(model, layers, shards, tensors, mapping, owns_kernels=serves, device=device)
    is_quantized = load_config.hf_quantizer is not None and len(packed) < len(layers)
    return own_tensors(tensors, model, mapping, parallel.shards(model), is_quantized=is_quantized), packed


def _keep_local_experts(model: Any) -> None:
    """Has grouped_mm run under our name, which `generate()` leaves alone. Other choices of the user stay."""
    implementations = model.get_experts_implementation()
    if "grouped_mm" in implementations.values():
        model.set_experts_implementation(
            {key: LOCAL_EXPERTS if name == "grouped_mm" else name for key, name in implementations.items()}
        )
