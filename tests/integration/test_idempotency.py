from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, select

from shared.core import Core
from shared.db.models import Job
from tests.integration.factories import add_classifier, add_dataset, archive
from tests.integration.support import Api


def count(core: Core, kind: str) -> int:
    with core.transaction() as session:
        return session.scalar(select(func.count()).where(Job.kind == kind)) or 0


@pytest.mark.parametrize("kind", ["caption", "evaluate", "fine_tune"])
def test_a_repeated_post_gets_the_first_ones_job(api: Api, core: Core, kind: str) -> None:
    dataset_id = add_dataset(core)
    path, body, other = {
        "caption": ("/v1/caption_jobs", {"dataset_id": dataset_id}, {"dataset_id": dataset_id, "words": 20}),
        "evaluate": (
            "/v1/evaluations",
            {"classifier_id": add_classifier(core, dataset_id)},
            {"classifier_id": "clf_other"},
        ),
        "fine_tune": (
            "/v1/fine_tuning/jobs",
            {"dataset_id": dataset_id, "method": {"type": "flyp"}},
            {"dataset_id": dataset_id, "method": {"type": "flyp"}, "seed": 1},
        ),
    }[kind]
    headers = {"Idempotency-Key": "once"}
    first = api.anna.post(path, json=body, headers=headers)
    assert first.status_code == 202, first.text
    made = count(core, kind)
    again = api.anna.post(path, json=body, headers=headers)
    assert again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["Location"] == first.headers["Location"]
    assert count(core, kind) == made

    refused = api.anna.post(path, json=other, headers=headers)
    assert refused.status_code == 422
    assert refused.json()["code"] == "idempotency_key_reused"
    assert count(core, kind) == made

    assert api.anna.post(path, json=body).json()["id"] != first.json()["id"], "without a key it is a new request"


def test_a_key_is_its_owners(api: Api, core: Core) -> None:
    headers = {"Idempotency-Key": "once"}
    first = api.anna.post("/v1/caption_jobs", json={"dataset_id": add_dataset(core)}, headers=headers)
    second = api.ben.post("/v1/caption_jobs", json={"dataset_id": add_dataset(core, "ben")}, headers=headers)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] != second.json()["id"]


def test_a_refused_request_does_not_use_the_key_up(api: Api, core: Core) -> None:
    headers = {"Idempotency-Key": "once"}
    assert api.anna.post("/v1/evaluations", json={"classifier_id": "clf_no"}, headers=headers).status_code == 404
    body = {"classifier_id": add_classifier(core, add_dataset(core))}
    assert api.anna.post("/v1/evaluations", json=body, headers=headers).status_code == 202


def test_many_at_once_make_one(api: Api, core: Core) -> None:
    dataset_id = add_dataset(core)

    def post(_: int) -> tuple[int, str]:
        answer = api.anna.post("/v1/caption_jobs", json={"dataset_id": dataset_id}, headers={"Idempotency-Key": "once"})
        return answer.status_code, answer.json().get("id") or answer.json()["code"]

    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(post, range(8)))
    assert count(core, "caption") == 1
    assert len({id for status, id in answers if status == 202}) == 1
    assert {code for status, code in answers if status != 202} <= {"in_flight"}


def test_a_repeated_upload_is_stored_once(api: Api, core: Core) -> None:
    form = {"name": "pets", "domain": "pets"}
    headers = {"Idempotency-Key": "once"}

    def upload(data: bytes) -> tuple[int, dict[str, str]]:
        answer = api.anna.post("/v1/datasets", data=form, files={"file": ("pets.zip", data)}, headers=headers)
        return answer.status_code, answer.json()

    before = uploads(core)
    status, first = upload(archive())
    assert status == 202
    assert upload(archive())[1]["id"] == first["id"]
    status, refused = upload(archive(per_class=7))
    assert (status, refused["code"]) == (422, "idempotency_key_reused")
    assert uploads(core) - before == {first["id"]}, "what was not kept is deleted"
    assert count(core, "ingest") == 1


def uploads(core: Core) -> set[str]:
    return {path.name for path in Path(core.store.root, "uploads").glob("*")}


def test_a_repeat_after_the_resource_was_deleted_says_so(api: Api, core: Core) -> None:
    form = {"name": "pets", "domain": "pets"}
    files = {"file": ("pets.zip", archive())}
    headers = {"Idempotency-Key": "once"}
    id = api.anna.post("/v1/datasets", data=form, files=files, headers=headers).json()["id"]
    assert api.anna.post(f"/v1/datasets/{id}/cancel").status_code == 202
    assert api.anna.delete(f"/v1/datasets/{id}").status_code == 204
    answer = api.anna.post("/v1/datasets", data=form, files=files, headers=headers)
    assert answer.status_code == 409, answer.text
    assert id in answer.json()["detail"]
