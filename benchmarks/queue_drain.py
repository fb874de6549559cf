"""10,000 queued jobs through one worker: in order, and as fast at the end as at the beginning?

    python benchmarks/queue_drain.py [--jobs 10000]

The jobs are caption jobs of one picture and one characteristic by the built-in engine, each with a seed of its own, so
that every one asks the engine and writes one caption. The caption worker is stopped (SIGSTOP) while eight clients
submit them all over HTTP; then the reconciler's step is timed with all of them queued, and the worker goes on. From the
ledger: jobs a second over each tenth of the jobs, how much later than itself a job was queued that started before it
(eight clients commit and enqueue at once, so some tenths of a second), attempts beyond the first. Of Redis: memory and
keys before, with all queued, and after. Client and server share the machine. A table, then one JSON line. About 25
minutes for 10,000; `--jobs 300` for a quick look."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from itertools import accumulate
from typing import Any

from running.processes import machine, quantiles, usage
from running.tiny import archive, plain_http, running, say, succeeded, upload
from sqlalchemy import func, select

from captune.tables import table
from services.embedded.stack import Stack
from shared.config import CoreSettings
from shared.core import Core
from shared.db.models import FINAL, Job
from shared.jobs.reconciler import requeue_forgotten

CLIENTS = 8


@contextmanager
def worker_stopped(stack: Stack) -> Iterator[None]:
    pid = stack.supervisor.pids()["worker-caption"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def submit(stack: Stack, dataset_id: str, jobs: int) -> tuple[float, list[float]]:
    """Seconds for all of them, and milliseconds of each request."""

    def some(first: int) -> list[float]:
        times = []
        with plain_http(stack) as http:
            for seed in range(first, jobs, CLIENTS):
                body = {"dataset_id": dataset_id, "limit": 1, "characteristics": ["visual"], "seed": seed}
                began = time.perf_counter()
                answer = http.post("/v1/caption_jobs", json=body)
                times.append(1000 * (time.perf_counter() - began))
                if answer.status_code != 202:
                    sys.exit(f"{answer.status_code}: {answer.text}")
        return times

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        times = [each for found in pool.map(some, range(CLIENTS)) for each in found]
    return time.monotonic() - began, times


def redis_use(core: Core) -> dict[str, float]:
    found: Any = core.queue.redis.info("memory")
    keys: Any = core.queue.redis.dbsize()
    return {"keys": keys, "mib": round(found["used_memory"] / 2**20, 2)}


def reconcile(core: Core, repeats: int = 5) -> list[float]:
    """Milliseconds of the step that the reconciler does every 2 s, with everything queued."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        requeue_forgotten(core)
        times.append(1000 * (time.perf_counter() - began))
    return times


def drain(core: Core, jobs: int) -> None:
    left, said = jobs, time.monotonic()
    query = select(func.count()).select_from(Job).where(Job.kind == "caption", Job.status.not_in(FINAL))
    while left:
        time.sleep(1.0)
        with core.db.transaction() as session:
            left = session.scalar(query) or 0
        if time.monotonic() - said > 30:
            said = time.monotonic()
            say(f"{left} left")


def outcome(core: Core, warm_id: str) -> dict[str, Any]:
    mine = (Job.kind == "caption", Job.id != warm_id)
    with core.db.transaction() as session:
        rows = session.scalars(select(Job).where(*mine).order_by(Job.started_at)).all()
    if failed := [row.id for row in rows if row.status != "succeeded"]:
        sys.exit(f"{len(failed)} jobs did not succeed, {failed[0]} among them")
    ends = sorted(_time(row.finished_at) for row in rows)
    tenth = max(2, len(ends) // 10)
    tenths = [ends[first : first + tenth] for first in range(0, len(ends) - tenth + 1, tenth)]
    rates = [round((len(part) - 1) / (part[-1] - part[0]), 1) for part in tenths]
    return {
        "rates": rates,
        "overtaken_seconds": round(_overtaken([_time(row.queued_at) for row in rows]), 2),
        "second_attempts": sum(row.attempt > 1 for row in rows),
        "seconds": round(ends[-1] - _time(rows[0].started_at), 1),
    }


def _overtaken(queued: list[float]) -> float:
    """Of the times of queueing, in the order of starting: the furthest that any is behind one before it."""
    latest = accumulate(queued, max)
    return max(before - at for before, at in zip(latest, queued, strict=True))


def _time(at: datetime | None) -> float:
    assert at is not None
    return at.timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    jobs = parser.parse_args().jobs
    with running() as (stack, client, _), plain_http(stack) as http:
        settings = {name.lower(): stack.env[name] for name in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL")}
        core = Core.from_settings(CoreSettings(**settings))  # type: ignore[arg-type]
        dataset = succeeded(client, client.job(upload(http, archive(2), "tiny").json()["id"])).id
        warm: dict[str, Any] = {"dataset_id": dataset, "limit": 1, "characteristics": ["visual"], "seed": jobs}
        warm_id = succeeded(client, client.caption(**warm)).id
        redis = {"before": redis_use(core)}
        with worker_stopped(stack):
            seconds, times = submit(stack, dataset, jobs)
            say(f"{jobs} jobs submitted in {seconds:.0f} s")
            time.sleep(settings_age(core))
            redis["queued"] = redis_use(core)
            reconciling = reconcile(core)
        before, began = usage(), time.monotonic()
        drain(core, jobs)
        wall, after = time.monotonic() - began, usage()
        figures = outcome(core, warm_id)
        redis["after"] = redis_use(core)
        core.close()
    busy = {name: round(100 * (after[name].cpu_seconds - before[name].cpu_seconds) / wall, 1) for name in after}
    print(f"{machine()}; clients, server and workers share it\n")
    print(table(("tenth", "jobs_per_second"), enumerate(figures["rates"], start=1)))
    print(f"\nsubmitted at {jobs / seconds:.0f}/s by {CLIENTS} clients; p50, p95, p99: {quantiles(times)} ms")
    print(f"the reconciler's step with {jobs} queued: {max(reconciling):.0f} ms")
    print(f"processor time while draining, % of one core: {busy}")
    for name, use in redis.items():
        print(f"Redis {name}: {use}")
    print(f"overtaken by {figures['overtaken_seconds']} s at most; second attempts: {figures['second_attempts']}")
    found: dict[str, Any] = {
        "jobs": jobs,
        "submitted_per_second": round(jobs / seconds, 1),
        "submit_ms": quantiles(times),
    }
    found |= figures | {"reconcile_ms": round(max(reconciling), 1), "redis": redis, "cpu_percent": busy}
    print(json.dumps({"queue_drain": found, "machine": machine()}))


def settings_age(core: Core) -> float:
    """Until every job is old enough for the reconciler to look at it."""
    return core.settings.requeue_after_seconds + core.settings.reconcile_seconds


if __name__ == "__main__":
    main()
