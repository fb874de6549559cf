"""SIGKILL, at any time: no process of the stack gets to say a word."""

import random
import signal
from typing import TYPE_CHECKING

from services.embedded.processes import in_session
from tests.faults.inject.base import PROCESSES, WORKERS, End, Fault, nothing, send

if TYPE_CHECKING:
    from tests.faults.world import World


def kill(name: str) -> Fault:
    def begin(world: "World", rng: random.Random) -> End:
        send(world.pid(name), signal.SIGKILL)
        return nothing

    return Fault(f"kill_{name.replace('-', '_')}", "kill", (0, 0), begin)


def work_horses(world: "World") -> list[int]:
    """What the workers started themselves: ranks of a training, processes that decode."""
    workers = [pid for name in WORKERS if (pid := world.pid(name)) is not None]
    return [child for pid in workers for child in sorted(in_session(pid) - {pid})]


def _kill_a_work_horse(world: "World", rng: random.Random) -> End:
    """A worker itself where none has started anything: its own process is the work-horse then."""
    horses = work_horses(world) or [pid for name in WORKERS if (pid := world.pid(name)) is not None]
    if horses:
        send(rng.choice(horses), signal.SIGKILL)
    return nothing


def _kill_every_worker(world: "World", rng: random.Random) -> End:
    for name in WORKERS:
        send(world.pid(name), signal.SIGKILL)
    return nothing


FAULTS = [
    *(kill(name) for name in PROCESSES),
    Fault("kill_work_horse", "kill", (0, 0), _kill_a_work_horse),
    Fault("kill_all_workers", "kill", (0, 0), _kill_every_worker),
]
