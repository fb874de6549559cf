"""Waiting with a deadline: nothing in these tests may hang."""

import time
from collections.abc import Callable
from typing import TypeVar

from captune import Client
from shared.schemas.common import FINAL_STATUSES, JobResource

T = TypeVar("T")
J = TypeVar("J", bound=JobResource)


def until(what: str, condition: Callable[[], T | None], seconds: float = 30.0) -> T:
    """What `condition` gives once it is true; fails, saying `what`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.03)
    return found


def finished(client: Client, job: J, seconds: float = 120.0) -> J:
    """The job in its final state."""

    def final() -> J | None:
        now = client.job(job.id)
        assert isinstance(now, type(job))
        return now if now.status in FINAL_STATUSES else None

    return until(f"{job.id} ends", final, seconds)


def succeeded(client: Client, job: J, seconds: float = 120.0) -> J:
    job = finished(client, job, seconds)
    assert job.status == "succeeded", job.error
    return job
