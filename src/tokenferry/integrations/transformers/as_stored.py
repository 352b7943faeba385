"""What a checkpoint's numbers are stored as, where transformers' own reading of that would stop.

It takes a quantization in a configuration for a dictionary, while a loaded model's configuration, and one that a caller has
written, may hold an object. And it looks for `dtype="auto"` in the first file alone, which of a packed checkpoint may hold
nothing but integers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import torch

from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers.checkpoint import num_bytes_of_dtypes
from tokenferry.integrations.transformers.expert_parallel import ExpertParallel
from tokenferry.integrations.transformers.packed_experts import is_for_packed, stays_packed, unpacking

_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a model can be loaded in, by safetensors' names."""
_NAME: Final = "quantization_config"


class AsStored:
    """What a model class gains, mixed in before it."""

    expert_parallel: ExpertParallel

    @classmethod
    def from_pretrained(cls, path_or_id: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. It is told to make bfloat16 of packed experts, which needs no kernels, and then never sees them:
        see `take_packed`.

        Raises:
            ConfigError: `dtype` is none that a model can be loaded in, or none was found.
        """
        config = kwargs["config"] = with_dictionaries(kwargs.get("config"))
        stored, given = getattr(config, _NAME, None), kwargs.get(_NAME)
        cls.expert_parallel.keeps_packed = stays_packed(stored, given)
        if is_for_packed(given):  # transformers takes no dictionary beside a stored one
            kwargs |= unpacking(stored)
        load = super().from_pretrained  # type: ignore[misc]
        try:
            return load(path_or_id, *args, **kwargs)
        except _NoDtypeError as error:
            if kwargs.get("dtype") != "auto":
                raise ConfigError(f"dtype must be one of {', '.join(map(str, _DTYPES.values()))}; got {error.found}") from None
            kwargs["dtype"] = _dtype_of_files(path_or_id, kwargs.get("subfolder"), error.found)
        return load(path_or_id, *args, **kwargs)

    @classmethod
    def get_init_context(cls, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. The first thing that it does with a dtype which it has found."""
        if dtype not in _DTYPES.values():
            raise _NoDtypeError(dtype)
        return super().get_init_context(dtype, *args, **kwargs)  # type: ignore[misc]


def with_dictionaries(config: Any) -> Any:
    """A configuration whose quantization is a dictionary: `config` itself, or a copy of one that holds an object."""
    if all(not hasattr(getattr(part, _NAME, None), "to_dict") for part in _parts(config)):
        return config
    copied = copy.deepcopy(config)
    for part in _parts(copied):
        held: Any = getattr(part, _NAME, None)
        if hasattr(held, "to_dict"):
            # `Mxfp4Config.to_dict` leaves out what it was told of unpacking
            wish = {"dequantize": held.dequantize} if hasattr(held, "dequantize") else {}
            setattr(part, _NAME, {**held.to_dict(), **wish})
    return copied


def _parts(config: Any) -> list[Any]:
    """A configuration, and that of its text model, each of which may have a quantization."""
    return [config, config.get_text_config(decoder=True)] if hasattr(config, "get_text_config") else [config]


class _NoDtypeError(Exception):
    def __init__(self, found: Any) -> None:
        super().__init__(found)
        self.found = found


def _dtype_of_files(path_or_id: Any, subfolder: str | None, found: Any) -> torch.dtype:
    """The dtype, of those that a model can be loaded in, of which a checkpoint holds most."""
    sizes = num_bytes_of_dtypes(Path(path_or_id, subfolder or ""))
    stored = {name: size for name, size in sizes.items() if name in _DTYPES}
    if not stored:
        raise ConfigError(
            f'dtype is "auto", but config.json names no dtype, and the first file of the checkpoint {path_or_id} holds {found} '
            "alone, in which no model can be loaded; give the dtype, for packed experts dtype=torch.bfloat16"
        )
    return _DTYPES[max(stored, key=stored.__getitem__)]
