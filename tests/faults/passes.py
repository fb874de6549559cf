"""`python -m tests.faults.passes`: which edges the load comes by when nothing happens, and which it never does.

Two minutes. To be run after edges, or the code around them, were moved: one that nobody passes injects nothing."""

import signal
import sys
import time

from shared.cpu import share_cores
from tests.faults.inject import heal
from tests.faults.inject.base import send
from tests.faults.inside.fault_points import EDGES
from tests.faults.journal import Journal
from tests.faults.load import Load
from tests.faults.world import World

SECONDS = 20.0
# Only after a fault, or seldom: a lease that lapsed, a heartbeat within the short life of an evaluation.
SELDOM = {("renew", "worker-evaluate"), ("store_read", "api")}
SELDOM |= {(edge, "reconciler") for edge in ("lapse_commit", "commit_enqueue", "enqueue_answer")}


def main() -> int:
    share_cores()
    with World() as world:
        for edge in EDGES.values():
            for process in edge.processes:
                world.edges.arm(edge.name, process, "sleep:0")
        load = Load(world, Journal(world.folder / "journal-passes.jsonl"), 1, SECONDS, SECONDS)
        for process in EDGES["poke"].processes:
            send(world.pid(process), signal.SIGUSR2)
        time.sleep(SECONDS)
        load.join()
        heal(world)
        missed = {(armed.edge, armed.process or "") for armed in world.edges.unfired()}
    for name, process in sorted(missed):
        print(f"not passed: {name} by {process}{' (seldom is)' if (name, process) in SELDOM else ''}")
    print(f"{sum(len(edge.processes) for edge in EDGES.values()) - len(missed)} passed, {len(missed)} not")
    return 1 if missed - SELDOM else 0


if __name__ == "__main__":
    sys.exit(main())
