"""Caption jobs that are stopped, starved or orphaned lose and double nothing."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from services.captioner.captioning import flow
from services.captioner.captioning.writing import write
from shared.core import Core
from shared.db.models import Caption
from shared.jobs.worker import Runner
from tests.integration.caption_jobs import (
    Gate,
    caption_all,
    captions_of,
    counted,
    done,
    in_thread,
    interrupted,
    run,
    submit,
)
from tests.integration.captioner_server import Answer, Asked, CaptionerServer
from tests.integration.factories import LONG_AGO, add_dataset, change_job, events_of, read_job
from tests.integration.support import wait_for


def test_a_cancelled_job_keeps_what_was_finished(core: Core, server: CaptionerServer) -> None:
    job_id = submit(core, add_dataset(core, images=20))
    assert interrupted(core, server, job_id, flag="cancel") == 30
    job = read_job(core, job_id)
    assert (job.status, job.result) == ("cancelled", None)


def test_a_paused_job_goes_on_where_it_was(core: Core, server: CaptionerServer) -> None:
    job_id = submit(core, add_dataset(core, images=20))
    kept = interrupted(core, server, job_id)
    assert kept == 30
    calls = server.calls
    assert counted(done(core, job_id), "captions", "written", "failed") == (80, 80, 0)
    assert server.calls == calls + 50
    assert Counter(row.provenance["attempt"] for row in captions_of(core, job_id)) == {1: 30, 2: 50}


def test_a_worker_that_is_stopped_hands_the_job_back_with_what_it_has(core: Core, server: CaptionerServer) -> None:
    gate = Gate(server, 30)
    job_id = submit(core, add_dataset(core, images=20))
    runner = Runner(core, "caption", "test")
    thread = in_thread(lambda: runner.run(job_id))
    wait_for(lambda: gate.left == -8)
    runner.stopping.set()
    thread.join(5)
    assert not thread.is_alive()
    gate.open.set()
    assert read_job(core, job_id).status == "queued"
    assert len(captions_of(core, job_id)) == 30


def test_a_storm_of_429_is_ridden_out(core: Core, server: CaptionerServer) -> None:
    refused = Answer(status=429, headers={"Retry-After": "0"})
    server.answer = lambda asked: refused if asked.number <= 30 else Answer(f"coat of {asked.picture[-9:]}")
    result = done(core, submit(core, add_dataset(core, images=10)))
    assert counted(result, "captions", "written", "failed") == (40, 40, 0)
    assert server.calls == 70


def test_a_model_replaced_while_the_job_runs_leaves_captions_of_one_revision(
    core: Core, server: CaptionerServer
) -> None:
    def replaced(asked: Asked) -> Answer:
        if asked.number == 20:
            server.revision = "r2"
        return Answer(f"coat of {asked.picture[-9:]}")

    server.answer = replaced
    job_id = submit(core, add_dataset(core, images=20))
    job = run(core, job_id)
    assert (job.status, job.failures) == ("queued", 1)
    assert "was replaced" in events_of(core, job_id)[-1].message
    assert captions_of(core, job_id)
    change_job(core, job_id, run_after=LONG_AGO)
    result = done(core, job_id)
    assert counted(result, "captions", "written") == (80, 80)
    assert {row.provenance["revision"] for row in captions_of(core, job_id)} == {"r2"}
    assert result["captioner"]["revision"] == "r2"


def test_attempts_that_write_no_caption_are_bounded(core: Core, server: CaptionerServer) -> None:
    """Walking over captions that an earlier attempt wrote is no progress: it must not wipe the failures."""

    def never_the_dogs(asked: Asked) -> Answer:
        server.revision = "r2" if asked.class_name == "dog" else server.revision
        return Answer()

    server.answer = never_the_dogs
    dataset_id = add_dataset(core, images=1)
    caption_all(core, dataset_id, limit=1)
    job_id = submit(core, dataset_id)
    for failures in (1, 2):
        job = run(core, job_id)
        assert (job.status, job.failures) == ("queued", failures), events_of(core, job_id)[-1].message
        change_job(core, job_id, run_after=LONG_AGO)
        server.revision = "r1"


@dataclass
class Failing:
    """In the place of what writes captions: fails so many times, from the first that has any, then works."""

    times: int
    calls: int = 0

    def __call__(self, session: Session, **what: Any) -> int:
        if what["rows"]:
            self.calls += 1
            if self.calls <= self.times:
                raise OperationalError("INSERT", {}, Exception("the database restarts"))
        return write(session, **what)


def test_a_database_that_is_away_for_a_moment_costs_nothing(
    core: Core, server: CaptionerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(2)
    monkeypatch.setattr(flow, "write", failing)
    monkeypatch.setattr(flow, "FLUSH_PAUSES", (0.01, 0.01, 0.01))
    job_id = submit(core, add_dataset(core, images=20))
    assert counted(done(core, job_id), "captions", "written") == (80, 80)
    assert (server.calls, read_job(core, job_id).attempt) == (80, 1)
    assert failing.calls > 2


def test_what_could_not_be_written_is_tried_once_more_at_the_end(
    core: Core, server: CaptionerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "FLUSH_PAUSES", (0.01, 0.01))
    monkeypatch.setattr(flow, "write", Failing(3))
    gate = Gate(server, 30)
    job_id = submit(core, add_dataset(core, images=20))
    job = run(core, job_id)
    gate.open.set()
    assert (job.status, job.failures) == ("queued", 1), "tries are bounded"
    assert len(captions_of(core, job_id)) == 30, "all that was answered"


def test_two_jobs_at_once_double_nothing(core: Core, server: CaptionerServer) -> None:
    dataset_id = add_dataset(core, images=30)
    jobs = [submit(core, dataset_id) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job_id: done(core, job_id), jobs))
    assert [result["captions"] for result in results] == [120, 120]
    assert sum(result["written"] for result in results) == 120
    with core.transaction() as session:
        assert session.scalar(select(func.count()).select_from(Caption)) == 120
