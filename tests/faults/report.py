"""The results file, one JSON line a schedule, and the table over it. A later run goes on where an earlier stopped."""

import fcntl
import json
from collections import Counter
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from tests.faults.inject import FAULTS
from tests.faults.run import Outcome

Line = dict[str, Any]


def append(path: Path, outcome: Outcome) -> None:
    """Several processes may write one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(outcome.line()) + "\n")


def read(path: Path) -> dict[int, Line]:
    """The last line of each seed; failed_before: whether an earlier one is there that failed."""
    lines: dict[int, Line] = {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        before = lines.get(line["seed"])
        failed = before is not None and (before["failed_before"] or before["verdict"] != "passed")
        lines[line["seed"]] = {**line, "failed_before": failed}
    return lines


def passed(lines: dict[int, Line]) -> int:
    return sum(line["verdict"] == "passed" for line in lines.values())


def table(lines: dict[int, Line]) -> str:
    """The last line is JSON."""
    schedules = list(lines.values())
    if not schedules:
        return "no schedule was run"
    kinds = Counter(name for line in schedules for name in line["faults"])
    fired = Counter(name for line in schedules for name in line["fired"])
    groups = Counter(FAULTS[name].group for line in schedules for name in line["faults"] if name in FAULTS)
    actions: Counter[str] = sum((Counter(line.get("actions", {})) for line in schedules), Counter())
    grown = [(*figures, process) for line in schedules for process, figures in line.get("growth", {}).items()]
    seconds = [line["seconds"] for line in schedules]
    settled = [line["settled"] for line in schedules]
    failed = sorted(line["seed"] for line in schedules if line["verdict"] != "passed")
    width = max(map(len, FAULTS))
    rows = [f"{'fault':<{width}}  group         times"]
    rows += [f"{n:<{width}}  {fault.group:<12}  {kinds[n]:>5}" for n, fault in sorted(FAULTS.items())]
    if fired:
        rows += ["", "edges that fired: " + ", ".join(f"{name} {count}" for name, count in sorted(fired.items()))]
    summary = {
        "schedules": len(schedules),
        "passed": passed(lines),
        "failed_seeds": failed,
        "failed_before": sorted(line["seed"] for line in schedules if line["failed_before"]),
        "faults": kinds.total(),
        "faults_by_group": dict(sorted(groups.items())),
        "edges_fired": fired.total(),
        "jobs": sum(line["jobs"] for line in schedules),
        "jobs_interrupted": sum(line["interrupted"] for line in schedules),
        "jobs_given_up": sum(line.get("given_up", 0) for line in schedules),
        "seconds_mean": round(mean(seconds), 1),
        "seconds_p95": round(quantiles(seconds, n=20)[-1], 1) if len(seconds) > 1 else seconds[0],
        "settle_seconds_mean": round(mean(settled), 1),
        "settle_seconds_max": max(settled),
        "actions": dict(sorted(actions.items())),
        "largest_growth_mib": max(grown, default=(0, 0, ""))[::2],
        "largest_growth_descriptors": max((each[1:] for each in grown), default=(0, "")),
        "collected": sum(line["collected"] for line in schedules),
    }
    rows += [
        "",
        f"{summary['schedules']} schedules, {summary['passed']} passed, {len(failed)} failed {failed or ''}",
        f"of these passed after they had failed: {summary['failed_before'] or 'none'}",
        f"{summary['jobs']} jobs; {summary['jobs_interrupted']} of them took more than one attempt, "
        f"{summary['jobs_given_up']} were given up after failing too often",
        "meanwhile: " + ", ".join(f"{name} {count}" for name, count in sorted(actions.items())),
        f"largest growth of a process: MiB {summary['largest_growth_mib']}, "
        f"descriptors {summary['largest_growth_descriptors']}",
        f"{summary['seconds_mean']} s a schedule (p95 {summary['seconds_p95']}), "
        f"settled after {summary['settle_seconds_mean']} s (longest {summary['settle_seconds_max']})",
        "",
        json.dumps(summary),
    ]
    return "\n".join(rows)
