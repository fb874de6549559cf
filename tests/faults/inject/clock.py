"""The wall clock of one process, an hour back or ahead: a virtual machine that was moved, a time server that was wrong.
Leases are PostgreSQL's own time and the work's pace is measured monotonically, so nothing may depend on it."""

import random
import signal
from typing import TYPE_CHECKING

from tests.faults.inject.base import PROCESSES, End, Fault, send

if TYPE_CHECKING:
    from tests.faults.world import World

HOUR = 3600


def set_clock(world: "World", name: str, seconds: float) -> None:
    """The process's clock is `seconds` off the true one, until it is set again or the process ends."""
    world.edges.arm("poke", name, f"clock:{seconds}")
    send(world.pid(name), signal.SIGUSR2)


def shift(name: str, seconds: float, word: str) -> Fault:
    def begin(world: "World", rng: random.Random) -> End:
        set_clock(world, name, seconds)
        return lambda: set_clock(world, name, 0)

    return Fault(f"clock_{word}_{name.replace('-', '_')}", "clock", (1.0, 6.0), begin)


FAULTS = [shift(name, sign * HOUR, word) for name in PROCESSES for sign, word in ((-1, "back"), (1, "ahead"))]
