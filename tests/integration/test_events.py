"""A job's events as server-sent events, over a real socket."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import httpx
import pytest

from shared.core import Core
from shared.db.models import Job
from shared.jobs import ledger
from tests.integration.factories import add_dataset, add_job, caption_request, events_of
from tests.integration.support import Api

Message = tuple[str, int | None, Any]  # event, id, data


@pytest.fixture
def job_id(core: Core) -> str:
    dataset_id = add_dataset(core)
    return add_job(core, request=caption_request(dataset_id), dataset_id=dataset_id, status="running", attempt=1)


def log(core: Core, job_id: str, *messages: str) -> None:
    with core.transaction() as session:
        for message in messages:
            ledger.add_event(session, job_id, "log", message)


def finish(core: Core, job_id: str) -> None:
    with core.transaction() as session:
        ledger.finish(session.get_one(Job, job_id), session, "succeeded", result={"captions": 3})


def messages(answer: httpx.Response) -> Iterator[Message]:
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line == "" and fields:
            number = int(fields["id"]) if "id" in fields else None
            yield fields["event"], number, json.loads(fields["data"])
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


class Stream:
    def __init__(self, api: Api, base_url: str, job_id: str) -> None:
        self.url = f"{base_url}/v1/caption_jobs/{job_id}/events"
        self.headers = {"Authorization": api.anna.headers["authorization"], "Accept": "text/event-stream"}

    def read(self, count: int | None = None, last_event_id: int | None = None) -> list[Message]:
        headers = self.headers if last_event_id is None else self.headers | {"Last-Event-ID": str(last_event_id)}
        with httpx.stream("GET", self.url, headers=headers, timeout=10) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            return list(islice(messages(answer), count))


@pytest.fixture
def stream(api: Api, base_url: str, job_id: str) -> Stream:
    return Stream(api, base_url, job_id)


def test_a_reconnect_loses_and_doubles_nothing(core: Core, stream: Stream, job_id: str) -> None:
    log(core, job_id, "one", "two")
    first = stream.read(2)  # and the connection breaks
    log(core, job_id, "three", "four")
    finish(core, job_id)
    rest = stream.read(last_event_id=first[-1][1])
    *events, done = first + rest
    assert [number for _, number, _ in events] == [1, 2, 3, 4, 5, 6]
    assert [data["message"] for _, _, data in events[1:5]] == ["one", "two", "three", "four"]
    assert (done[0], done[2]["id"], done[2]["status"]) == ("done", job_id, "succeeded")
    assert done[2]["result"] == {"captions": 3}


def test_an_open_stream_brings_what_happens(core: Core, stream: Stream, job_id: str) -> None:
    with httpx.stream("GET", stream.url, headers=stream.headers, timeout=10) as answer:
        coming = messages(answer)
        assert next(coming)[2]["type"] == "job.created"
        log(core, job_id, "live")
        assert next(coming)[2]["message"] == "live"
        with core.transaction() as session:
            session.get_one(Job, job_id).progress = {"stage": "captioning", "done": 1, "total": 2, "eta_seconds": 3.0}
        assert next(coming)[::2] == (
            "progress",
            {"stage": "captioning", "done": 1, "total": 2, "eta_seconds": 3.0},
        )
        finish(core, job_id)
        assert [name for name, _, _ in coming] == ["event", "done"]


def test_more_events_than_one_read_takes(core: Core, stream: Stream, job_id: str) -> None:
    log(core, job_id, *map(str, range(230)))
    finish(core, job_id)
    *events, done = stream.read()
    assert [number for _, number, _ in events] == list(range(1, 233))
    assert done[0] == "done"


def test_a_stream_of_an_ended_job_ends(core: Core, stream: Stream, job_id: str) -> None:
    finish(core, job_id)
    assert [name for name, _, _ in stream.read(last_event_id=2)] == ["done"]


def test_as_json(core: Core, api: Api, job_id: str) -> None:
    log(core, job_id, "one", "two")
    body = api.anna.get(f"/v1/caption_jobs/{job_id}/events", params={"after": 1}).json()
    assert [event["message"] for event in body["data"]] == ["one", "two"]
    assert body["data"][0]["object"] == "job.event"
    assert body["last_id"] == str(events_of(core, job_id)[-1].seq)


def test_a_stream_of_another_owners_job_is_404(api: Api, job_id: str) -> None:
    answer = api.ben.get(f"/v1/caption_jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    assert answer.status_code == 404
