"""Our worker for vLLM, whose rank 1 fails in the middle of a forward once the file that FAIL_FILE names says how."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from tokenferry.integrations.vllm.in_place import current_exchange
from tokenferry.integrations.vllm.worker import Worker as OurWorker


def fail(how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


class Worker(OurWorker):
    """For `--worker-cls`."""

    def init_device(self) -> None:
        super().init_device()
        exchange = current_exchange()
        assert exchange is not None
        original, file = exchange.combine, Path(os.environ["FAIL_FILE"])

        def combine(partial: Any) -> Any:
            if exchange._group.rank == 1 and file.exists():
                fail(file.read_text())
            return original(partial)

        exchange.combine = combine
