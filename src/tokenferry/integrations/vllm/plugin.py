"""What vLLM calls as it starts: the entry point `tokenferry` of the group `vllm.general_plugins`."""

from __future__ import annotations

import importlib
import logging
from typing import Final

from tokenferry import env
from tokenferry.errors import ConfigError
from tokenferry.integrations.vllm.manager import ORIGINAL, manager_class
from tokenferry.integrations.vllm.settings import LOGGER

_log = logging.getLogger(LOGGER)

MODULE: Final = "vllm.distributed.device_communicators.all2all"
NAME: Final = "AgRsAll2AllManager"


def register() -> None:
    """Puts our manager in the place of `AgRsAll2AllManager`, which vLLM looks up when it makes its expert-parallel group.

    vLLM calls it in every process, several times in some. Whether tokenferry is on is decided when a manager is made, because
    vLLM has no configuration yet: switched off, vLLM gets objects of its own class.

    Raises:
        ConfigError: TOKENFERRY_VLLM=1, and this vLLM has no such class.
    """
    switch = env.read(env.VllmSettings).enabled
    if switch is False:
        return
    try:
        module = importlib.import_module(MODULE)
        original = getattr(module, NAME)
    except (ImportError, AttributeError) as problem:
        text = f"tokenferry cannot be switched on in this vLLM: {MODULE}.{NAME} is not there ({problem})"
        if switch:
            raise ConfigError(text) from problem
        _log.debug(text)
        return
    if not hasattr(original, ORIGINAL):
        setattr(module, NAME, manager_class(original))
