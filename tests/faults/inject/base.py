"""What a fault is. The driver draws one from `inject.FAULTS`, calls `begin`, waits, and calls what that returned."""

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.world import World

End = Callable[[], None]

#: The stack's own processes, by the supervisor's names.
WORKERS = ("worker-ingest", "worker-caption", "worker-fine_tune", "worker-evaluate")
PROCESSES = ("api", *WORKERS, "reconciler", "collector")


@dataclass(frozen=True)
class Fault:
    """seconds: how long it lasts, at random within; (0, 0) for a moment. begin: makes it happen and returns what ends
    it, which may be called twice."""

    name: str
    group: str  # kill | edge | term | freeze | redis | postgres | storage | duplicate | clock | model_server
    seconds: tuple[float, float]
    begin: Callable[["World", random.Random], End]


def nothing() -> None:
    """The end of a fault that lasts a moment."""


def send(pid: int | None, number: signal.Signals) -> None:
    """Signals a process that may have ended by itself meanwhile."""
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
