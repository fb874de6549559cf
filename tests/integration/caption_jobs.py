"""Running caption jobs in tests, and stopping them half-way."""

import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import select

from shared.core import Core
from shared.db.models import Caption, CaptionJobItem, Image, Job
from shared.jobs import ledger
from shared.jobs.worker import Runner
from shared.schemas.captions import CaptionJobRequest
from tests.integration.captioner_server import Answer, Asked, CaptionerServer
from tests.integration.factories import add_job, change_job, events_of, read_job
from tests.integration.support import wait_for

SENTENCE = "Soft striped fur with round amber eyes and small pointed ears sits on a woven grey mat. "


def submit(core: Core, dataset_id: str, owner: str = "anna", **fields: Any) -> str:
    asked = {"engine": "m", "characteristics": ["visual", "shape"], "domain": "pets"} | fields
    request = CaptionJobRequest(dataset_id=dataset_id, **asked)
    return add_job(core, "caption", owner=owner, request=request.model_dump(), dataset_id=dataset_id)


def run(core: Core, job_id: str) -> Job:
    Runner(core, "caption", "test").run(job_id)
    return read_job(core, job_id)


def done(core: Core, job_id: str) -> dict[str, Any]:
    """Runs a job that succeeds. Returns its result."""
    job = run(core, job_id)
    assert job.status == "succeeded", events_of(core, job_id)[-1].message
    assert job.result is not None
    return job.result


def caption_all(core: Core, dataset_id: str, **fields: Any) -> str:
    job_id = submit(core, dataset_id, **fields)
    done(core, job_id)
    return job_id


def captions_of(core: Core, job_id: str) -> list[Caption]:
    """In the order of images and characteristics; each (image, key) once."""
    with core.transaction() as session:
        query = select(Caption).join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
        query = query.where(CaptionJobItem.job_id == job_id)
        return list(session.scalars(query.order_by(Caption.image_id, Caption.characteristic, Caption.id)))


def change_caption(core: Core, id: str, **columns: Any) -> None:
    with core.transaction() as session:
        row = session.get_one(Caption, id)
        for name, value in columns.items():
            setattr(row, name, value)


def images_of(core: Core, dataset_id: str) -> dict[str, Image]:
    with core.transaction() as session:
        return {image.id: image for image in session.scalars(select(Image).where(Image.dataset_id == dataset_id))}


def counted(result: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(result[name] for name in names)


class Gate:
    """Lets so many requests through and holds the others until it is opened."""

    def __init__(self, server: CaptionerServer, through: int) -> None:
        self.open = threading.Event()
        self.left, self.lock = through, threading.Lock()
        self.inner, server.answer = server.answer, self

    def __call__(self, asked: Asked) -> Answer:
        with self.lock:
            self.left -= 1
            held = self.left < 0
        if held:
            self.open.wait(30)
        return self.inner(asked)


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def interrupted(core: Core, server: CaptionerServer, job_id: str, through: int = 30, flag: str = "pause") -> int:
    """Runs a job until so many answers, then stops it. Returns how many captions it has; all who were answered."""
    items = len(captions_of(core, job_id))
    plain = server.answer
    gate = Gate(server, through)
    thread = in_thread(lambda: Runner(core, "caption", "test").run(job_id))
    wait_for(lambda: server.in_flight == 8 and gate.left == -8)
    began = time.monotonic()
    with core.transaction() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        (ledger.request_pause if flag == "pause" else ledger.request_cancel)(session, job)
    thread.join(20)
    assert time.monotonic() - began < 3.0, "flags arrive within a second; the rest is at once"
    assert read_job(core, job_id).status == {"pause": "paused", "cancel": "cancelled"}[flag]
    gate.open.set()
    wait_for(lambda: server.in_flight == 0)
    server.answer = plain
    kept = len(captions_of(core, job_id)) - items
    if flag == "pause":
        change_job(core, job_id, status="queued", pause_requested=False)
    return kept
