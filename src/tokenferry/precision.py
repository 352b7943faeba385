"""What a module keeps, whatever it is cast to: tensors of a promised precision, and the dtype and device of an open workspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tokenferry.errors import DeviceError, DtypeError


class KeepsPrecision(nn.Module):
    """Casts (`.to(dtype)`, `.half()`, a parent's `.bfloat16()`) leave the tensors that `kept_dtypes` names as they are, bit for
    bit; moves to a device take them along. Loading converts to the kept dtype, with `assign=True` too.

    A correction bias rounded to bfloat16 sent half of all rows to other experts, without a word.
    """

    def kept_dtypes(self) -> Mapping[str, torch.dtype]:
        """By name, for this module's own parameters and buffers; those that are None do not count."""
        raise NotImplementedError

    def _kept(self) -> dict[str, torch.Tensor]:
        """What must not change now. Detached: a cast of a parameter changes the tensor object itself."""
        own = {**self._parameters, **self._buffers}
        return {name: own[name].detach() for name in self.kept_dtypes() if own.get(name) is not None}  # type: ignore[union-attr]

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._parameters:
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self._buffers[name] = tensor

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = self._kept()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, now in self._kept().items():
            if now.dtype != before[name].dtype:
                self._put(name, before[name].to(now.device))
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        kept = self.kept_dtypes()
        for name, dtype in kept.items():
            given = state_dict.get(prefix + name)
            if dtype.itemsize == 1 and given is not None and given.dtype != dtype:
                raise DtypeError(f"{name} is {dtype} here but {given.dtype} in the state; load before quantize()")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, now in self._kept().items():
            if now.dtype != kept[name]:
                self._put(name, now.to(kept[name]))


def refuse_conversion(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device, what: str) -> None:
    """For the `_apply` of modules that stand on a workspace: raises before any tensor is converted.

    A model cast after its workspace was opened failed in the middle of a forward, with the peers waiting.

    Args:
        fn: what `_apply` was given.
        dtype, device: the workspace's.
        what: the module, for the message.

    Raises:
        DtypeError, DeviceError: `fn` would change either.
    """
    probe = fn(torch.empty(0, dtype=dtype, device=device))
    if probe.dtype != dtype:
        raise DtypeError(
            f"{what} cannot become {probe.dtype}: its workspace was opened for {dtype}; convert it before, or open another "
            f"with dtype={probe.dtype}"
        )
    if probe.device != device:
        raise DeviceError(f"{what} cannot move to {probe.device}: its workspace was opened on {device}; move it before")
