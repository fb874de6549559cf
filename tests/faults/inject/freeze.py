"""SIGSTOP, then SIGCONT: to the others the process is there, its connections are open, and it says nothing. A worker
frozen past its lease must find itself fenced off when it wakes; a frozen server is a black hole."""

import random
import signal
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from services.embedded.cluster import PROGRAMS
from services.embedded.processes import in_session, running_in
from tests.faults.inject.base import PROCESSES, End, Fault, send

if TYPE_CHECKING:
    from tests.faults.world import World


def freeze(name: str, find: Callable[["World"], Collection[int]]) -> Fault:
    """`find`: the processes, asked again until it names none that still run: a server forks meanwhile."""

    def begin(world: "World", rng: random.Random) -> End:
        stopped: set[int] = set()
        while new := set(find(world)) - stopped:
            for pid in new:
                send(pid, signal.SIGSTOP)
            stopped |= new

        def end() -> None:
            for pid in stopped:
                send(pid, signal.SIGCONT)

        return end

    return Fault(f"freeze_{name.replace('-', '_')}", "freeze", (3.0, 7.0), begin)


def _of(name: str) -> Callable[["World"], Collection[int]]:
    """With what it started, as a machine that sleeps would."""

    def find(world: "World") -> Collection[int]:
        pid = world.pid(name)
        return () if pid is None else {pid} | in_session(pid)

    return find


def postgres(world: "World") -> Collection[int]:
    """The server and its backends, each of which is in a session of its own."""
    return running_in(world.state_dir / "postgres", PROGRAMS)


def wake_all(world: "World") -> None:
    """Nothing of the stack stays frozen, whoever froze it."""
    for name in (*PROCESSES, "valkey"):
        for pid in _of(name)(world):
            send(pid, signal.SIGCONT)
    for pid in postgres(world):
        send(pid, signal.SIGCONT)


FAULTS = [
    *(freeze(name, _of(name)) for name in PROCESSES),
    freeze("postgres", postgres),
    freeze("valkey", _of("valkey")),
]
