"""A stand-in for the NVLink switch, for interpreted ranks."""

from tokenferry.transports.symmetric import transport as symmetric
from tokenferry.transports.symmetric.buffer import SymmetricBuffer


class WithSwitch(SymmetricBuffer):
    """A buffer whose own address stands for the multicast mapping: the interpreter stores to each rank of the group in turn."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.multicast_address = self.address


def install() -> None:
    """Symmetric transports that this process opens from now on have multicast."""
    symmetric.SymmetricBuffer = WithSwitch
