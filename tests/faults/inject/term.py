"""SIGTERM: what an operator, a deployment or a shutdown sends. Once, a process gives its job back and leaves; twice, it
leaves at once."""

import random
import signal
from typing import TYPE_CHECKING

from tests.faults.inject.base import PROCESSES, End, Fault, nothing, send

if TYPE_CHECKING:
    from tests.faults.world import World


def once(name: str) -> Fault:
    def begin(world: "World", rng: random.Random) -> End:
        send(world.pid(name), signal.SIGTERM)
        return nothing

    return Fault(f"term_{name.replace('-', '_')}", "term", (0, 0), begin)


def twice(name: str) -> Fault:
    """The second after more than a second: RQ takes an earlier one for an echo of the first."""

    def begin(world: "World", rng: random.Random) -> End:
        pid = world.pid(name)
        send(pid, signal.SIGTERM)

        def end() -> None:
            if world.pid(name) == pid:
                send(pid, signal.SIGTERM)

        return end

    return Fault(f"term_twice_{name.replace('-', '_')}", "term", (1.1, 2.0), begin)


FAULTS = [*(once(name) for name in PROCESSES), *(twice(name) for name in PROCESSES)]
