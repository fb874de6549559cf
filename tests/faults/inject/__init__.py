"""Every fault by its name. A new one is a function and a line in its group's file.

base.py          what a fault is
edges.py         at named places in the product's code, set by ../inside
kill.py          SIGKILL
term.py          SIGTERM, once and twice
freeze.py        SIGSTOP, SIGCONT
redis.py         gone, forgetful, full, silent
postgres.py      crashed, restarted, hanging up, locked, refusing
storage.py       full, read-only, slow, torn, collected
duplicate.py     wake-ups repeated, misdirected, forged
clock.py         the wall clock set back or ahead
model_server.py  429, 500, hanging, garbage
"""

from typing import TYPE_CHECKING

from tests.faults.inject import clock, duplicate, edges, freeze, kill, model_server, postgres, redis, storage, term
from tests.faults.inject.base import Fault

if TYPE_CHECKING:
    from tests.faults.world import World

_GROUPS = (kill, edges, term, freeze, redis, postgres, storage, duplicate, clock, model_server)

FAULTS: dict[str, Fault] = {fault.name: fault for group in _GROUPS for fault in group.FAULTS}


def heal(world: "World") -> None:
    """Ends every fault that can last, whoever began it. What died is started again by the stack."""
    world.edges.disarm_all()
    freeze.wake_all(world)
    redis.empty(world, redis.PATIENTLY)
    postgres.stop_raising(world, redis.PATIENTLY)
    world.models.start()
    world.models.behave(None)
