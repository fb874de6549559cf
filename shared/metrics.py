"""What Prometheus sees of requests and jobs (the captioner's models: services/captioner/metrics.py).

The gauges of the ledger are read from it whenever an API is asked, so any of the APIs tells them. The counters are of
the process that counts: workers and the reconciler serve theirs on `CAPTUNE_METRICS_PORT`, where it is set."""

from math import nan

from prometheus_client import Counter, Gauge, Histogram, start_http_server
from redis import RedisError
from sqlalchemy import extract, func, select
from sqlalchemy.exc import SQLAlchemyError

from shared.core import Core
from shared.db.models import Job
from shared.queue import KINDS

REQUESTS = Histogram("captune_request_seconds", "HTTP requests", ["method", "route", "status"])

QUEUE_DEPTH = Gauge("captune_queue_depth", "ids waiting on the Redis list", ["kind"])
JOBS = Gauge("captune_jobs", "jobs by state: queued (due or not) and running", ["kind", "status"])
QUEUE_AGE = Gauge("captune_queue_age_seconds", "how long the job that is due longest has waited", ["kind"])

CLAIMED = Counter("captune_job_attempts", "attempts begun", ["kind"])
ATTEMPTS = Histogram(
    "captune_job_attempt_seconds",
    "attempts ended, by how: the job's next state, or lease_lost",
    ["kind", "outcome"],
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200, 28800),
)
LEASES_LOST = Counter("captune_job_leases_lost", "attempts that found another one in their place", ["kind"])
RECONCILED = Counter(
    "captune_reconciler_actions", "lapsed: leases that ran out; enqueued: jobs Redis did not know", ["action", "kind"]
)
LIVE = ("queued", "running")


def read_ledger(core: Core) -> None:
    """Set the ledger's and the queue's gauges; to NaN where the database or Redis does not answer."""
    due_at = func.coalesce(Job.run_after, Job.queued_at)
    waited = extract("epoch", func.now() - func.min(due_at).filter(due_at <= func.now()))
    counted = dict.fromkeys([(kind, status) for kind in KINDS for status in LIVE], 0.0)
    age = dict.fromkeys(KINDS, 0.0)
    try:
        with core.db.transaction() as session:
            query = select(Job.kind, Job.status, func.count(), waited).where(Job.status.in_(LIVE))
            for kind, status, number, seconds in session.execute(query.group_by(Job.kind, Job.status)):
                counted[kind, status] = float(number)
                if status == "queued" and seconds is not None:
                    age[kind] = float(seconds)
    except SQLAlchemyError:  # an outage must not take the other metrics along
        counted, age = dict.fromkeys(counted, nan), dict.fromkeys(KINDS, nan)
    for (kind, status), value in counted.items():
        JOBS.labels(kind, status).set(value)
    try:
        depths = {kind: float(core.queue.depth(kind)) for kind in KINDS}
    except RedisError:
        depths = dict.fromkeys(KINDS, nan)
    for kind in KINDS:
        QUEUE_AGE.labels(kind).set(age[kind])
        QUEUE_DEPTH.labels(kind).set(depths[kind])


def serve(port: int) -> None:
    """This process's metrics on all its addresses, unless `port` is 0. For processes that serve no API."""
    if port:
        start_http_server(port)
