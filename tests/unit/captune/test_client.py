"""What the client does beyond sending requests: reading event streams, taking them up again, paging, errors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from captune import CaptuneAPIError, Client, transport
from shared.schemas.captions import CaptionJob
from shared.schemas.common import JobEvent, Progress

JOB = {
    "id": "cap_1",
    "status": "succeeded",
    "created_at": 0,
    "dataset_id": "ds_1",
    "request": {"source": "model", "dataset_id": "ds_1"},
}
CAPTION = {
    "id": "cpt_1",
    "dataset_id": "ds_1",
    "image_id": "img_1",
    "path": "cat/1.png",
    "class_name": "cat",
    "characteristic": "visual",
    "text": "a soft coat",
    "clip_tokens": 9,
    "flags": [],
    "excluded": False,
    "version": 3,
    "original_text": None,
    "edited_by": None,
    "agreement": None,
    "provenance": {},
    "created_at": 0,
}


def event(seq: int) -> str:
    data = {"seq": seq, "level": "info", "type": "job.started", "message": "…", "created_at": 0}
    return f"id: {seq}\nevent: event\ndata: {json.dumps(data)}\n\n"


PROGRESS = f"event: progress\ndata: {json.dumps({'stage': 'captioning', 'done': 1, 'total': 2})}\n\n"
DONE = f"event: done\ndata: {json.dumps(JOB)}\n\n"


def test_events_are_parsed_field_by_field() -> None:
    text = 'id: 7\nevent: event\ndata: {"a":\ndata: 1}\n\n: a comment\n\nevent:event\ndata:{"a": 2}\n\ndata: 3\n\n'
    assert list(transport.server_sent_events(iter(text.split("\n")))) == [
        ("event", "7", {"a": 1}),
        ("event", None, {"a": 2}),
        ("message", None, 3),
    ]


def test_an_event_that_is_cut_off_is_not_delivered() -> None:
    assert list(transport.server_sent_events(iter(["id: 1", "event: event", 'data: {"a": 1}']))) == []


class Broken(httpx.SyncByteStream):
    """A body whose connection breaks after `text`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __iter__(self) -> Iterator[bytes]:
        yield self.text.encode()
        raise httpx.ReadError("connection reset")


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[httpx.Request], httpx.Response]], Client]:
    """A client whose server is a function."""
    monkeypatch.setattr("time.sleep", lambda _: None)

    def made(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
        connected = Client("http://server", "key")
        connected._http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
        return connected

    return made


Connect = Callable[[Callable[[httpx.Request], httpx.Response]], Client]


def test_a_broken_stream_is_taken_up_where_it_broke(connect: Connect) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["Last-Event-ID"])
        if len(asked) == 1:
            return httpx.Response(200, stream=Broken(event(1) + PROGRESS + event(2)))
        if len(asked) == 2:
            raise httpx.ConnectError("the server restarts")
        return httpx.Response(200, text=event(3) + DONE)

    updates = list(connect(answer).watch("cap_1"))
    assert asked == ["0", "2", "2"]
    assert [u.seq if isinstance(u, JobEvent) else type(u) for u in updates] == [1, Progress, 2, 3, CaptionJob]


def test_a_server_that_stays_away_is_given_up(connect: Connect) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody there")

    with pytest.raises(httpx.ConnectError):
        list(connect(answer).watch("cap_1"))


def test_lists_are_read_page_by_page(connect: Connect) -> None:
    pages = {None: (["cap_3", "cap_2"], True), "cap_2": (["cap_1"], False)}

    def answer(request: httpx.Request) -> httpx.Response:
        ids, more = pages[request.url.params.get("after")]
        assert request.url.params["dataset_id"] == "ds_1"
        return httpx.Response(200, json={"data": [JOB | {"id": i} for i in ids], "has_more": more, "last_id": ids[-1]})

    assert [job.id for job in connect(answer).jobs("cap", dataset_id="ds_1")] == ["cap_3", "cap_2", "cap_1"]


def test_a_refusal_carries_the_servers_words(connect: Connect) -> None:
    problem = {"title": "Conflict", "status": 409, "detail": "it is in use", "code": "in_use", "param": "id"}
    with pytest.raises(CaptuneAPIError) as refused:
        connect(lambda _: httpx.Response(409, json=problem)).delete_dataset("ds_1")
    error = refused.value
    assert (error.status, error.detail, error.code, error.param) == (409, "it is in use", "in_use", "id")
    with pytest.raises(CaptuneAPIError, match="the server answered 502"):
        connect(lambda _: httpx.Response(502, text="<html>bad gateway</html>")).methods()


def test_an_id_of_no_job_is_told_without_asking() -> None:
    with pytest.raises(ValueError, match=r"'clf_1' is no job id; they start with ds_, cap_, ft_, eval_"):
        Client("http://server", "key").job("clf_1")


def test_what_a_caption_job_was_not_told_is_not_sent(connect: Connect) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content) == {
            "dataset_id": "ds_1",
            "redo": {"caption_job_id": "cap_0", "flag": "empty"},
        }
        return httpx.Response(202, json=JOB)

    job = connect(answer).caption(dataset_id="ds_1", redo={"caption_job_id": "cap_0", "flag": "empty"})
    assert job.id == "cap_1"


def test_filters_that_are_none_are_not_sent(connect: Connect) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert dict(request.url.params) == {"limit": "200", "excluded": "false", "q": "coat"}
        return httpx.Response(200, json={"data": [CAPTION], "has_more": False, "last_id": "cpt_1"})

    found = connect(answer).captions("ds_1", excluded=False, q="coat", flag=None)
    assert [caption.text for caption in found] == ["a soft coat"]


def test_an_edit_says_which_version_it_was_made_from(connect: Connect) -> None:
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.method, request.headers["If-Match"], json.loads(request.content)))
        return httpx.Response(200, json=CAPTION)

    client = connect(answer)
    client.edit_caption("cpt_1", text="softer", version=2)
    client.edit_caption("cpt_1", excluded=False)
    assert sent == [("PATCH", '"2"', {"text": "softer"}), ("PATCH", "*", {"excluded": False})]
    with pytest.raises(ValueError, match="give 'text', 'excluded' or both"):
        client.edit_caption("cpt_1")


def test_an_import_is_sent_with_its_file_name(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text('{"path": "1.png"}')

    def answer(request: httpx.Request) -> httpx.Response:
        body = request.read()
        assert request.url.path == "/v1/caption_jobs/import"
        for part in (b'filename="captions.jsonl"', b'{"path": "1.png"}', b'name="dataset_id"\r\n\r\nds_1', b"any"):
            assert part in body
        return httpx.Response(202, json=JOB)

    assert connect(answer).import_captions("ds_1", file, language="any").id == "cap_1"


def test_an_export_appears_only_once_it_is_whole(connect: Connect, tmp_path: Path) -> None:
    bodies: list[httpx.SyncByteStream] = [Broken("{"), httpx.ByteStream(b"{}")]

    def answer(request: httpx.Request) -> httpx.Response:
        assert dict(request.url.params) == {"format": "json", "include": "usable"}
        return httpx.Response(200, stream=bodies.pop(0))

    client, path = connect(answer), tmp_path / "captions.json"
    with pytest.raises(httpx.ReadError):
        client.export_captions("cap_1", path, include="usable")
    assert list(tmp_path.iterdir()) == []
    assert client.export_captions("cap_1", path, include="usable") == path
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_export_leaves_nothing(connect: Connect, tmp_path: Path) -> None:
    problem = {"title": "Not found", "status": 404, "detail": "there is no caption job", "code": "not_found"}
    with pytest.raises(CaptuneAPIError, match="there is no caption job"):
        connect(lambda _: httpx.Response(404, json=problem)).export_captions("cap_1", tmp_path / "captions.json")
    assert list(tmp_path.iterdir()) == []


def test_classes_are_renamed_with_a_patch(connect: Connect) -> None:
    dataset = {
        **{"id": "ds_1", "status": "succeeded", "created_at": 0, "name": "pets", "domain": "pets"},
        **{"archive_sha256": "0", "archive_bytes": 1, "split_seed": 0, "val_fraction": 0.1, "test_fraction": 0.2},
    }

    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("PATCH", "/v1/datasets/ds_1")
        assert json.loads(request.content) == {"display_names": {"n01": "tabby"}}
        return httpx.Response(200, json=dataset)

    assert connect(answer).update_dataset("ds_1", display_names={"n01": "tabby"}).name == "pets"
