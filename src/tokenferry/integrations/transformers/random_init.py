"""Random weights that are made where they are needed: a parameter when it is read, an expert on the rank that holds it.

What a number is follows from the seed, the parameter's name and the expert alone: so ranks agree on what they share, and a model
has the same weights on any number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from tokenferry.errors import ConfigError
from tokenferry.experts import mxfp4
from tokenferry.integrations.transformers.packed_experts import is_packed

_STORED_AS: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
"""Names of dtypes in safetensors."""


class RandomTensor:
    """Stands in for a slice of a safetensors file: its numbers are made when it is indexed.

    Args:
        key: the parameter's name.
        shape: of the whole parameter.
        by_rows: each row of dimension 0 is an expert with random numbers of its own, and only those asked for are made.
        seed, std: of the numbers, which are normal around 0; norms are 1, and biases 0. Packed weights take each code of MXFP4
            equally often, and a scale with which they are nearest to that size.
    """

    def __init__(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, by_rows: bool, seed: int, std: float
    ) -> None:
        self._key, self._shape, self._by_rows, self._seed, self._std = key, tuple(shape), by_rows, seed, std
        self.dtype, self.device = dtype, device

    def __getitem__(self, index: Any) -> torch.Tensor:
        if not self._by_rows:
            return self._made(self._shape, 0)[index]
        first, *rest = index if isinstance(index, tuple) else (index,)
        rows = range(*(slice(None) if first is Ellipsis else first).indices(self._shape[0]))
        made = torch.empty((len(rows), *self._shape[1:]), dtype=self.dtype, device=self.device)
        for place, row in enumerate(rows):
            made[place] = self._made(self._shape[1:], row)
        return made[(slice(None), *rest)] if rest else made

    def _made(self, shape: tuple[int, ...], row: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        if self._key.endswith("_scales"):
            return made.fill_(_scale_of(self._std))
        if len(self._shape) == 1 and self._key.endswith("weight"):
            return made.fill_(1)  # of a norm
        if self._key.endswith("bias"):
            return made.zero_()
        digest = hashlib.sha256(f"{self._seed}/{self._key}/{row}".encode()).digest()
        generator = torch.Generator(device=self.device).manual_seed(int.from_bytes(digest[:6], "big"))
        if self._key.endswith("_blocks"):
            return made.random_(0, 256, generator=generator)
        return made.normal_(0, self._std, generator=generator)

    def get_shape(self) -> list[int]:
        """As `safetensors` spells it."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Likewise."""
        return _STORED_AS[self.dtype]

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        return torch.Size(self._shape)

    @property
    def ndim(self) -> int:
        """Likewise."""
        return len(self._shape)

    def dim(self) -> int:
        """Likewise."""
        return len(self._shape)

    def numel(self) -> int:
        """Likewise."""
        return math.prod(self._shape)

    def is_floating_point(self) -> bool:
        """Likewise."""
        return self.dtype != torch.uint8


def random_state(
    model_class: Any, config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Mapping[str, RandomTensor]:
    """What a checkpoint of such a model would hold, by the names of its parameters. Takes no memory before it is read.

    Experts of a configuration whose quantization is MXFP4 are packed, as gpt-oss's are.

    Raises:
        ConfigError: a dtype that no checkpoint has, or experts whose rows cannot be packed.
    """
    if dtype not in _STORED_AS or not dtype.is_floating_point:
        floating = ", ".join(str(each) for each in _STORED_AS if each.is_floating_point)
        raise ConfigError(f"random weights are {floating}, got {dtype}")
    with torch.device("meta"):
        model = model_class(config)
    counts = {name: int(module.num_experts) for name, module in model.named_modules() if _is_count(module)}
    std = float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)

    def is_of_experts(name: str, tensor: torch.Tensor) -> bool:
        return tensor.dim() > 1 and counts.get(name.rpartition(".")[0]) == tensor.shape[0]

    shapes = {name: (tensor.shape, dtype) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    of_experts = {name for name, tensor in model.state_dict().items() if is_of_experts(name, tensor)}
    if is_packed(getattr(config, "quantization_config", None)):
        for name in [name for name in of_experts if len(shapes[name][0]) == 3]:
            shapes |= _packed(name, shapes.pop(name)[0])
    return {
        name: RandomTensor(name, shape, kind, device, by_rows=_matrix(name) in of_experts, seed=seed, std=std)
        for name, (shape, kind) in shapes.items()
    }


def _packed(name: str, shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The blocks and scales of gpt-oss's transposed matrices."""
    num_experts, columns, rows = shape
    if columns % mxfp4.GROUP:
        raise ConfigError(f"{name} cannot be packed: its {columns} columns are no multiple of {mxfp4.GROUP}; change the sizes")
    groups = torch.Size((num_experts, rows, columns // mxfp4.GROUP))
    return {
        f"{name}_blocks": (torch.Size((*groups, mxfp4.GROUP // 2)), torch.uint8),
        f"{name}_scales": (groups, torch.uint8),
    }


def _matrix(name: str) -> str:
    """The parameter that packed tensors stand for; other names stay."""
    return name.removesuffix("_blocks").removesuffix("_scales")


def _scale_of(std: float) -> int:
    """The scale byte with which codes of MXFP4, all equally often, are nearest to this size."""
    of_codes = math.sqrt(sum(magnitude**2 for magnitude in mxfp4.MAGNITUDES) / len(mxfp4.MAGNITUDES))
    return min(max(round(math.log2(std / of_codes)) + 127, 0), mxfp4.MAX_SCALE)


def _is_count(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "num_experts", None), int)
