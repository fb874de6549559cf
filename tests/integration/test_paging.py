import pytest
from fastapi.testclient import TestClient

from shared.core import Core
from shared.jobs import ledger
from tests.integration.factories import add_classifier, add_dataset, add_job, caption_request
from tests.integration.support import Api


def walk(client: TestClient, path: str, limit: int) -> list[str]:
    ids: list[str] = []
    after: str | None = None
    while True:
        page = client.get(path, params={"limit": limit} | ({"after": after} if after else {})).json()
        assert page["object"] == "list"
        found = [str(item.get("id") or item["seq"]) for item in page["data"]]
        ids += found
        assert len(found) == limit or not page["has_more"]
        if not page["has_more"]:
            return ids
        assert page["last_id"] == found[-1]
        after = page["last_id"]


@pytest.mark.parametrize("limit", [1, 4, 12, 13])
def test_pages_hold_each_job_once_newest_first(api: Api, core: Core, limit: int) -> None:
    dataset_id = add_dataset(core)
    ids = [add_job(core, request=caption_request(dataset_id), dataset_id=dataset_id) for _ in range(12)]
    assert walk(api.anna, "/v1/caption_jobs", limit) == sorted(ids, reverse=True)


def test_what_is_added_between_two_pages_moves_nothing(api: Api, core: Core) -> None:
    dataset_id = add_dataset(core)
    ids = sorted(add_classifier(core, dataset_id) for _ in range(6))
    first = api.anna.get("/v1/classifiers", params={"limit": 3}).json()
    add_classifier(core, dataset_id)
    second = api.anna.get("/v1/classifiers", params={"limit": 3, "after": first["last_id"]}).json()
    assert [row["id"] for row in first["data"] + second["data"]] == ids[::-1]
    assert not second["has_more"]


@pytest.mark.parametrize("limit", [2, 5, 10])
def test_images_are_paged_in_a_fixed_order(api: Api, core: Core, limit: int) -> None:
    dataset_id = add_dataset(core, images=5)
    ids = walk(api.anna, f"/v1/datasets/{dataset_id}/images", limit)
    assert len(ids) == 10
    assert ids == sorted(set(ids))


def test_events_are_paged_oldest_first(api: Api, core: Core) -> None:
    job_id = add_job(core)
    with core.transaction() as session:
        for number in range(9):
            ledger.add_event(session, job_id, "log", str(number))
    assert walk(api.anna, f"/v1/caption_jobs/{job_id}/events", 4) == [str(seq) for seq in range(1, 11)]


def test_an_empty_page(api: Api) -> None:
    assert api.anna.get("/v1/datasets").json() == {"object": "list", "data": [], "has_more": False, "last_id": None}


def test_filters(api: Api, core: Core) -> None:
    one, two = add_dataset(core), add_dataset(core)
    queued = add_job(core, request=caption_request(one), dataset_id=one)
    failed = add_job(core, request=caption_request(one), dataset_id=one, status="failed")
    other = add_job(core, request=caption_request(two), dataset_id=two)

    def found(**params: str) -> set[str]:
        return {job["id"] for job in api.anna.get("/v1/caption_jobs", params=params).json()["data"]}

    assert found(dataset_id=one) == {queued, failed}
    assert found(status="queued") == {queued, other}
    assert found(status="failed", dataset_id=one) == {failed}
    assert api.anna.get("/v1/caption_jobs", params={"status": "done"}).status_code == 422
