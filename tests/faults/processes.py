"""What must hold of the stack's processes between schedules: none is a zombie, none is left of a dead one, and those
that live long do not grow."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.embedded.processes import marked
from tests.faults.world import World

#: A process is compared with itself as it was after this many schedules: caches are full, every code path was taken.
SETTLED_AFTER = 4
#: It may have grown by so much since.
RSS_FACTOR, RSS_BYTES, DESCRIPTORS = 1.10, 48 * 2**20, 12
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    rss: int  # bytes
    descriptors: int


def sample(pid: int) -> Sample | None:
    """None where the process has just ended."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        return Sample(resident, len(os.listdir(f"/proc/{pid}/fd")))
    except (OSError, IndexError):
        return None


class Growth:
    """Of one world's processes."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, int], list[Sample]] = {}

    def add(self, name: str, pid: int, now: Sample) -> str | None:
        """Says so where the process has grown."""
        seen = self.samples.setdefault((name, pid), [])
        seen.append(now)
        if len(seen) <= SETTLED_AFTER:
            return None
        first = seen[SETTLED_AFTER - 1]
        if now.rss > first.rss * RSS_FACTOR + RSS_BYTES:
            return (
                f"{name} (pid {pid}) has grown from {first.rss >> 20} to {now.rss >> 20} MiB in {len(seen)} schedules"
            )
        if now.descriptors > first.descriptors + DESCRIPTORS:
            grown = f"from {first.descriptors} to {now.descriptors} descriptors in {len(seen)} schedules"
            return f"{name} (pid {pid}) has grown {grown}"
        return None

    def grown(self) -> dict[str, list[float]]:
        """By process, what it has grown by since it had settled: MiB, and descriptors."""
        return {
            f"{name} {pid}": [round((seen[-1].rss - first.rss) / 2**20, 1), seen[-1].descriptors - first.descriptors]
            for (name, pid), seen in self.samples.items()
            if len(seen) > SETTLED_AFTER and (first := seen[SETTLED_AFTER - 1])
        }

    def check(self, world: World) -> Iterator[str]:
        for name, pid in world.stack.pids().items():
            now = sample(pid)
            grown = None if now is None or name == "postgres" else self.add(name, pid, now)
            if grown is not None:
                yield grown


def unwanted(world: World, patience: float = 3.0) -> list[str]:
    """Zombies, and processes that outlived the one that started them; those still there after `patience` seconds."""
    deadline = time.monotonic() + patience
    while (found := _unwanted(world)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _unwanted(world: World) -> list[str]:
    ours = set(world.stack.supervisor.pids().values())
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                state, parent = rest.split()[:2]
                if state == "Z" and int(parent) in ours | {os.getpid()}:
                    found.append(f"{name.partition('(')[2]} (pid {entry.name}, child of {parent}) is a zombie")
    for pid in marked({"CAPTUNE_SUPERVISED": str(world.state_dir)}):
        with suppress(OSError):
            if os.getsid(pid) not in ours:
                found.append(f"pid {pid} outlived the process that started it")
    return found
