"""What the processes of a running stack use, by name, read from /proc (Linux)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sqlalchemy import text

from shared.db.session import Database

SERVERS = {"postgres": "postgres", "valkey-server": "valkey"}  # by the program's name
TABLE_SIZES = """
    SELECT relname, pg_table_size(oid), pg_indexes_size(oid), reltuples::bigint FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1
"""


@dataclass(frozen=True)
class Usage:
    mib: float  # resident; what is shared with others (PostgreSQL's buffers) counts in part, so that sums are right
    files: int  # open descriptors
    cpu_seconds: float  # since it began
    processes: int


def usage() -> dict[str, Usage]:
    """Of every process that this one started and that has a name: supervised ones, PostgreSQL (all of it), Valkey."""
    found: dict[str, Usage] = {}
    for pid in _descendants(os.getpid()):
        try:
            name = _name(pid)
            if name is None:
                continue
            one = Usage(_mib(pid), len(os.listdir(f"/proc/{pid}/fd")), cpu_seconds(pid), 1)
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended meanwhile
            continue
        so_far = found.get(name, Usage(0.0, 0, 0.0, 0))
        found[name] = Usage(
            so_far.mib + one.mib,
            so_far.files + one.files,
            so_far.cpu_seconds + one.cpu_seconds,
            so_far.processes + 1,
        )
    return dict(sorted(found.items()))


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, in user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pss:"))) / 1024


def _name(pid: int) -> str | None:
    program = Path(f"/proc/{pid}/comm").read_text().strip()
    if program in SERVERS:
        return SERVERS[program]
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"CAPTUNE_WORKER="):
            return entry.partition(b"=")[2].decode()
    return None


def _descendants(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def quantiles(times: Iterable[float], of: tuple[float, ...] = (0.5, 0.95, 0.99)) -> tuple[float, ...]:
    """p50, p95, p99, rounded to a hundredth"""
    return tuple(round(float(each), 2) for each in np.quantile(list(times), of))


def table_sizes(database: Database) -> dict[str, tuple[int, int]]:
    """Bytes of each table and of its indexes."""
    with database.transaction() as session:
        return {name: (data, indexes) for name, data, indexes, _ in session.execute(text(TABLE_SIZES))}


def machine() -> str:
    """Where the figures were taken."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB"
