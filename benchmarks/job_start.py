"""From a job being accepted to a free worker having started it, through the whole running system.

    python benchmarks/job_start.py [--jobs 50]

Of each kind, one job after the other, each submitted over HTTP when the one before and all that followed from it had
ended: data sets of 30 pictures, captions of one picture by the built-in engine, zero-shot classifiers of the starter
model, and their evaluations. Two times: by the ledger, in PostgreSQL's clock, from `created_at`, when the request's
transaction began, to `started_at`, when the worker's claim did; and what the client waited for its 202. The first job
of each kind, which warms the worker, does not count. A table, then one JSON line. The target is a p95 below 300 ms.
About 4 minutes; `--jobs 5` for a quick look."""

import argparse
import json
import sys
import time
from collections.abc import Callable

import httpx
from running.processes import machine, quantiles
from running.tiny import archive, plain_http, running, succeeded, upload
from sqlalchemy import select

from captune.client import Client
from captune.tables import table
from shared.db.models import FINAL, Job
from shared.db.session import Database

TARGET_MS = 300.0


def ended(database: Database) -> bool:
    with database.transaction() as session:
        return session.scalar(select(Job.id).where(Job.status.not_in(FINAL)).limit(1)) is None


def idle(database: Database) -> None:
    """Until every worker is free."""
    while not ended(database):
        time.sleep(0.05)
    time.sleep(0.1)  # the worker tells Redis, then waits for the next


def measure(database: Database, submit: Callable[[int], httpx.Response], jobs: int) -> tuple[list[float], list[float]]:
    """Milliseconds: accepted to started, and of the request."""
    ids, answered = [], []
    for number in range(jobs + 1):
        idle(database)
        began = time.perf_counter()
        answer = submit(number)
        answered.append(1000 * (time.perf_counter() - began))
        if answer.status_code != 202:
            sys.exit(f"{answer.status_code}: {answer.text}")
        ids.append(answer.json()["id"])
    idle(database)
    with database.transaction() as session:
        rows = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids)))}
    for row in rows.values():
        if row.status != "succeeded":
            sys.exit(f"{row.id} {row.status}: {row.error}")
    started = [1000 * (rows[id].started_at - rows[id].created_at).total_seconds() for id in ids]  # type: ignore[operator]
    return started[1:], answered[1:]


def kinds(client: Client, http: httpx.Client) -> dict[str, Callable[[int], httpx.Response]]:
    dataset = succeeded(client, client.job(upload(http, archive(10), "tiny").json()["id"])).id
    classifier = succeeded(client, client.train(dataset_id=dataset, method={"type": "zero_shot"}))
    scored = {"classifier_id": classifier.model_dump()["fine_tuned_model"], "split": "test"}

    def caption(number: int) -> httpx.Response:
        body = {"dataset_id": dataset, "limit": 1, "characteristics": ["visual"], "seed": number}
        return http.post("/v1/caption_jobs", json=body)

    def zero_shot(number: int) -> httpx.Response:
        body = {"dataset_id": dataset, "method": {"type": "zero_shot"}, "suffix": f"n{number}"}
        return http.post("/v1/fine_tuning/jobs", json=body)

    return {
        "ingest": lambda number: upload(http, archive(10, number), f"tiny {number}"),
        "caption": caption,
        "fine_tune": zero_shot,
        "evaluate": lambda _: http.post("/v1/evaluations", json=scored),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50, help="of each kind (default: 50; 5 for a quick look)")
    jobs = parser.parse_args().jobs
    rows = []
    with running() as (stack, client, database), plain_http(stack) as http:
        for name, submit in kinds(client, http).items():
            started, answered = measure(database, submit, jobs)
            rows.append((name, jobs, *quantiles(started), round(max(started), 1), *quantiles(answered)))
    times = ["start_p50_ms", "start_p95_ms", "start_p99_ms", "start_max_ms"]
    names = ["kind", "jobs", *times, "answer_p50_ms", "answer_p95_ms", "answer_p99_ms"]
    print(f"{machine()}; client, server and workers share it")
    print(table(names, rows))
    figures = [dict(zip(names, row, strict=True)) for row in rows]
    print(json.dumps({"job_start": figures, "target_p95_ms": TARGET_MS, "machine": machine()}))


if __name__ == "__main__":
    main()
