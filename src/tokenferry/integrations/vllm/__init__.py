"""tokenferry inside vLLM: a plug-in that carries the tokens of data-parallel ranks to their experts and back.

vLLM finds it by the entry point `tokenferry` of the group `vllm.general_plugins`, and it does nothing unless it is switched on:

    vllm serve MODEL --data-parallel-size 2 --enable-expert-parallel --additional-config '{"tokenferry": {}}' \\
        --worker-cls tokenferry.integrations.vllm.Worker

Importing this package does not import vLLM. docs/vllm.md says what runs and what does not.
"""

from __future__ import annotations

from typing import Any

from tokenferry.integrations.vllm.exchange import Exchange
from tokenferry.integrations.vllm.known_versions import KNOWN_VERSIONS, TRIED_VERSIONS
from tokenferry.integrations.vllm.settings import PluginSettings

__all__ = ["KNOWN_VERSIONS", "TRIED_VERSIONS", "Exchange", "PluginSettings", "Worker"]


def __getattr__(name: str) -> Any:
    """`Worker`, for `--worker-cls`: made when it is asked for, since it derives from vLLM's own worker of this platform."""
    if name == "Worker":
        from tokenferry.integrations.vllm.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
