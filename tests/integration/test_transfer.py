"""Captions made elsewhere, from upload to rows, against the real database and store."""

import json
import signal
from collections.abc import Callable
from subprocess import Popen
from typing import Any

import pytest
from sqlalchemy import func, select

from services.captioner.transfer import importing
from shared.core import Core
from shared.db.models import Caption, CaptionJobItem, Job
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.claim import Claim
from shared.jobs.worker import Runner
from shared.schemas.captions import CaptionImport
from tests.integration.factories import add_dataset, change_job, events_of, read_job
from tests.integration.support import UPLOAD_LIMIT, Api, wait_for
from tests.integration.transfers import PATHS, brought, captions_of, send, texts, uploads, with_images


@pytest.fixture(autouse=True)
def _no_uploads(core: Core) -> None:
    """The store outlives a test, and jobs that a test never ran leave their file."""
    for path in uploads(core):
        path.unlink()


@pytest.fixture
def dataset_id(core: Core) -> str:
    return with_images(core, PATHS)


CONTENT = {
    "train/cat/1.png": ["A cat with a soft grey coat.", {"caption": "A round cat.", "characteristic": "shape"}],
    "3.jpg": "A dog that runs on grass.",
    "1.png": "Which one?",
    "9.png": "Nowhere to be seen.",
    "val/dog/1.png": 7,
}


def test_an_import_is_a_caption_job(api: Api, core: Core, dataset_id: str) -> None:
    answer = send(api, dataset_id, json.dumps(CONTENT))
    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert answer.headers["Location"] == f"/v1/caption_jobs/{body['id']}"
    assert (body["status"], body["dataset_id"], body["request"]["source"]) == ("queued", dataset_id, "import")
    assert (body["request"]["format"], body["request"]["file_name"]) == ("json", "captions.json")
    assert core.queue.waiting("caption") == {body["id"]}
    assert core.store.exists(body["request"]["upload_key"])

    Runner(core, "caption", "test").run(body["id"])
    job = api.anna.get(f"/v1/caption_jobs/{body['id']}").json()
    assert job["status"] == "succeeded", job["error"]
    captions = captions_of(api, job)
    assert texts(captions) == [
        ("test/dog/3.jpg", "A dog that runs on grass.", "imported"),
        ("train/cat/1.png", "A cat with a soft grey coat.", "imported"),
        ("train/cat/1.png", "A round cat.", "shape"),
    ]
    for caption in captions:
        assert caption["clip_tokens"] > 8
        provenance = caption["provenance"]
        assert provenance == {"source": "import", "file": "captions.json", "job_id": job["id"], "attempt": 1}
    result = job["result"]
    assert {key: result[key] for key in ("images", "captions", "written", "reused", "matched", "failed")} == {
        **{"images": 2, "captions": 3, "written": 3, "reused": 0},
        **{"matched": 3, "failed": 3},
    }
    assert result["unmatched"] == {"total": 1, "first": ["9.png"]}
    assert result["ambiguous"] == {"total": 1, "first": [{"name": "1.png", "images": [PATHS[0], PATHS[2]]}]}
    assert [(each["where"], each["code"]) for each in result["refused"]["first"]] == [("entry 5", "not_text")]
    assert [(each["path"], each["code"]) for each in result["failures"]] == [
        ("1.png", "ambiguous_name"),
        ("9.png", "unknown_file"),
        ("entry 5", "not_text"),
    ]
    assert result["captioner"] == {
        "engine": "import",
        "revision": f"import sha256:{job['request']['sha256']}",
        "precision": "none",
    }
    assert any(event.type == "import.left_out" for event in events_of(core, job["id"]))
    assert uploads(core) == [], "the file is not kept"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,label,caption\ncat/1.png,cat,soft coat\ncat/2.png,cat,round ears\n"),
        ("metadata.jsonl", '{"image": "cat/1.png", "text": "soft coat"}\n{"path": "2.png", "caption": "round ears"}\n'),
        ("captions", '[{"path": "cat/1.png", "text": "soft coat"}, {"file_name": "2.png", "caption": "round ears"}]'),
    ],
)
def test_every_format_ends_as_the_same_captions(api: Api, core: Core, dataset_id: str, name: str, content: str) -> None:
    job = brought(api, core, dataset_id, content, name)
    assert job["status"] == "succeeded", job["error"]
    assert texts(captions_of(api, job)) == [
        ("train/cat/1.png", "soft coat", "imported"),
        ("train/cat/2.png", "round ears", "imported"),
    ]


def test_a_caption_is_flagged_as_it_is_and_kept_as_it_was_written(api: Api, core: Core, dataset_id: str) -> None:
    text = "**Sorry**, the picture shows\na dog. " + "and more " * 100
    content = {PATHS[0]: ["  " + text, "A grey cat sits on a mat."], PATHS[1]: "A grey cat sits on a mat."}
    job = brought(api, core, dataset_id, json.dumps(content))
    captions = {(c["path"], c["text"]): c for c in captions_of(api, job)}
    long = captions[PATHS[0], text.strip()]
    assert "over_budget" in long["flags"]
    assert long["clip_tokens"] > 77
    same = [c["flags"] for (_, text), c in captions.items() if text.startswith("A grey cat")]
    assert sum("duplicate" in flags for flags in same) == 1
    assert job["result"]["flags"]["duplicate"] == 1


def test_a_repeated_import_doubles_nothing(api: Api, core: Core, dataset_id: str) -> None:
    first = brought(api, core, dataset_id, json.dumps(CONTENT))
    again = brought(api, core, dataset_id, json.dumps(CONTENT))
    assert first["id"] != again["id"]
    assert {key: again["result"][key] for key in ("captions", "written", "reused")} == {
        **{"captions": 3, "written": 0, "reused": 3}
    }
    assert [c["id"] for c in captions_of(api, first)] == [c["id"] for c in captions_of(api, again)]


def test_the_same_text_for_another_clip_or_language_is_another_caption(api: Api, core: Core, dataset_id: str) -> None:
    content = json.dumps({PATHS[0]: "Eine cat mit kurzem Fell liegt auf dem Boden und ist m\u00fcde."})
    first = brought(api, core, dataset_id, content)
    other = brought(api, core, dataset_id, content, language="any")
    assert [job["result"]["written"] for job in (first, other)] == [1, 1]
    assert [captions_of(api, job)[0]["flags"] for job in (first, other)] == [["wrong_language"], []]


def test_what_was_left_out_by_hand_stays_out(api: Api, core: Core, dataset_id: str) -> None:
    rows = [{"path": PATHS[0], "text": "A grey cat.", "excluded": True}, {"path": PATHS[1], "text": "A red cat."}]
    content = "\n".join(json.dumps(row) for row in rows)
    job = brought(api, core, dataset_id, content, "captions.jsonl")
    assert {c["text"]: c["excluded"] for c in captions_of(api, job)} == {"A grey cat.": True, "A red cat.": False}
    assert job["result"]["excluded"] == 1
    out = api.anna.get(f"/v1/caption_jobs/{job['id']}/export", params={"format": "csv"}).content
    elsewhere = with_images(core, PATHS)
    again = brought(api, core, elsewhere, out, "captions.csv")
    assert {c["text"]: c["excluded"] for c in captions_of(api, again)} == {"A grey cat.": True, "A red cat.": False}
    assert again["result"]["excluded"] == 1


def test_of_two_names_for_an_image_the_whole_path_counts(api: Api, core: Core, dataset_id: str) -> None:
    content = {"2.png": "by its end", PATHS[1]: "by its path", "x/train/cat/1.png": "one", "cat/1.png": "two"}
    job = brought(api, core, dataset_id, json.dumps(content))
    assert texts(captions_of(api, job)) == [(PATHS[1], "by its path", "imported")]
    result = job["result"]
    assert (result["matched"], result["unmatched"]["total"], result["failed"]) == (1, 0, 3)
    assert result["ambiguous"]["first"] == [
        {"name": "2.png", "images": [PATHS[1]]},
        {"name": "x/train/cat/1.png", "images": [PATHS[0]]},
        {"name": "cat/1.png", "images": [PATHS[0]]},
    ]
    assert "another name in the file means the same: train/cat/2.png" in result["failures"][0]["message"]


def test_nothing_matched_is_a_failure_with_the_first_names(api: Api, core: Core, dataset_id: str) -> None:
    job = brought(api, core, dataset_id, json.dumps({"a.png": "x", "1.png": "y"}))
    assert (job["status"], job["error"]["code"]) == ("failed", "nothing_matched")
    assert "none of the 2 captions" in job["error"]["message"]
    assert "a.png" in job["error"]["message"]
    assert "Write the whole path" in job["error"]["message"]
    assert uploads(core) == []


def test_a_file_that_breaks_off_changes_nothing(api: Api, core: Core, dataset_id: str) -> None:
    job = brought(api, core, dataset_id, json.dumps(CONTENT)[:-1])
    assert (job["status"], job["error"]["code"]) == ("failed", "broken_json")
    with core.transaction() as session:
        assert session.scalar(select(func.count()).select_from(Caption)) == 0
    assert uploads(core) == []


@pytest.mark.parametrize(
    ("content", "name", "fields", "code"),
    [
        (b"", "captions.json", {}, "empty_file"),
        (b"a caption", "1.txt", {}, "unknown_format"),
        (b"a caption", "1.txt", {"format": "txt"}, "unsupported_archive"),
        (b"{}", "captions.json", {"format": "yaml"}, "invalid_request"),
        (b"{}", "captions.json", {"language": "fr"}, "invalid_request"),
        ("path,text".encode("utf-16"), "captions.csv", {}, "not_utf8"),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_job_is_made(
    api: Api, core: Core, dataset_id: str, content: bytes, name: str, fields: dict[str, str], code: str
) -> None:
    answer = send(api, dataset_id, content, name, **fields)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    with core.transaction() as session:
        assert session.scalars(select(Job.id).where(Job.kind == "caption")).all() == []
    assert uploads(core) == []


def test_an_unknown_clip_fails_the_job_and_names_the_field(api: Api, core: Core, dataset_id: str) -> None:
    job = brought(api, core, dataset_id, json.dumps(CONTENT), clip_model="no-such-clip")
    assert (job["status"], job["error"]["code"], job["error"]["param"]) == ("failed", "unknown_model", "clip_model")


def test_an_idempotency_key_is_held_to_the_files_bytes(api: Api, core: Core, dataset_id: str) -> None:
    first = send(api, dataset_id, '{"1.png": "x"}', key="once")
    again = send(api, dataset_id, '{"1.png": "x"}', key="once")
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["Location"] == first.headers["Location"]
    other = send(api, dataset_id, '{"1.png": "y"}', key="once")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len(uploads(core)) == 1


def test_an_upload_may_be_larger_than_other_bodies_but_not_without_bound(api: Api, dataset_id: str) -> None:
    large = json.dumps({f"{i}.png": "x" * 1000 for i in range(100)})
    assert send(api, dataset_id, large).status_code == 202
    too_large = send(api, dataset_id, "x" * (UPLOAD_LIMIT + 1))
    assert (too_large.status_code, too_large.json()["code"]) == (413, "body_too_large")
    for client, status in ((api.nobody, 401), (api.reader, 403)):
        answer = client.post("/v1/caption_jobs/import", content=b"x" * (UPLOAD_LIMIT - 1))
        assert answer.status_code == status, "before the body is read"


def test_another_owners_data_set_and_job_are_404(api: Api, core: Core, dataset_id: str) -> None:
    file = {"file": ("captions.json", b'{"1.png": "x"}')}
    answer = api.ben.post("/v1/caption_jobs/import", data={"dataset_id": dataset_id}, files=file)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    job = brought(api, core, dataset_id, json.dumps(CONTENT))
    assert api.ben.get(f"/v1/caption_jobs/{job['id']}/export").status_code == 404
    assert api.admin.get(f"/v1/caption_jobs/{job['id']}/export").status_code == 200
    made = api.admin.post("/v1/caption_jobs/import", data={"dataset_id": dataset_id}, files=file)
    assert read_job(core, made.json()["id"]).owner == "anna"


def test_an_import_touches_its_own_data_set_only(api: Api, core: Core, dataset_id: str) -> None:
    with_images(core, ["train/cat/only.png"], owner="ben")
    with_images(core, ["train/cat/only.png"])
    job = brought(api, core, dataset_id, '{"only.png": "elsewhere", "2.png": "here"}')
    assert texts(captions_of(api, job)) == [("train/cat/2.png", "here", "imported")]


def test_a_data_set_is_not_deleted_under_an_import_nor_imported_to_afterwards(
    api: Api, core: Core, dataset_id: str
) -> None:
    job_id = send(api, dataset_id, json.dumps(CONTENT)).json()["id"]
    assert api.anna.delete(f"/v1/datasets/{dataset_id}").json()["code"] == "in_use"
    api.anna.post(f"/v1/caption_jobs/{job_id}/cancel")
    assert api.anna.delete(f"/v1/datasets/{dataset_id}").status_code == 204
    assert send(api, dataset_id, json.dumps(CONTENT)).status_code == 404
    still = add_dataset(core, status="running")
    assert send(api, still, json.dumps(CONTENT)).json()["code"] == "dataset_not_ready"


MANY = {PATHS[0]: [f"caption number {i} of many" for i in range(25)]}


def interrupted(monkeypatch: pytest.MonkeyPatch, act: Callable[[Claim], None]) -> None:
    """Chunks of ten captions; after the first one, `act` happens."""
    write, seen = importing._write, []

    def once(claim: Claim, rows: list[dict[str, Any]]) -> None:
        write(claim, rows)
        seen.append(len(rows))
        if len(seen) == 1:
            act(claim)

    monkeypatch.setattr(importing, "CHUNK", 10)
    monkeypatch.setattr(importing, "_write", once)


def test_a_cancelled_import_stops_at_its_next_step(
    api: Api, core: Core, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(claim: Claim) -> None:
        api.anna.post(f"/v1/caption_jobs/{claim.id}/cancel")
        wait_for(lambda: claim._flags.cancel)

    interrupted(monkeypatch, cancel)
    job = brought(api, core, dataset_id, json.dumps(MANY))
    assert (job["status"], job["result"]) == ("cancelled", None)
    assert len(captions_of(api, job)) == 10
    assert uploads(core) == []


def test_an_import_that_broke_off_goes_on_and_doubles_nothing(
    api: Api, core: Core, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: Claim) -> None:
        raise RuntimeError("out of memory")

    interrupted(monkeypatch, crash)
    job = brought(api, core, dataset_id, json.dumps(MANY))
    assert (job["status"], len(captions_of(api, job)), len(uploads(core))) == ("queued", 10, 1)
    change_job(core, job["id"], run_after=None)
    Runner(core, "caption", "test").run(job["id"])
    job = api.anna.get(f"/v1/caption_jobs/{job['id']}").json()
    assert job["status"] == "succeeded", job["error"]
    assert {key: job["result"][key] for key in ("matched", "captions", "written", "reused")} == {
        **{"matched": 25, "captions": 25, "written": 25, "reused": 0}
    }
    captions = captions_of(api, job)
    assert sorted(c["text"] for c in captions) == sorted(MANY[PATHS[0]])
    assert {c["provenance"]["attempt"] for c in captions} == {1, 2}
    assert uploads(core) == []


def test_a_killed_worker_loses_and_doubles_no_caption(core: Core, spawn: Callable[..., Popen[bytes]]) -> None:
    paths = [f"train/{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(300)]
    dataset_id = with_images(core, paths)
    total, job_id = 12_000, new_id("cap")
    lines = (
        json.dumps({"path": paths[i % 300], "caption": f"caption {i} {i * 7919 % 1000} words"}) for i in range(total)
    )
    key = f"uploads/{job_id}"
    core.store.put_bytes(key, "\n".join(lines).encode())
    request = CaptionImport(dataset_id=dataset_id, format="jsonl", file_name="many.jsonl", sha256="0", upload_key=key)
    with core.transaction() as session:
        job = {"id": job_id, "kind": "caption", "owner": "anna", "dataset_id": dataset_id}
        ledger.create(session, request=request.model_dump(), **job)

    def captions() -> int:
        with core.transaction() as session:
            items = select(func.count()).select_from(CaptionJobItem).where(CaptionJobItem.job_id == job_id)
            return session.scalar(items) or 0

    lease = {"CAPTUNE_LEASE_SECONDS": "2"}
    first = spawn("shared.jobs.worker", "caption", **lease)
    wait_for(lambda: captions() > 0, 60)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 0 < captions() < total
    spawn("shared.jobs.reconciler", **lease)
    spawn("shared.jobs.worker", "caption", **lease)
    wait_for(lambda: read_job(core, job_id).status == "succeeded", 120)
    done = read_job(core, job_id)
    assert done.attempt == 2
    assert done.result is not None
    assert (done.result["captions"], done.result["written"], captions()) == (total, total, total)
    with core.transaction() as session:
        assert session.scalar(select(func.count()).select_from(Caption)) == total
    assert not core.store.exists(key)
