"""What NVIDIA's management library tells of a GPU's links: its NVLinks, and the driver. It only asks; nothing is set.

The library comes with the driver. Where it is not there, or does not know a question, the answer is None or 0.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

LIBRARY: Final = "libnvidia-ml.so.1"
MOST_LINKS: Final = 18
"""Of one GPU, on Hopper and Blackwell. Of older ones that have fewer, the others answer that they are not there."""
SWITCH: Final = 2
"""The library's number for an NVSwitch at the other end."""
GENERATIONS: Final = (0, 1, 2, 2, 3, 3, 4, 5, 6)
"""Of NVLink, by the library's number for a link's version: 6 stands for NVLink 4.0, and 2.2 and 3.1 have numbers of their own."""
SUCCESS: Final = 0


@dataclass(frozen=True, kw_only=True)
class Links:
    """The NVLinks of one GPU.

    Attributes:
        num_active: links that are up.
        version: of the links, 4 on Hopper; 0 if unknown.
        to_switch: whether an NVSwitch is at the other end of one.
    """

    num_active: int
    version: int
    to_switch: bool

    def __str__(self) -> str:
        if not self.num_active:
            return "no NVLink"
        generation = f"NVLink {self.version}" if self.version else "NVLink"
        return f"{self.num_active} x {generation}{', NVSwitch' if self.to_switch else ''}"


class ManagementLibrary:
    """The library, for as long as the block lasts. `library` stands in its place in tests; None: it is not to be had."""

    def __init__(self, library: Any = None) -> None:
        self._library = library

    def __enter__(self) -> ManagementLibrary:
        if self._library is None:
            try:
                self._library = ctypes.CDLL(LIBRARY)
            except OSError:  # no driver
                return self
        if self._library.nvmlInit_v2() != SUCCESS:
            self._library = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()

    def driver_version(self) -> str | None:
        """Of the driver."""
        text = ctypes.create_string_buffer(96)
        return text.value.decode() if self._ask("nvmlSystemGetDriverVersion", text, 96) else None

    def links(self, uuid: str) -> Links | None:
        """Of the GPU with this UUID, "GPU-..." as the driver writes it. None if they cannot be looked at."""
        device = ctypes.c_void_p()
        if not self._ask("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(device)):
            return None
        active = [link for link in range(MOST_LINKS) if self._number("nvmlDeviceGetNvLinkState", device, link)]
        ends = [self._number("nvmlDeviceGetNvLinkRemoteDeviceType", device, link) for link in active]
        number = max((self._number("nvmlDeviceGetNvLinkVersion", device, link) for link in active), default=0)
        generation = GENERATIONS[number] if number < len(GENERATIONS) else 0
        return Links(num_active=len(active), version=generation, to_switch=SWITCH in ends)

    def _number(self, question: str, device: ctypes.c_void_p, link: int) -> int:
        answer = ctypes.c_uint(0)
        return int(answer.value) if self._ask(question, device, ctypes.c_uint(link), ctypes.byref(answer)) else 0

    def _ask(self, question: str, *arguments: Any) -> bool:
        function = getattr(self._library, question, None)
        return function is not None and function(*arguments) == SUCCESS
