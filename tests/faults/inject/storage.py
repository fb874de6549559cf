"""What can become of the store: full, read-only, unreadable, slow, cut off within a file; or collected. At the edges of
shared/store/disk.py, because permissions do not hold for root."""

import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.inject.base import End, Fault
from tests.faults.inject.edges import at_edge
from tests.faults.inside.fault_points import EDGES

if TYPE_CHECKING:
    from tests.faults.world import World


ROOT = Path(__file__).parents[3]
BESIDE = "collector-beside"  # the stack's own is "collector"
_COLLECT = """
from shared.store.collector import Retention, collect
from shared.config import CoreSettings
from shared.core import Core
print(collect(Core.from_settings(CoreSettings(), pool_size=2), Retention(unreferenced=2)).table())
"""


def lasting(name: str, action: str, *edges: str) -> Fault:
    """For every process, until it ends."""

    def begin(world: "World", rng: random.Random) -> End:
        armed = [world.edges.arm(edge, action=action, lasting=True) for edge in edges]

        def end() -> None:
            for each in armed:
                world.edges.disarm(each)

        return end

    return Fault(name, "storage", (1.0, 5.0), begin)


def collector(name: str, action: str | None = None) -> Fault:
    """A run of the collector beside the load, with an age that only its locks make safe; action: what befalls it while
    it holds them."""

    def begin(world: "World", rng: random.Random) -> End:
        armed = world.edges.arm("store_delete", BESIDE, action, after=rng.randint(0, 3)) if action else None
        env = {**world.stack.env, "CAPTUNE_WORKER": BESIDE}
        with (world.state_dir / "logs" / "collector.log").open("ab") as out:
            argv = [sys.executable, "-c", _COLLECT]
            process = subprocess.Popen(argv, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

        def end() -> None:
            process.kill()
            process.wait()
            if armed is not None:
                world.edges.disarm(armed)

        return end

    return Fault(name, "storage", (3.0, 6.0), begin)


FAULTS = [
    lasting("storage_full", "raise:ENOSPC", "store_sync", "store_sync_all"),
    lasting("storage_read_only", "raise:EROFS", "store_open", "store_sync"),  # folders are copied, not opened
    lasting("storage_unreadable", "raise:EIO", "store_read"),
    lasting("storage_slow", "sleep:0.7", "store_sync", "store_sync_all"),
    collector("collector_runs"),
    collector("collector_dies", "kill"),
    collector("collector_hangs", "freeze:4"),
    at_edge(EDGES["store_sync"], "raise:ENOSPC", "storage", most_after=4, name="storage_full_once"),
    at_edge(EDGES["store_rename"], "raise:EROFS", "storage", most_after=4, name="storage_read_only_once"),
    at_edge(EDGES["store_sync"], "torn", "storage", most_after=4, name="storage_torn"),
]
