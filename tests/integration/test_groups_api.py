"""Groups of runs, as their API makes them: multiplied out, each run once, extended, ended, averaged."""

from collections import Counter
from typing import Any

import pytest
from sqlalchemy import func, select

from shared.core import Core
from shared.db.models import Classifier, Job, RunGroup
from tests.integration.factories import (
    add_dataset,
    add_job,
    caption_request,
    change_job,
    read_job,
)
from tests.integration.support import Api

GROUPS = "/v1/fine_tuning/groups"
QUICK = {"epochs": 1}


@pytest.fixture
def dataset_id(core: Core) -> str:
    return add_dataset(core)


@pytest.fixture
def captions(core: Core, dataset_id: str) -> str:
    return add_job(core, request=caption_request(dataset_id), dataset_id=dataset_id, status="succeeded")


def make(api: Api, **body: Any) -> dict[str, Any]:
    answer = api.anna.post(GROUPS, json=body)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"{GROUPS}/{answer.json()['id']}"
    found: dict[str, Any] = answer.json()
    return found


def refused(api: Api, core: Core, status: int, code: str, param: str | None, path: str = GROUPS, **body: Any) -> str:
    before = count(core)
    answer = api.anna.post(path, json=body)
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem.get("param")) == (status, code, param), answer.text
    assert count(core) == before, "a refused request leaves nothing"
    return str(problem["detail"])


def count(core: Core) -> tuple[int, int]:
    with core.transaction() as session:
        return tuple(session.scalar(select(func.count()).select_from(table)) or 0 for table in (Job, RunGroup))  # type: ignore[return-value]


def members(core: Core, group_id: str) -> list[Job]:
    with core.transaction() as session:
        query = select(Job).where(Job.group_id == group_id, Job.kind == "fine_tune").order_by(Job.id)
        return list(session.scalars(query))


def method(job: Job) -> str:
    return str(job.request["method"]["type"])


def test_lists_are_multiplied_out_by_what_each_method_uses(
    api: Api, core: Core, dataset_id: str, captions: str
) -> None:
    names = ("mmft", "flyp", "linear_probe", "caption_prototypes", "zero_shot")
    group = make(
        api,
        name="all",
        dataset_id=dataset_id,
        methods=[{"type": name} for name in names],
        caption_job_ids=[captions],
        shots=[1, None],
        seeds=[0, 1],
        tags=["first"],
    )
    runs = members(core, group["id"])
    expected = {"mmft": 4, "flyp": 4, "linear_probe": 3, "caption_prototypes": 3, "zero_shot": 1}
    assert Counter(map(method, runs)) == expected, "what draws nothing runs once on all images"
    assert (group["runs"], group["counts"], group["scored"], group["status"]) == (15, {"queued": 15}, 0, "running")
    assert group["leaderboard"] == f"/v1/leaderboard?dataset_id={dataset_id}&group_id={group['id']}"
    assert core.queue.waiting("fine_tune") >= {job.id for job in runs}
    for job in runs:
        assert job.request["tags"] == ["first"]
        assert job.request["caption_job_id"] == (captions if method(job) in ("mmft", "caption_prototypes") else None)
        if method(job) in ("mmft", "flyp"):
            assert job.request["shot_seed"] == (job.request["seed"] if job.request["shots"] else 0)
    listed = api.anna.get("/v1/fine_tuning/jobs", params={"group_id": group["id"], "limit": 100}).json()["data"]
    assert {job["id"] for job in listed} == {job.id for job in runs}
    assert {job["group_id"] for job in listed} == {group["id"]}
    with core.transaction() as session:
        alone = session.scalars(select(Job).where(Job.kind == "fine_tune", Job.group_id.is_(None))).all()
    assert [method(job) for job in alone] == ["zero_shot_ensemble"], "the baseline that the group has not itself"


def test_shot_seeds_that_are_given_are_crossed_with_the_seeds(api: Api, core: Core, dataset_id: str) -> None:
    body = {"dataset_id": dataset_id, "shots": [4], "seeds": [0, 1], "shot_seeds": [5, 6]}
    group = make(api, **body, methods=[{"type": "flyp"}, {"type": "gda"}])
    runs = [(method(job), job.request["seed"], job.request["shot_seed"]) for job in members(core, group["id"])]
    assert sorted(runs) == [
        ("flyp", 0, 5), ("flyp", 0, 6), ("flyp", 1, 5), ("flyp", 1, 6), ("gda", 5, 5), ("gda", 6, 6),
    ]  # fmt: skip


def test_what_comes_out_the_same_is_run_once(api: Api, core: Core, dataset_id: str) -> None:
    one = {"dataset_id": dataset_id, "method": {"type": "flyp", "preset": "paper"}}
    paper = api.anna.post("/v1/fine_tuning/jobs", json=one)
    by_hand = {"type": "flyp", "hyperparameters": paper.json()["method"]["hyperparameters"]}
    specs = [{"type": "flyp", "preset": "paper"}, by_hand, {"type": "flyp", "preset": "paper"}]
    group = make(api, dataset_id=dataset_id, methods=specs, seeds=[3, 3], models=["starter", "starter"], shots=[2, 2])
    assert group["runs"] == 1


def test_a_group_that_is_too_large_is_told_how_large(api: Api, core: Core, dataset_id: str) -> None:
    body = {"dataset_id": dataset_id, "methods": [{"type": "flyp"}]}
    detail = refused(api, core, 422, "group_too_large", "body", **body, seeds=list(range(501)), shots=[1, 2])
    assert "1,002 runs" in detail
    assert "at most 1,000" in detail
    many = {"shots": list(range(1, 101)), "seeds": list(range(1000)), "shot_seeds": list(range(1000))}
    assert "100,000,000 runs" in refused(api, core, 422, "group_too_large", "body", **body, **many)


def test_bad_members_are_named(api: Api, core: Core, dataset_id: str, captions: str) -> None:
    good = {"type": "flyp"}
    bad = {"type": "mmft", "hyperparameters": {"epochs": 0}}
    refused(
        api, core, 422, "invalid_hyperparameter", "methods.1.hyperparameters.epochs",
        dataset_id=dataset_id, methods=[good, bad], caption_job_ids=[captions],
    )  # fmt: skip
    body = {"dataset_id": dataset_id, "methods": [good, {"type": "mmft"}]}
    assert "'mmft'" in refused(api, core, 422, "captions_missing", "caption_job_ids", **body)
    body = {"dataset_id": dataset_id, "methods": [good], "caption_job_ids": [captions]}
    refused(api, core, 422, "captions_unused", "caption_job_ids", **body)
    refused(api, core, 422, "unknown_method", "methods.0.type", dataset_id=dataset_id, methods=[{"type": "magic"}])
    refused(api, core, 422, "shots_missing", "shots", dataset_id=dataset_id, methods=[good], validation="few_shot")
    refused(api, core, 422, "invalid_request", "seeds", dataset_id=dataset_id, methods=[good], seeds=[])
    bare = add_dataset(core, counts={"train": {"cat": 2, "dog": 2}, "val": {}, "test": {"cat": 1, "dog": 1}})
    refused(api, core, 422, "no_val_split", "validation", dataset_id=bare, methods=[good])


def test_a_group_is_extended_by_what_it_has_not(api: Api, core: Core, dataset_id: str) -> None:
    group = make(api, dataset_id=dataset_id, methods=[{"type": "flyp"}], shots=[1], seeds=[0, 1])
    path = f"{GROUPS}/{group['id']}/runs"
    change_job(core, members(core, group["id"])[0].id, status="failed")
    answer = api.anna.post(path, json={"methods": [{"type": "flyp"}], "shots": [1, 4], "seeds": [0, 1]})
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"{GROUPS}/{group['id']}"
    runs = [(job.request["shots"], job.request["seed"]) for job in members(core, group["id"])]
    assert sorted(runs[2:]) == [(1, 0), (4, 0), (4, 1)], "what failed is run again, what stands is not"
    assert answer.json()["counts"] == {"failed": 1, "queued": 4}
    again = api.anna.post(path, json={"methods": [{"type": "flyp"}], "shots": [1, 4], "seeds": [0, 1]})
    assert again.json()["runs"] == 5, "nothing is new"
    too_many = {"methods": [{"type": "flyp"}], "shots": [2], "seeds": list(range(996))}
    assert "1,001 runs" in refused(api, core, 422, "group_too_large", "body", path, **too_many)


def test_cancelling_ends_what_is_not_final(api: Api, core: Core, dataset_id: str) -> None:
    group = make(api, dataset_id=dataset_id, methods=[{"type": "flyp"}], seeds=[0, 1, 2])
    waiting, running, done = members(core, group["id"])
    change_job(core, running.id, status="running")
    change_job(core, done.id, status="succeeded")
    answer = api.anna.post(f"{GROUPS}/{group['id']}/cancel")
    assert answer.status_code == 202
    assert answer.json()["counts"] == {"cancelled": 1, "running": 1, "succeeded": 1}
    assert read_job(core, running.id).cancel_requested
    assert read_job(core, waiting.id).status == "cancelled"
    change_job(core, running.id, status="cancelled")
    ended = api.anna.get(f"{GROUPS}/{group['id']}").json()
    assert ended["status"] == "finished"
    assert api.anna.post(f"{GROUPS}/{group['id']}/cancel").status_code == 202, "nothing is left to end"


def test_a_group_stands_by_its_evaluations_too(api: Api, core: Core, dataset_id: str) -> None:
    group = make(api, dataset_id=dataset_id, methods=[{"type": "flyp"}], seeds=[0])
    (run,) = members(core, group["id"])
    change_job(core, run.id, status="succeeded")
    evaluation = add_job(core, "evaluate", dataset_id=dataset_id, group_id=group["id"])
    shown = api.anna.get(f"{GROUPS}/{group['id']}").json()
    assert (shown["status"], shown["scored"]) == ("running", 0)
    change_job(core, evaluation, status="succeeded")
    shown = api.anna.get(f"{GROUPS}/{group['id']}").json()
    assert (shown["status"], shown["scored"]) == ("finished", 1)
    assert [each["id"] for each in api.anna.get(GROUPS, params={"dataset_id": dataset_id}).json()["data"]] == [
        group["id"]
    ]
    assert api.anna.get(GROUPS, params={"dataset_id": "ds_other"}).json()["data"] == []


def test_a_repeated_request_makes_one_group(api: Api, core: Core, dataset_id: str) -> None:
    body = {"dataset_id": dataset_id, "methods": [{"type": "flyp"}], "seeds": [0]}
    headers = {"Idempotency-Key": "once"}
    first, again = (api.anna.post(GROUPS, json=body, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert first.headers["Location"] == again.headers["Location"]
    other = api.anna.post(GROUPS, json=body | {"seeds": [1]}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert count(core)[1] == 1


def test_deleting_the_data_set_leaves_the_group(api: Api, core: Core, dataset_id: str) -> None:
    group = make(api, dataset_id=dataset_id, methods=[{"type": "flyp"}], seeds=[0])
    in_use = api.anna.delete(f"/v1/datasets/{dataset_id}")
    assert (in_use.status_code, in_use.json()["code"]) == (409, "in_use")
    with core.transaction() as session:
        for job in session.scalars(select(Job)):
            job.status = "succeeded"
    assert api.anna.delete(f"/v1/datasets/{dataset_id}").status_code == 204
    assert api.anna.get(f"{GROUPS}/{group['id']}").json()["status"] == "finished"
    path = f"{GROUPS}/{group['id']}/runs"
    assert api.anna.post(path, json={"methods": [{"type": "flyp"}], "seeds": [1]}).status_code == 404


# -- soups ---------------------------------------------------------------------------------------------------------


def trained(core: Core, job: Job, val_top1: float, **columns: Any) -> str:
    """The job as it is once it has succeeded, and its classifier."""
    id = f"clf_{job.id}"
    values: dict[str, Any] = {
        "model": job.request["model"],
        "method": method(job),
        "hyperparameters": job.request["method"]["hyperparameters"],
        "shots": job.request["shots"],
        "shot_seed": job.request["shot_seed"],
        "seed": job.request["seed"],
        "protocol": job.request["validation"],
        "setting": "s",
        "data_fingerprint": "f" * 64,
        "storage_key": f"classifiers/{id}",
        "details": {"val_top1": val_top1},
    }
    with core.transaction() as session:
        row = Classifier(
            id=id, owner=job.owner, job_id=job.id, group_id=job.group_id, dataset_id=str(job.dataset_id),
            **values | columns,
        )  # fmt: skip
        session.add(row)
    change_job(core, job.id, status="succeeded")
    return id


@pytest.fixture
def sweep(api: Api, dataset_id: str) -> dict[str, Any]:
    methods = [{"type": "flyp"}, {"type": "cross_entropy"}, {"type": "linear_probe"}]
    return make(api, dataset_id=dataset_id, methods=methods, shots=[4], seeds=[0, 1], shot_seeds=[7])


def test_a_soup_is_made_of_the_groups_fine_tunes_best_first(
    api: Api, core: Core, dataset_id: str, sweep: dict[str, Any]
) -> None:
    path = f"{GROUPS}/{sweep['id']}/soup"
    runs = [job for job in members(core, sweep["id"]) if method(job) != "linear_probe"]
    detail = refused(api, core, 409, "members_running", None, path)
    assert runs[0].id in detail
    ids = [trained(core, job, val) for job, val in zip(runs, (0.5, 0.9, 0.7, 0.9), strict=True)]
    answer = api.anna.post(path, json={"tags": ["soup"]})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/fine_tuning/jobs/{job['id']}"
    assert job["method"]["type"] == "soup"
    assert job["method"]["hyperparameters"]["classifier_ids"] == [ids[1], ids[3], ids[2], ids[0]]
    assert (job["group_id"], job["shots"], job["shot_seed"], job["validation"], job["tags"]) == (
        sweep["id"], 4, 7, "full", ["soup"],
    )  # fmt: skip
    in_use = api.anna.delete(f"/v1/classifiers/{ids[0]}")
    assert (in_use.status_code, in_use.json()["code"]) == (409, "in_use")
    assert job["id"] in in_use.json()["detail"]
    of_one = api.anna.post(path, json={"method": "flyp"}).json()
    assert sorted(of_one["method"]["hyperparameters"]["classifier_ids"]) == sorted(ids[:2])
    extended = api.anna.post(f"{GROUPS}/{sweep['id']}/runs", json={"methods": [{"type": "flyp"}], "seeds": [0]})
    assert extended.status_code == 202, "a soup is no combination"


def test_what_a_soup_is_not_made_of(api: Api, core: Core, dataset_id: str, sweep: dict[str, Any]) -> None:
    path = f"{GROUPS}/{sweep['id']}/soup"
    refused(api, core, 422, "too_few_members", "model", path, model="other")
    refused(api, core, 422, "too_few_members", "method", path, method="linear_probe")
    runs = [job for job in members(core, sweep["id"]) if method(job) != "linear_probe"]
    for job in runs[:-1]:
        change_job(core, job.id, status="cancelled")
    trained(core, runs[-1], 0.5)
    assert "there are 1" in refused(api, core, 422, "too_few_members", None, path)
    more = {"methods": [{"type": "flyp"}], "shots": [4, 8], "seeds": [0], "shot_seeds": [7]}
    assert api.anna.post(f"{GROUPS}/{sweep['id']}/runs", json=more).status_code == 202
    assert "(4, 8)" in refused(api, core, 422, "soup_ambiguous", "shots", path)
    blind = make(api, dataset_id=dataset_id, methods=[{"type": "flyp"}], seeds=[0, 1], validation="none")
    refused(api, core, 422, "soup_without_validation", "validation", f"{GROUPS}/{blind['id']}/soup")
    frozen = make(api, dataset_id=dataset_id, methods=[{"type": "gda"}], shots=[4], seeds=[0, 1])
    assert "frozen features" in refused(api, core, 422, "too_few_members", "model", f"{GROUPS}/{frozen['id']}/soup")
    unknown = {"dataset_id": dataset_id, "method": {"type": "soup"}}
    assert api.anna.post("/v1/fine_tuning/jobs", json=unknown).json()["code"] == "unknown_method"


def test_renamed_classes_leave_older_members_out(api: Api, core: Core, sweep: dict[str, Any]) -> None:
    runs = [job for job in members(core, sweep["id"]) if method(job) != "linear_probe"]
    for i, job in enumerate(runs):
        trained(core, job, 0.5, data_fingerprint="0" * 64 if i < 2 else "f" * 64)
    answer = api.anna.post(f"{GROUPS}/{sweep['id']}/soup", json={})
    assert len(answer.json()["method"]["hyperparameters"]["classifier_ids"]) == 2
