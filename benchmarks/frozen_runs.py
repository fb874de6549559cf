"""What a run on frozen features takes from being accepted to being scored, in the whole running system.

    python benchmarks/frozen_runs.py [--data FOLDER] [--domain WORDS] [--runs 20]

Starts Captune as `captune up` does, on the starter, and after one run of each method, which warms the workers:
`--runs` runs one after the other, each submitted when the one before was scored; and a group of 60 (linear probe, GDA
and ProLIP; 1 and 4 shots; 10 seeds) through the one fine_tune worker and the one evaluate worker. The times are the
ledger's own: from the fine-tuning job's row to the end of its evaluation. A table, then one JSON line. Targets: 3 s
(p50) and 60 s."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import aliased

from captune.client import Client
from captune.tables import table
from services.embedded.stack import Stack
from shared.db.models import Job
from shared.db.session import Database
from shared.schemas.common import JobResource

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "clipart"
METHODS = ("linear_probe", "gda", "prolip")
SHOTS, SEEDS = (1, 4), tuple(range(10))
TARGETS = {"run_p50_seconds": 3.0, "group_of_60_seconds": 60.0}


def scored(client: Client, job: JobResource) -> str:
    """Waits for a run and its evaluation; the run's id."""
    job = client.job(client.wait(job).id)
    if job.status != "succeeded":
        sys.exit(f"{job.id} {job.status}: {job.error}")
    evaluation = client.wait(client.job(str(job.model_dump()["evaluation_id"])))
    if evaluation.status != "succeeded":
        sys.exit(f"{evaluation.id} {evaluation.status}: {evaluation.error}")
    return job.id


def spans(database: Database, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Of each run, in seconds: accepted to scored, and where they went."""
    evaluation = aliased(Job)
    query = select(Job, evaluation).join(evaluation, evaluation.id == Job.result["evaluation_id"].astext)
    with database.transaction() as session:
        rows = session.execute(query.where(Job.id.in_(ids)).order_by(Job.created_at)).all()
        return [
            {
                "method": job.request["method"]["type"],
                "total": _between(job.created_at, scoring.finished_at),
                "waiting": _between(job.created_at, job.started_at),
                "fitting": _between(job.started_at, job.finished_at),
                "handing on": _between(job.finished_at, scoring.started_at),
                "scoring": _between(scoring.started_at, scoring.finished_at),
            }
            for job, scoring in rows
        ]


def singles(client: Client, database: Database, dataset_id: str, runs: int) -> list[dict[str, Any]]:
    ids = []
    for number, method in enumerate(islice(cycle(METHODS), runs)):
        request = {"method": {"type": method}, "shots": 4, "shot_seed": 100 + number}
        ids.append(scored(client, client.train(dataset_id=dataset_id, **request)))
    return spans(database, ids)


def group_of_60(client: Client, database: Database, dataset_id: str) -> float:
    methods = [{"type": method} for method in METHODS]
    group = client.sweep(dataset_id=dataset_id, methods=methods, shots=list(SHOTS), seeds=list(SEEDS))
    while group.status == "running":
        time.sleep(0.5)
        group = client.group(group.id)
    if group.scored != group.runs:
        sys.exit(f"{group.id}: {group.scored} of {group.runs} runs are scored")
    with database.transaction() as session:
        jobs = session.scalars(select(Job).where(Job.group_id == group.id)).all()
        ends = [job.finished_at for job in jobs if job.finished_at is not None]
        return _between(min(job.created_at for job in jobs), max(ends))


def _between(since: datetime | None, until: datetime | None) -> float:
    assert since is not None
    assert until is not None
    return (until - since).total_seconds()


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="labelled images (default: the sample pictures)")
    parser.add_argument("--domain", default="clip art")
    parser.add_argument("--runs", type=int, default=20, help="one after the other (default: 20)")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="captune-bench-") as folder,
        Stack(Path(folder), port=0, say=_say) as stack,
        Client(stack.url, stack.api_key) as client,
    ):
        database = Database(stack.env["DATABASE_URL"])
        dataset = client.wait(client.push(args.data, name="bench", domain=args.domain))
        if dataset.status != "succeeded":
            sys.exit(f"the data set {dataset.status}: {dataset.error}")
        began = time.monotonic()
        for method in METHODS:
            scored(client, client.train(dataset_id=dataset.id, method={"type": method}))
        for evaluation in list(client.jobs("eval", dataset_id=dataset.id)):  # the baselines' too
            client.wait(evaluation)
        cold = time.monotonic() - began
        runs = singles(client, database, dataset.id, args.runs)
        group = group_of_60(client, database, dataset.id)
        database.close()
    stages = [name for name in runs[0] if name != "method"]
    rows = []
    for method in (*METHODS, "all"):
        mine = [run for run in runs if method in (run["method"], "all")]
        medians = [f"{statistics.median(run[stage] for run in mine):.2f}" for stage in stages]
        rows.append((method, len(mine), *medians, f"{max(run['total'] for run in mine):.2f}"))
    print(table(("method", "runs", *(f"{stage} s" for stage in stages), "slowest s"), rows))
    print(f"\nfirst run of each method, models loaded and images embedded: {cold:.1f} s")
    print(f"a group of {len(METHODS) * len(SHOTS) * len(SEEDS)}: {group:.1f} s")
    figures = {
        "run_p50_seconds": round(statistics.median(run["total"] for run in runs), 3),
        "run_max_seconds": round(max(run["total"] for run in runs), 3),
        "group_of_60_seconds": round(group, 2),
        "cold_seconds": round(cold, 1),
        "classes": len(dataset.classes or ()),
        "train_images": sum((dataset.counts or {}).get("train", {}).values()),
        "targets": TARGETS,
    }
    print(json.dumps({"frozen_runs": figures}))


if __name__ == "__main__":
    main()
