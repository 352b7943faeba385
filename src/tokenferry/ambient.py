"""What the code around a call may have set in torch, and what must not reach the tensors that outlive the call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator: `torch.compile` does not trace the function, but calls it as it is, between two graphs. With `fullgraph=True` it
    raises, as for `torch.compiler.disable`.

    `torch.compiler.disable` does that, but imports the whole compiler where it is mentioned: for it `import tokenferry.layer`
    took 2.3 s after torch's own import, and 0.2 s without (2 cores, torch 2.13, 2026-11-26). PyTorch marks its own functions with
    `torch._disable_dynamo`, which imports the compiler at the first call; here that is the first call from compiled code. When a
    list of our own kept what `disable` had returned, a guard on the list failed at the second call, which was compiled again.
    """
    mark: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)  # not public: a release without it imports at once
    within_compiled: Callable[_P, _T] = mark(function)

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return within_compiled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return called


@contextlib.contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Within it torch behaves as in a fresh thread, whatever surrounds the call: no inference mode, no gradients, no default
    device (nor any other torch-function mode), no autocast for the CPU and for `device`.

    A workspace that was opened in `torch.inference_mode()` could not write its counts outside of it; one that was opened under
    `torch.device("meta")`, as transformers loads models, could not fill its control block.

    The default dtype and the deterministic algorithms belong to the whole process, so that putting them aside here would change
    them for other threads. They do no harm instead: every tensor that is made in this package names its dtype (a test reads
    the sources), and nothing that runs at opening lacks a deterministic form. Nor does it matter what
    `torch.utils.deterministic.fill_uninitialized_memory` writes, since no memory is read before it is written.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
