"""`python -m tests.faults.soak --minutes 30`: one stack at work for long, a fault now and then; what grows?

Rounds of load with one fault each, every round judged by the oracle. Faults that end the API, the reconciler or the
collector are left out, so that these can be watched all the time. Prints, by process and by table, what it had after
the warm-up, half-way and at the end; the last line is JSON."""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from shared.cpu import share_cores
from tests.faults.inject import FAULTS
from tests.faults.processes import sample
from tests.faults.run import Outcome, Runner
from tests.faults.schedule import Planned, Schedule
from tests.faults.world import World

ROUND = 40.0  # seconds of load
WARM = 5.0  # minutes until the first comparison: caches are full, every code path was taken
MIB = 2**20
SPARED = ("api", "reconciler", "collector")
TABLES = """
SELECT relname, pg_table_size(oid), pg_indexes_size(oid), coalesce(n_live_tup, 0), coalesce(n_dead_tup, 0)
FROM pg_class LEFT JOIN pg_stat_user_tables USING (relname)
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""


@dataclass(frozen=True)
class Look:
    """At a stack. processes: (pid, MiB, descriptors) by name; tables: (bytes, bytes of indexes, rows, dead rows)."""

    minutes: float
    jobs: int
    processes: dict[str, tuple[int, float, int]]
    tables: dict[str, tuple[int, int, int, int]]
    redis_mib: float
    redis_keys: int
    store_mib: float
    logs_mib: float


def look(world: World, began: float) -> Look:
    processes = {}
    for name, pid in world.stack.pids().items():
        if (now := sample(pid)) is not None and name != "postgres":
            processes[name] = (pid, now.rss / MIB, now.descriptors)
    with world.core.db.transaction() as session:
        session.execute(text("ANALYZE"))
        rows = session.execute(text(TABLES)).all()
        jobs = session.execute(text("SELECT count(*) FROM jobs")).scalar_one()
    memory = world.redis.info("memory")
    assert isinstance(memory, dict)
    return Look(
        minutes=(time.monotonic() - began) / 60,
        jobs=jobs,
        processes=processes,
        tables={name: (size, indexes, live, dead) for name, size, indexes, live, dead in rows},
        redis_mib=memory["used_memory"] / MIB,
        redis_keys=int(world.redis.dbsize()),  # type: ignore[arg-type]  # the client is synchronous
        store_mib=size_of(world.store_dir),
        logs_mib=size_of(world.state_dir / "logs"),
    )


def size_of(folder: Path) -> float:
    """MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB


def faults() -> list[str]:
    ending = {f"{how}_{name}" for how in ("kill", "term", "term_twice") for name in SPARED}
    names = {n for n, f in FAULTS.items() if f.group not in ("edge", "storage")} - ending
    return sorted(names | {"storage_full", "storage_slow", "collector_runs"})


def soak(minutes: float, seed: int) -> tuple[list[Look], list[Outcome]]:
    rng = random.Random(f"soak/{seed}")
    looks: list[Look] = []
    outcomes: list[Outcome] = []
    with World() as world:
        runner, began = Runner(world), time.monotonic()
        names: list[str] = []
        while time.monotonic() - began < 60 * minutes:
            names = names or rng.sample(faults(), len(faults()))
            name = names.pop()
            planned = Planned(name, rng.uniform(5, ROUND - 15), rng.uniform(*FAULTS[name].seconds))
            outcome = runner.run(Schedule(seed + len(outcomes), ROUND, (planned,)))
            outcomes.append(outcome)
            looks.append(look(world, began))
            now = looks[-1]
            api = now.processes.get("api", (0, 0.0, 0))
            print(
                f"{now.minutes:5.1f} min: {name}, {outcome.jobs} jobs, {'passed' if outcome.passed else 'FAILED'}; "
                f"api {api[1]:.0f} MiB, {api[2]} descriptors; Redis {now.redis_mib:.1f} MiB, {now.redis_keys} keys",
                flush=True,
            )
            print("".join(f"    {finding}\n" for finding in outcome.findings), end="", flush=True)
    if all(outcome.passed for outcome in outcomes):
        shutil.rmtree(world.folder, ignore_errors=True)
    return looks, outcomes


def table(looks: list[Look], outcomes: list[Outcome]) -> str:
    warm = next((look for look in looks if look.minutes >= WARM), looks[0])
    last = looks[-1]
    half = next(look for look in looks if look.minutes >= (warm.minutes + last.minutes) / 2)
    seen = (warm, half, last)
    rows = [f"{'':<22}" + "".join(f"{f'{each.minutes:.0f} min':>22}" for each in seen)]
    rows.append(_row("jobs", (f"{each.jobs}" for each in seen)))
    for name in sorted({name for each in seen for name in each.processes}):
        cells = []
        for each in seen:
            pid, mib, descriptors = each.processes.get(name, (0, 0.0, 0))
            again = "" if pid == last.processes.get(name, (0,))[0] else "*"
            cells.append(f"{mib:.0f} MiB, {descriptors} fd{again}")
        rows.append(_row(name, cells))
    for name in sorted(last.tables):
        cells = []
        for each in seen:
            size, indexes, live, _dead = each.tables[name]
            cells.append(f"{live}: {size / max(1, live):.0f} + {indexes / max(1, live):.0f} B")
        rows.append(_row(name, cells))
    rows.append(_row("Redis", (f"{each.redis_mib:.2f} MiB, {each.redis_keys} keys" for each in seen)))
    rows.append(_row("store", (f"{each.store_mib:.1f} MiB" for each in seen)))
    rows.append(_row("logs", (f"{each.logs_mib:.1f} MiB" for each in seen)))
    rows += ["", "*: another process since. Tables: rows: bytes + bytes of indexes, a row", ""]
    summary = {
        "minutes": round(last.minutes, 1),
        "rounds": len(outcomes),
        "passed": sum(outcome.passed for outcome in outcomes),
        "jobs": sum(outcome.jobs for outcome in outcomes),
        "interrupted": sum(outcome.interrupted for outcome in outcomes),
        "api_mib": [round(each.processes["api"][1]) for each in looks if "api" in each.processes],
        "processes": {
            name: [round(last.processes[name][1] - warm.processes[name][1], 1), last.processes[name][2]]
            for name in last.processes
            if warm.processes.get(name, (0,))[0] == last.processes[name][0]
        },
        "tables": {name: [each.tables[name] for each in seen] for name in last.tables},
        "redis_mib": [round(each.redis_mib, 2) for each in seen],
    }
    return "\n".join([*rows, json.dumps(summary)])


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells)


def main() -> int:
    share_cores()
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    looks, outcomes = soak(options.minutes, options.seed)
    print(table(looks, outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
