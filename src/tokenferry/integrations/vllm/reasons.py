"""Why a server's engine died, for the answers of its API servers: vLLM's own text points to the log.

A rank that is told of a peer's failure leaves one line in a file of the machine's folder for temporary files, whose name all
processes of a server inherit in an environment variable. What an API server raises afterwards has that line too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from tokenferry import env
from tokenferry.errors import ConfigError
from tokenferry.integrations.vllm.settings import settings_from

ERRORS: Final = "vllm.v1.engine.exceptions"
MANAGERS: Final = "vllm.v1.engine.utils"
ENGINES: Final = "vllm.v1.engine.core"

PATIENCE_S: Final = 2.0
"""How long the other ranks may take to find out that one has failed, before vLLM ends them or answers."""

_POLL_S: Final = 0.05
_MARK: Final = "has_reasons_of_tokenferry"


def hand_down() -> None:
    """Names the file, in the first process of a server, which removes it when it ends. Children inherit the name."""
    if env.read(env.VllmSettings).reason_file is None:
        name = Path(tempfile.gettempdir()) / f"tokenferry-{secrets.token_hex(16)}"
        env.hand_down_vllm_reason_file(str(name))
        atexit.register(_remove, name, os.getpid())


def tell(reason: str) -> None:
    """Leaves the reason, if it is the first one. It never fails: the caller has an error of its own to raise."""
    name = env.read(env.VllmSettings).reason_file
    if name is None:
        return
    with contextlib.suppress(OSError):
        place = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(place, "w") as file:
            file.write(f"tokenferry: {reason}")


def told() -> str | None:
    """The first reason that a rank of this server has left."""
    name = env.read(env.VllmSettings).reason_file
    if name is None:
        return None
    try:
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            return file.read(4096) or None if os.fstat(file.fileno()).st_uid == os.getuid() else None
    except OSError:
        return None


def forget() -> None:
    """Removes the reason, if there is one."""
    name = env.read(env.VllmSettings).reason_file
    if name is not None:
        with contextlib.suppress(OSError):
            os.unlink(name)


def errors_name_reasons(module: ModuleType) -> None:
    """vLLM's `EngineDeadError` says why, from now on, once a rank has left a reason."""
    found = getattr(module, "EngineDeadError", None)
    if found is not None and not hasattr(found.__init__, _MARK):
        found.__init__ = with_reason(found.__init__)


def with_reason(original: Callable[..., None]) -> Callable[..., None]:
    """The constructor of an exception whose text is its first argument."""

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        reason = told()
        if reason is not None and self.args:
            self.args = (f"{self.args[0]} {reason}", *self.args[1:])

    setattr(initialise, _MARK, True)
    return initialise


def managers_wait_for_reasons(module: ModuleType) -> None:
    """vLLM's manager of engine processes leaves the ranks that are left a moment to name the one whose process died."""
    found = getattr(module, "CoreEngineProcManager", None)
    if found is not None and not hasattr(found.shutdown, _MARK):
        found.__init__ = with_switch(found.__init__)
        found.shutdown = with_patience(found.shutdown, lambda manager: getattr(manager, "failed_proc_name", None))


def engines_wait_for_reasons(module: ModuleType) -> None:
    """An engine that ends with an error, its worker's death perhaps, lets the other ranks name the rank before it says so."""
    found = getattr(module, "EngineCoreProc", None)
    if found is not None and hasattr(found, "_send_engine_dead") and not hasattr(found._send_engine_dead, _MARK):
        found._send_engine_dead = with_patience(found._send_engine_dead, _name_of_engine)


def with_switch(original: Callable[..., None]) -> Callable[..., None]:
    """A constructor that gets a `vllm_config`, which is kept: whether tokenferry is on stands there. Reasons of engines that this
    process had before are forgotten."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        self.vllm_config = signature.bind(self, *args, **kwargs).arguments.get("vllm_config")
        forget()
        original(self, *args, **kwargs)

    return initialise


def with_patience(original: Callable[..., None], who: Callable[[Any], str | None]) -> Callable[..., None]:
    """A method that waits for a reason first, where tokenferry is on; if none comes, it leaves what has failed, as `who` says.
    Where that says None nothing has failed."""

    @functools.wraps(original)
    def patient(self: Any, *args: Any, **kwargs: Any) -> None:
        failed = who(self)
        if failed is not None and _is_on(self):
            deadline_s = time.monotonic() + PATIENCE_S
            while told() is None and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            tell(f"{failed} ended unexpectedly")
        original(self, *args, **kwargs)

    setattr(patient, _MARK, True)
    return patient


def _name_of_engine(engine: Any) -> str:
    return f"EngineCore_DP{getattr(engine, 'engine_index', 0)}"


def _is_on(owner: Any) -> bool:
    config = getattr(owner, "vllm_config", None)
    try:
        return config is not None and settings_from(config.additional_config) is not None
    except ConfigError:  # why the ranks ended; raised here too, vLLM would not end the processes that are left
        return False


def _remove(name: Path, owner: int) -> None:
    if os.getpid() == owner:
        name.unlink(missing_ok=True)
