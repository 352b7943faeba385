"""A stand-in for the NVLink switch, for interpreted ranks."""

from typing import Any

from tokenferry.transports.base import StepTensors, Transport, TransportSettings
from tokenferry.transports.symmetric import transport as symmetric
from tokenferry.transports.symmetric.buffer import SymmetricBuffer


class WithSwitch(SymmetricBuffer):
    """A buffer whose own address stands for the multicast mapping: the interpreter stores to each rank of the group in turn."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.multicast_address = self.address


def transport(name: str) -> "str | Nvls":
    """What `Workspace(transport=...)` takes for a case that names a transport."""
    return Nvls() if name == "nvls" else name


class Nvls:
    """For `Workspace(transport=...)`: `nvls` over such a switch."""

    name = "nvls"

    def open(self, settings: TransportSettings, step_tensors: StepTensors) -> Transport:
        return opened(settings, step_tensors, multicast=True)


def opened(settings: TransportSettings, step_tensors: StepTensors, *, multicast: bool, **cut: Any) -> Transport:
    """A symmetric transport, with such a switch if it multicasts."""
    if not multicast:
        return symmetric.SymmetricTransport(settings, step_tensors, **cut)
    before, symmetric.SymmetricBuffer = symmetric.SymmetricBuffer, WithSwitch
    try:
        return symmetric.SymmetricTransport(settings, step_tensors, multicast=True, **cut)
    finally:
        symmetric.SymmetricBuffer = before
