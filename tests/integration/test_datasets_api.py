import hashlib
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select

from services.captioner.routes import datasets
from shared.core import Core
from shared.datasets.lookup import display_names
from shared.db.models import Caption, Classifier, Dataset, Image, Job
from shared.jobs.worker import Runner
from tests.integration.factories import (
    add_caption,
    add_classifier,
    add_dataset,
    add_job,
    archive,
    caption_request,
    change_job,
    events_of,
    read_job,
)
from tests.integration.support import Api

FORM = {"name": " pets ", "domain": "pets"}


def upload(api: Api, data: bytes, **form: Any) -> Any:
    return api.anna.post("/v1/datasets", data=FORM | form, files={"file": ("pets.zip", data)})


def test_an_upload_is_stored_and_becomes_a_job(api: Api, core: Core) -> None:
    data = archive()
    answer = upload(api, data, split_seed=3, val_fraction=0.25)
    assert answer.status_code == 202
    body = answer.json()
    id = body["id"]
    assert id.startswith("ds_")
    assert answer.headers["Location"] == f"/v1/datasets/{id}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert (body["status"], body["name"], body["split_seed"], body["val_fraction"]) == ("queued", "pets", 3, 0.25)
    assert body["archive_sha256"] == hashlib.sha256(data).hexdigest()
    assert body["archive_bytes"] == len(data)
    assert core.store.read_bytes(f"uploads/{id}") == data
    assert core.queue.waiting("ingest") == {id}
    job = read_job(core, id)
    assert (job.kind, job.owner, job.dataset_id) == ("ingest", "anna", id)


def test_from_upload_to_images(api: Api, core: Core) -> None:
    id = upload(api, archive(("tabby_cat", "dog"), 10)).json()["id"]
    Runner(core, "ingest", "test").run(id)
    body = api.anna.get(f"/v1/datasets/{id}").json()
    assert body["status"] == "succeeded", body["error"]
    assert body["classes"] == [
        {"name": "dog", "display_name": "dog"},
        {"name": "tabby_cat", "display_name": "tabby cat"},
    ]
    assert sum(sum(split.values()) for split in body["counts"].values()) == 20
    images = api.anna.get(f"/v1/datasets/{id}/images", params={"class_name": "dog"}).json()["data"]
    assert len(images) == 10
    for split, counts in body["counts"].items():
        found = api.anna.get(f"/v1/datasets/{id}/images", params={"split": split}).json()["data"]
        assert len(found) == sum(counts.values())
    answer = api.anna.get(f"/v1/images/{images[0]['id']}/content")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert hashlib.sha256(answer.content).hexdigest() == images[0]["sha256"]


@pytest.mark.parametrize(("data", "code"), [(b"%PDF-1.7 not an archive", "unsupported_archive"), (b"", "empty_file")])
def test_what_is_no_archive_is_refused_before_anything_is_made(api: Api, core: Core, data: bytes, code: str) -> None:
    before = uploads(core)
    answer = upload(api, data)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.headers["content-type"] == "application/problem+json"
    with core.transaction() as session:
        assert session.scalars(select(Job)).all() == []
    assert uploads(core) == before


def uploads(core: Core) -> set[str]:
    return {path.name for path in Path(core.store.root, "uploads").glob("*")}


@pytest.mark.parametrize(
    "form", [{"val_fraction": 0.6}, {"test_fraction": 0}, {"split_seed": -1}, {"name": ""}, {"domain": "x" * 101}]
)
def test_fields_out_of_range_are_refused(api: Api, core: Core, form: dict[str, Any]) -> None:
    answer = upload(api, archive(), **form)
    assert (answer.status_code, answer.json()["param"]) == (422, next(iter(form)))
    with core.transaction() as session:
        assert session.scalars(select(Job)).all() == []


def test_a_data_set_in_use_is_not_deleted(api: Api, core: Core) -> None:
    id = add_dataset(core)
    job_id = add_job(core, request=caption_request(id), dataset_id=id)
    for status in ("queued", "running", "paused"):
        change_job(core, job_id, status=status)
        answer = api.anna.delete(f"/v1/datasets/{id}")
        assert (answer.status_code, answer.json()["code"]) == (409, "in_use")
        assert job_id in answer.json()["detail"]
    change_job(core, job_id, status="cancelled")
    assert api.anna.delete(f"/v1/datasets/{id}").status_code == 204


def test_a_data_set_still_ingesting_is_not_deleted(api: Api, core: Core) -> None:
    id = add_dataset(core, status="running")
    assert api.anna.delete(f"/v1/datasets/{id}").status_code == 409


def test_deleting_takes_images_and_captions_and_leaves_classifiers(api: Api, core: Core) -> None:
    id = add_dataset(core, images=2)
    core.store.put_bytes(f"uploads/{id}", b"the archive")
    captions = add_job(core, request=caption_request(id), dataset_id=id, status="succeeded")
    with core.transaction() as session:
        images = session.scalars(select(Image)).all()
    for image in images:
        add_caption(core, image, captions)
    classifier = add_classifier(core, id, {"top1": 0.5})
    assert api.anna.delete(f"/v1/datasets/{id}").status_code == 204
    assert api.anna.get(f"/v1/datasets/{id}").status_code == 404
    assert api.anna.get(f"/v1/caption_jobs/{captions}").status_code == 404
    assert api.anna.get(f"/v1/images/{images[0].id}/content").status_code == 404
    with core.transaction() as session:
        assert session.scalars(select(Image)).all() == []
        assert session.scalars(select(Caption)).all() == []
        assert session.get(Classifier, classifier) is not None
    assert not core.store.exists(f"uploads/{id}")
    assert api.anna.get(f"/v1/classifiers/{classifier}").status_code == 200
    assert {job["dataset_id"] for job in api.anna.get("/v1/fine_tuning/jobs").json()["data"]} == {id}


def edit(api: Api, id: str, **body: Any) -> Any:
    return api.anna.patch(f"/v1/datasets/{id}", json=body)


def test_classes_are_given_names_for_their_codes(api: Api, core: Core) -> None:
    id = add_dataset(core)
    answer = edit(api, id, display_names={"cat": "  Maine  Coon "})
    assert answer.status_code == 200, answer.text
    named = [{"name": "cat", "display_name": "Maine Coon"}, {"name": "dog", "display_name": "dog"}]
    assert answer.json()["classes"] == named
    assert edit(api, id, name=" pets of 2024 ").json()["name"] == "pets of 2024"
    assert edit(api, id, display_names={"cat": "dog", "dog": "cat"}).status_code == 200  # both at once: no collision
    body = api.anna.get(f"/v1/datasets/{id}").json()
    assert (body["name"], [c["display_name"] for c in body["classes"]]) == ("pets of 2024", ["dog", "cat"])
    with core.transaction() as session:
        assert display_names(session.get_one(Dataset, id)) == {"cat": "dog", "dog": "cat"}


def test_names_of_classes_belong_to_the_fingerprint(api: Api, core: Core) -> None:
    """Prompts and prefixes say them: runs before and after are not ranked together."""
    id = add_dataset(core, images=2)
    found = [edit(api, id, display_names={"cat": name}).json()["fingerprint"] for name in ("tom", "cat", "tom", "puss")]
    assert found[0] == found[2]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"display_names": {"bird": "robin"}}, "unknown_class"),
        ({"display_names": {"cat": "dog"}}, "class_names_collide"),
        ({"display_names": {"cat": "DOG"}}, "class_names_collide"),
        ({"display_names": {"cat": "a-b", "dog": "a b"}}, "class_names_collide"),
        ({"display_names": {"cat": "  "}}, "bad_class_name"),
        ({"display_names": {"cat": "-_"}}, "bad_class_name"),
        ({"display_names": {"cat": "x" * 201}}, "bad_class_name"),
        ({"display_names": {"cat": "a\tb"}}, "bad_class_name"),
        ({"display_names": {"cat": None}}, "invalid_request"),
        ({"name": "  "}, "invalid_request"),
        ({"name": "x" * 201}, "invalid_request"),
        ({"domain": "birds"}, "invalid_request"),
        ({}, "invalid_request"),
    ],
)
def test_names_that_tell_nothing_apart_are_refused(api: Api, core: Core, body: dict[str, Any], code: str) -> None:
    id = add_dataset(core)
    answer = edit(api, id, **body)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    shown = api.anna.get(f"/v1/datasets/{id}").json()
    assert (shown["name"], [c["display_name"] for c in shown["classes"]]) == ("pets", ["cat", "dog"])


def test_classes_keep_their_names_while_a_job_uses_them(api: Api, core: Core) -> None:
    id = add_dataset(core)
    job_id = add_job(core, request=caption_request(id), dataset_id=id)
    for status in ("queued", "running", "paused"):
        change_job(core, job_id, status=status)
        answer = edit(api, id, display_names={"cat": "tabby"}, name="renamed")
        assert (answer.status_code, answer.json()["code"]) == (409, "in_use")
        assert job_id in answer.json()["detail"]
        assert api.anna.get(f"/v1/datasets/{id}").json()["name"] == "pets"  # all of an edit or nothing
    assert edit(api, id, name="renamed").status_code == 200  # no prompt holds the data set's name
    change_job(core, job_id, status="succeeded")
    assert edit(api, id, display_names={"cat": "tabby"}).status_code == 200
    ingesting = add_dataset(core, status="running", classes=None)
    assert edit(api, ingesting, display_names={"cat": "tabby"}).json()["code"] == "dataset_not_ready"
    assert api.reader.patch(f"/v1/datasets/{id}", json={"name": "mine"}).status_code == 403


def test_a_classifier_being_scored_is_not_deleted(api: Api, core: Core) -> None:
    id = add_classifier(core, add_dataset(core), {"top1": 0.5})
    core.store.put_bytes(f"classifiers/{id}/weights", b"w")
    job_id = api.anna.post("/v1/evaluations", json={"classifier_id": id, "split": "val"}).json()["id"]
    answer = api.anna.delete(f"/v1/classifiers/{id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "in_use")
    assert api.anna.post(f"/v1/evaluations/{job_id}/cancel").status_code == 202
    assert api.anna.delete(f"/v1/classifiers/{id}").status_code == 204
    assert api.anna.get(f"/v1/classifiers/{id}").status_code == 404
    assert not core.store.exists(f"classifiers/{id}")


@pytest.mark.parametrize("status", ["queued", "running", "paused", "failed", "cancelled"])
def test_a_data_set_that_is_not_ready_cannot_be_used(api: Api, core: Core, status: str) -> None:
    body = {"dataset_id": add_dataset(core, status=status)}
    for path, more in {"/v1/caption_jobs": {}, "/v1/fine_tuning/jobs": {"method": {"type": "flyp"}}}.items():
        answer = api.anna.post(path, json=body | more)
        assert (answer.status_code, answer.json()["code"]) == (409, "dataset_not_ready")


def test_a_caption_job_takes_the_domain_from_the_data_set(api: Api, core: Core) -> None:
    made = api.anna.post("/v1/caption_jobs", json={"dataset_id": add_dataset(core, domain="flowers")}).json()
    assert made["request"]["domain"] == "flowers"
    body = {"dataset_id": made["dataset_id"], "domain": "roses"}
    assert api.anna.post("/v1/caption_jobs", json=body).json()["request"]["domain"] == "roses"
    assert api.anna.post("/v1/caption_jobs", json=body | {"characteristics": []}).status_code == 422


def test_captions_of_a_job_and_of_a_class(api: Api, core: Core) -> None:
    id = add_dataset(core, images=1)
    first, second = (add_job(core, request=caption_request(id), dataset_id=id, status="succeeded") for _ in range(2))
    with core.transaction() as session:
        cat, dog = session.scalars(select(Image).order_by(Image.class_name)).all()
    of_cat = add_caption(core, cat, first, "whiskers")
    of_dog = add_caption(core, dog, second, "a wet nose")

    def found(**params: str) -> set[str]:
        return {row["id"] for row in api.anna.get(f"/v1/datasets/{id}/captions", params=params).json()["data"]}

    assert found() == {of_cat, of_dog}
    assert found(caption_job_id=first) == {of_cat}
    assert found(class_name="dog") == {of_dog}
    assert found(class_name="dog", caption_job_id=first) == set()
    row = api.anna.get(f"/v1/datasets/{id}/captions", params={"class_name": "cat"}).json()["data"][0]
    assert (row["text"], row["path"], row["class_name"]) == ("whiskers", cat.path, "cat")


def test_the_actions_of_a_job(api: Api, core: Core) -> None:
    id = api.anna.post("/v1/caption_jobs", json={"dataset_id": add_dataset(core)}).json()["id"]
    for action, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = api.anna.post(f"/v1/caption_jobs/{id}/{action}")
        assert (answer.status_code, answer.json()["status"]) == (202, status)
        assert api.anna.get(answer.headers["Location"]).json()["id"] == id
        assert answer.headers["Retry-After"]
    for action in ("cancel", "pause", "resume"):
        answer = api.anna.post(f"/v1/caption_jobs/{id}/{action}")
        assert answer.status_code == 409
        assert "cancelled" in answer.json()["detail"]
    assert [event.type for event in events_of(core, id)] == [
        "job.created",
        "job.paused",
        "job.requeued",
        "job.cancelled",
    ]


def test_no_transaction_waits_for_the_copy_of_an_upload(api: Api, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of many GB, and holds a connection and what it has locked."""
    put, held = core.store.put_file, []

    def look(key: str, source: Any) -> None:
        held.append(core.db.engine.pool.status())
        put(key, source)

    monkeypatch.setattr(core.store, "put_file", look)
    headers = {"Idempotency-Key": "once"}
    answer = api.anna.post("/v1/datasets", data=FORM, files={"file": ("pets.zip", archive())}, headers=headers)
    assert answer.status_code == 202
    id = answer.json()["id"]
    change_job(core, id, status="succeeded")
    files = {"file": ("captions.json", b'{"1.png": "a cat"}')}
    assert api.anna.post("/v1/caption_jobs/import", data={"dataset_id": id}, files=files).status_code == 202
    assert len(held) == 2
    assert all("Current Checked out connections: 0" in each for each in held), held


def test_what_an_upload_stored_goes_where_it_is_refused(api: Api, core: Core) -> None:
    stored = Path(core.store.root, "uploads")
    before = set(stored.glob("*"))
    files = {"file": ("captions.json", b'{"1.png": "a cat"}')}
    answer = api.anna.post("/v1/caption_jobs/import", data={"dataset_id": "ds_none"}, files=files)
    assert answer.status_code == 404
    assert set(stored.glob("*")) == before


def test_a_large_data_set_is_deleted_in_statements_of_bounded_time_and_as_a_whole(
    api: Api, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "AT_ONCE", 2)
    id = add_dataset(core, images=7)
    captioned = add_job(core, request=caption_request(id), dataset_id=id, status="succeeded")
    with core.transaction() as session:
        images = session.scalars(select(Image).where(Image.dataset_id == id)).all()
    for image in images:
        add_caption(core, image, captioned, "a cat")
    with monkeypatch.context() as failing:
        failing.setattr(datasets, "bump", lambda *_: 1 / 0)  # at the end of the transaction
        assert api.anna.delete(f"/v1/datasets/{id}").status_code == 500
    assert len(api.anna.get(f"/v1/datasets/{id}/images").json()["data"]) == len(images)
    sizes: list[int] = []

    def count(_c: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM images"):
            sizes.append(cursor.rowcount)

    event.listen(core.db.engine, "after_cursor_execute", count)
    try:
        assert api.anna.delete(f"/v1/datasets/{id}").status_code == 204
    finally:
        event.remove(core.db.engine, "after_cursor_execute", count)
    assert max(sizes) == 2
    assert sum(sizes) == len(images)
    with core.transaction() as session:
        assert session.scalars(select(Caption).where(Caption.dataset_id == id)).all() == []
