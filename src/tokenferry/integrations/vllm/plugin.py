"""What vLLM calls as it starts: the entry point `tokenferry` of the group `vllm.general_plugins`."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Final

from tokenferry import env
from tokenferry.errors import ConfigError
from tokenferry.integrations.vllm import reasons
from tokenferry.integrations.vllm.known_versions import ORIGINAL
from tokenferry.integrations.vllm.manager import manager_class
from tokenferry.integrations.vllm.on_import import when_imported
from tokenferry.integrations.vllm.settings import LOGGER

_log = logging.getLogger(LOGGER)

MODULE: Final = "vllm.distributed.device_communicators.all2all"
NAME: Final = "AgRsAll2AllManager"


def register() -> None:
    """Puts our manager in the place of `AgRsAll2AllManager`, which vLLM looks up when it makes its expert-parallel group.

    vLLM calls it in every process, several times in some. Whether tokenferry is on is decided when a manager is made, because
    vLLM has no configuration yet: switched off, vLLM gets objects of its own class. Nothing of vLLM is imported before vLLM does:
    that module looks for FlashInfer, whose import may touch CUDA, in processes that have no use for either.

    Raises:
        ConfigError: TOKENFERRY_VLLM=1, and this vLLM has no such class.
    """
    switch = env.read(env.VllmSettings).enabled
    if switch is False:
        return
    reasons.hand_down()
    when_imported(reasons.ERRORS, reasons.errors_name_reasons)
    when_imported(reasons.MANAGERS, reasons.managers_wait_for_reasons)
    when_imported(reasons.ENGINES, reasons.engines_wait_for_reasons)
    if not switch:
        when_imported(MODULE, _replace_if_there)
        return
    try:
        _replace(importlib.import_module(MODULE))
    except (ImportError, AttributeError) as problem:
        raise ConfigError(_missing(problem)) from problem


def _replace(module: ModuleType) -> None:
    original = getattr(module, NAME)
    if not hasattr(original, ORIGINAL):
        setattr(module, NAME, manager_class(original))


def _replace_if_there(module: ModuleType) -> None:
    try:
        _replace(module)
    except AttributeError as problem:
        _log.warning(_missing(problem))


def _missing(problem: Exception) -> str:
    return f"tokenferry cannot be switched on in this vLLM: {MODULE}.{NAME} is not there ({problem})"
