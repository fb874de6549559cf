"""The wake-up call: Redis lists through RQ, carrying job ids and nothing else. Losing all of Redis loses no job.

RQ's payload is JSON, and what a worker runs for it is fixed in the worker (shared/jobs/worker.py): a forged payload
can at most name a job id."""

import logging
from uuid import uuid4

from redis import Redis, RedisError
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from rq import Queue
from rq.serializers import JSONSerializer

KINDS = ("ingest", "caption", "fine_tune", "evaluate")  # one queue, and one kind of worker, each

FUNCTION = "captune.job"  # RQ wants a name; workers run one thing, whatever it says

log = logging.getLogger(__name__)


def connect(url: str) -> Redis:
    return Redis.from_url(
        url, retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2), socket_connect_timeout=3, socket_timeout=5
    )


def ledger_id(wake_up: str) -> str:
    """The job that a wake-up is for."""
    return wake_up.rpartition("-")[0]


class JobQueue:
    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._queues = {kind: Queue(kind, connection=redis, serializer=JSONSerializer) for kind in KINDS}

    def enqueue(self, kind: str, job_id: str) -> bool:
        """Tell a worker. False when Redis did not take it: the reconciler will try again, nothing is lost."""
        wake_up = f"{job_id}-{uuid4().hex[:8]}"  # one of its own each time: RQ deletes a payload when its run ends
        try:
            self._queues[kind].enqueue(FUNCTION, job_id=wake_up, job_timeout=-1, result_ttl=0, failure_ttl=60)
        except RedisError as error:
            log.warning("enqueue failed, the reconciler will retry", extra={"job_id": job_id, "error": str(error)})
            return False
        return True

    def waiting(self, kind: str) -> set[str]:
        """Ids of the jobs on the kind's list."""
        return {ledger_id(wake_up) for wake_up in self._queues[kind].get_job_ids()}

    def depth(self, kind: str) -> int:
        return self._queues[kind].count

    def ping(self) -> None:
        self.redis.ping()
