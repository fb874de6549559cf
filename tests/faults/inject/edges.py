"""Arms the named edges (inside/fault_points.py) of a stack's processes and tells which fired.

An edge is armed by a file in the folder that `environment()` names to the processes; the first process that passes it
takes the file by renaming it, says so in fired.log, and does as the file says. A lasting one stays until it is
disarmed, and everyone who passes does as it says."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from tests.faults.inject.base import End, Fault
from tests.faults.inside.fault_points import DIRECTORY, EDGES, Edge

if TYPE_CHECKING:
    from tests.faults.world import World

INSIDE = Path(__file__).parents[1] / "inside"


@dataclass(frozen=True)
class Armed:
    """process: None for whichever passes first. after: how often a process goes by before it fires there."""

    id: str
    edge: str
    process: str | None
    action: str
    after: int
    lasting: bool


@dataclass(frozen=True)
class Fired:
    id: str
    edge: str
    process: str
    pid: int
    action: str
    at: float  # time.time()


class Edges:
    """directory: of this stack alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.armed: list[Armed] = []  # every one, fired or not, in order

    def environment(self) -> dict[str, str]:
        """For the stack: `Stack(state_dir, env=edges.environment())`."""
        before = os.environ.get("PYTHONPATH")
        root = str(INSIDE.parents[2])  # of the project, where it is not installed
        path = [str(INSIDE), *([before] if before else []), root]
        return {DIRECTORY: str(self.directory), "PYTHONPATH": os.pathsep.join(path)}

    def arm(
        self, edge: str, process: str | None = None, action: str = "kill", after: int = 0, lasting: bool = False
    ) -> Armed:
        """One at a time for each edge and process: a later one takes the place of one that did not fire.
        action: see `fault_points.act`."""
        if edge not in EDGES:
            raise ValueError(f"no edge {edge!r}; there are {', '.join(EDGES)}")
        armed = Armed(uuid4().hex, edge, process, action, after, lasting)
        self.armed.append(armed)
        path = self._path(armed)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps({"id": armed.id, "action": action, "after": after, "lasting": lasting}))
        temporary.rename(path)
        return armed

    def disarm(self, armed: Armed) -> None:
        """If it has not fired and no other took its place."""
        try:
            if json.loads(self._path(armed).read_text())["id"] == armed.id:
                self._path(armed).unlink()
        except FileNotFoundError:
            pass

    def disarm_all(self) -> None:
        for path in self.directory.glob("*.armed"):
            path.unlink(missing_ok=True)

    def fired(self) -> list[Fired]:
        """In order of time."""
        try:
            lines = (self.directory / "fired.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [Fired(**json.loads(line)) for line in lines]

    def unfired(self) -> list[Armed]:
        """Armed, and passed by nobody (yet)."""
        done = {fired.id for fired in self.fired()}
        return [armed for armed in self.armed if armed.id not in done]

    def _path(self, armed: Armed) -> Path:
        suffix = "" if armed.process is None else f"@{armed.process}"
        return self.directory / f"{armed.edge}{suffix}.armed"


def at_edge(edge: Edge, action: str, group: str = "edge", *, most_after: int = 0, name: str | None = None) -> Fault:
    """Fires once at some process that passes the edge; disarmed at the end if none did."""

    def begin(world: "World", rng: random.Random) -> End:
        armed = world.edges.arm(edge.name, rng.choice(edge.processes), action, rng.randint(0, most_after))
        return lambda: world.edges.disarm(armed)

    return Fault(name or f"edge:{edge.name}:{action}", group, (3.0, 8.0), begin)


OFTEN = {"committed": 12, "step": 12, "renew": 2, "store_sync": 4, "store_rename": 4, "store_renamed": 4}

FAULTS = [
    *(at_edge(edge, "kill", most_after=OFTEN.get(edge.name, 1)) for edge in EDGES.values() if edge.target != "signal"),
    *(at_edge(EDGES[name], "term") for name in ("dequeue_claim", "claim_first_step", "step", "result_final")),
    *(at_edge(EDGES[name], "freeze:4") for name in ("claim_first_step", "step", "result_final", "checkpoint_stored")),
    at_edge(EDGES["renew"], "sleep:4", most_after=3),  # the heartbeat hangs, the work goes on
]
