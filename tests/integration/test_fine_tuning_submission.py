from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from services.trainer.routes.submission import identity
from shared.core import Core
from shared.db.models import Job, LeaderboardVersion
from tests.integration.factories import (
    add_checkpoint,
    add_classifier,
    add_dataset,
    add_job,
    caption_request,
    change_job,
    read_job,
)
from tests.integration.support import Api


@pytest.fixture
def dataset_id(core: Core) -> str:
    return add_dataset(core)


@pytest.fixture
def captions(core: Core, dataset_id: str) -> str:
    return add_job(core, request=caption_request(dataset_id), dataset_id=dataset_id, status="succeeded")


def jobs(core: Core) -> list[Job]:
    with core.transaction() as session:
        return list(session.scalars(select(Job).where(Job.kind == "fine_tune")))


def submit(api: Api, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = api.anna.post("/v1/fine_tuning/jobs", json=body)
    return answer.status_code, answer.json()


def refused(api: Api, core: Core, status: int, code: str, param: str, **body: Any) -> str:
    answer = submit(api, **body)
    assert (answer[0], answer[1]["code"], answer[1].get("param")) == (status, code, param), answer
    assert jobs(core) == [], "a refused request made a job"
    return str(answer[1]["detail"])


def test_an_accepted_job_has_every_default_written_out(api: Api, core: Core, dataset_id: str, captions: str) -> None:
    status, job = submit(
        api, dataset_id=dataset_id, caption_job_id=captions, method={"type": "mmft", "hyperparameters": {"epochs": 3}}
    )
    assert status == 202
    assert (job["object"], job["status"], job["model"]) == ("fine_tuning.job", "queued", "starter")
    assert job["method"]["type"] == "mmft"
    assert job["method"]["hyperparameters"]["epochs"] == 3
    assert {"learning_rate", "batch_size", "w"} <= set(job["method"]["hyperparameters"])
    assert core.queue.waiting("fine_tune") == {row.id for row in jobs(core)}


def test_an_unknown_method(api: Api, core: Core, dataset_id: str) -> None:
    detail = refused(api, core, 422, "unknown_method", "method.type", dataset_id=dataset_id, method={"type": "magic"})
    assert "mmft" in detail, "the message tells which there are"


@pytest.mark.parametrize(
    ("name", "value"), [("lerning_rate", 1e-5), ("epochs", 0), ("epochs", "many"), ("learning_rate", 2), ("w", 1.5)]
)
def test_a_hyperparameter_that_is_unknown_or_out_of_range(
    api: Api, core: Core, dataset_id: str, captions: str, name: str, value: object
) -> None:
    detail = refused(
        api,
        core,
        422,
        "invalid_hyperparameter",
        f"method.hyperparameters.{name}",
        dataset_id=dataset_id,
        caption_job_id=captions,
        method={"type": "mmft", "hyperparameters": {name: value}},
    )
    assert name in detail


def test_captions_are_missing(api: Api, core: Core, dataset_id: str) -> None:
    refused(api, core, 422, "captions_missing", "caption_job_id", dataset_id=dataset_id, method={"type": "mmft"})


def test_captions_that_no_one_reads(api: Api, core: Core, dataset_id: str, captions: str) -> None:
    for method in ("flyp", "zero_shot"):
        body = {"dataset_id": dataset_id, "caption_job_id": captions, "method": {"type": method}}
        refused(api, core, 422, "captions_unused", "caption_job_id", **body)


def test_captions_of_another_data_set(api: Api, core: Core, captions: str) -> None:
    body = {"dataset_id": add_dataset(core), "caption_job_id": captions, "method": {"type": "mmft"}}
    refused(api, core, 422, "captions_of_another_dataset", "caption_job_id", **body)


def test_captions_of_another_split(api: Api, core: Core, dataset_id: str) -> None:
    request = caption_request(dataset_id, "test")
    captions = add_job(core, request=request, dataset_id=dataset_id, status="succeeded")
    body = {"dataset_id": dataset_id, "caption_job_id": captions, "method": {"type": "mmft"}}
    refused(api, core, 422, "captions_of_another_split", "caption_job_id", **body)


@pytest.mark.parametrize("status", ["queued", "running", "paused", "failed", "cancelled"])
def test_captions_that_are_not_ready(api: Api, core: Core, dataset_id: str, captions: str, status: str) -> None:
    change_job(core, captions, status=status)
    body = {"dataset_id": dataset_id, "caption_job_id": captions, "method": {"type": "mmft"}}
    refused(api, core, 409, "captions_not_ready", "caption_job_id", **body)


def test_captions_that_do_not_exist_or_are_no_caption_job(api: Api, core: Core, dataset_id: str) -> None:
    for id in ("cap_nothing", dataset_id):
        body = {"dataset_id": dataset_id, "caption_job_id": id, "method": {"type": "mmft"}}
        status, answer = submit(api, **body)
        assert (status, answer["code"]) == (404, "not_found")
    assert jobs(core) == []


def test_few_shot_validation_without_shots(api: Api, core: Core, dataset_id: str) -> None:
    body = {"dataset_id": dataset_id, "method": {"type": "flyp"}, "validation": "few_shot"}
    refused(api, core, 422, "shots_missing", "shots", **body)
    assert submit(api, **body, shots=4)[0] == 202


@pytest.mark.parametrize(
    "field", [{"validation": "half"}, {"shots": 0}, {"seed": -1}, {"shot_seed": 2**31}, {"suffix": "x" * 65}]
)
def test_fields_out_of_range(api: Api, core: Core, dataset_id: str, field: dict[str, Any]) -> None:
    param = next(iter(field))
    refused(api, core, 422, "invalid_request", param, dataset_id=dataset_id, method={"type": "flyp"}, **field)


def kinds(core: Core) -> Counter[str]:
    return Counter(job.request["method"]["type"] for job in jobs(core))


def test_the_first_run_brings_the_zero_shot_baselines_once(api: Api, core: Core, dataset_id: str) -> None:
    for seed in range(3):
        assert submit(api, dataset_id=dataset_id, method={"type": "flyp"}, seed=seed)[0] == 202
    assert kinds(core) == {"flyp": 3, "zero_shot": 1, "zero_shot_ensemble": 1}
    assert submit(api, dataset_id=dataset_id, method={"type": "flyp"}, model="RN50/openai")[0] == 202
    assert kinds(core) == {"flyp": 4, "zero_shot": 2, "zero_shot_ensemble": 2}, "a model has its own"
    assert submit(api, dataset_id=add_dataset(core), method={"type": "flyp"})[0] == 202
    assert kinds(core) == {"flyp": 5, "zero_shot": 3, "zero_shot_ensemble": 3}, "a data set has its own"
    for job in jobs(core):
        if job.request["method"]["type"] != "flyp":
            assert job.request["metadata"]["role"] == "baseline"
            assert (job.owner, job.status) == ("anna", "queued")
            assert read_job(core, job.id).event_seq == 1


def test_submissions_at_once_make_one_baseline(api: Api, core: Core, dataset_id: str) -> None:
    def post(seed: int) -> int:
        return submit(api, dataset_id=dataset_id, method={"type": "flyp"}, seed=seed)[0]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(post, range(8))) == {202}
    assert kinds(core) == {"flyp": 8, "zero_shot": 1, "zero_shot_ensemble": 1}


def test_a_baseline_that_failed_is_made_again(api: Api, core: Core, dataset_id: str) -> None:
    submit(api, dataset_id=dataset_id, method={"type": "flyp"})
    for job in jobs(core):
        if job.request["method"]["type"] == "zero_shot":
            change_job(core, job.id, status="failed")
    submit(api, dataset_id=dataset_id, method={"type": "flyp"}, seed=1)
    assert kinds(core) == {"flyp": 2, "zero_shot": 2, "zero_shot_ensemble": 1}


def test_a_run_that_draws_nothing_does_not_depend_on_what_is_drawn(api: Api, core: Core, dataset_id: str) -> None:
    body = {"dataset_id": dataset_id, "method": {"type": "zero_shot"}, "shots": 4, "seed": 7, "shot_seed": 8}
    _, job = submit(api, **body, validation="few_shot")
    assert (job["shots"], job["seed"], job["shot_seed"], job["validation"]) == (None, 0, 0, "none")
    assert kinds(core) == {"zero_shot": 1, "zero_shot_ensemble": 1}, "what the user asked for is the baseline"


def test_the_methods_are_listed_with_their_ranges(api: Api) -> None:
    methods = {method["name"]: method for method in api.reader.get("/v1/fine_tuning/methods").json()["data"]}
    assert {"mmft", "flyp", "zero_shot", "zero_shot_ensemble"} <= set(methods)
    assert methods["mmft"]["needs_captions"]
    assert not methods["flyp"]["needs_captions"]
    assert not methods["zero_shot"]["trains"]
    assert methods["mmft"]["hyperparameters"]["properties"]["epochs"]["minimum"] == 1


def test_a_baseline_whose_classifier_was_deleted_is_made_again(api: Api, core: Core, dataset_id: str) -> None:
    submit(api, dataset_id=dataset_id, method={"type": "flyp"})
    for job in jobs(core):
        change_job(core, job.id, status="succeeded")  # and no classifier is left of it
    submit(api, dataset_id=dataset_id, method={"type": "flyp"}, seed=1)
    assert kinds(core) == {"flyp": 2, "zero_shot": 2, "zero_shot_ensemble": 2}


def test_a_preset_and_the_same_numbers_by_hand_are_one_setting(api: Api, core: Core, dataset_id: str) -> None:
    paper = submit(api, dataset_id=dataset_id, method={"type": "flyp", "preset": "paper"})[1]["method"]
    by_hand = {"type": "flyp", "hyperparameters": paper["hyperparameters"]}
    assert (
        submit(api, dataset_id=dataset_id, method=by_hand)[1]["method"]["hyperparameters"] == paper["hyperparameters"]
    )
    assert paper["hyperparameters"]["epochs"] == 50, "every one is written out"
    first, second = (identity(job.request) for job in jobs(core) if job.request["method"]["type"] == "flyp")
    assert first == second


def test_an_unknown_preset(api: Api, core: Core, dataset_id: str) -> None:
    method = {"type": "flyp", "preset": "best"}
    refused(api, core, 422, "invalid_request", "method.preset", dataset_id=dataset_id, method=method)


@pytest.mark.parametrize("validation", ["full", "few_shot"])
def test_validation_on_a_data_set_without_val_images(api: Api, core: Core, validation: str) -> None:
    counts = {"train": {"cat": 6, "dog": 6}, "val": {}, "test": {"cat": 2, "dog": 2}}
    body = {"dataset_id": add_dataset(core, counts=counts), "shots": 4, "validation": validation}
    for method in ("flyp", "linear_probe"):
        detail = refused(api, core, 422, "no_val_split", "validation", **body, method={"type": method})
    assert "val_fraction" in detail, "the message says what to do"
    assert submit(api, **body | {"validation": "none"}, method={"type": "flyp"})[0] == 202
    assert submit(api, **body, method={"type": "zero_shot"})[0] == 202, "which chooses nothing"


def test_an_interpolation_chosen_on_val_without_validation(api: Api, core: Core, dataset_id: str) -> None:
    method = {"type": "flyp", "hyperparameters": {"wise_ft": "val"}}
    param = "method.hyperparameters.wise_ft"
    body = {"dataset_id": dataset_id, "method": method, "validation": "none"}
    refused(api, core, 422, "invalid_hyperparameter", param, **body)


def test_a_hyperparameter_that_would_be_ignored(api: Api, core: Core, dataset_id: str) -> None:
    method = {"type": "flyp", "hyperparameters": {"lora_rank": 8}}
    param = "method.hyperparameters.lora_rank"
    detail = refused(api, core, 422, "invalid_hyperparameter", param, dataset_id=dataset_id, method=method)
    assert "ignored" in detail


def test_what_a_method_without_training_depends_on(api: Api, core: Core, dataset_id: str, captions: str) -> None:
    """Its shots say whose captions; a probe's seed draws nothing but its shots."""
    body = {"dataset_id": dataset_id, "shots": 4, "shot_seed": 3, "seed": 9, "checkpoints": "best_and_last"}
    _, averaged = submit(api, **body, caption_job_id=captions, method={"type": "caption_prototypes"})
    shown = ("shots", "shot_seed", "seed", "validation", "checkpoints")
    assert [averaged[name] for name in shown] == [4, 3, 3, "none", "best"]
    _, probe = submit(api, **body, method={"type": "linear_probe"})
    assert [probe[name] for name in shown] == [4, 3, 3, "full", "best"]
    _, whole = submit(api, **body | {"shots": None}, method={"type": "linear_probe"})
    assert [whole[name] for name in shown] == [None, 0, 0, "full", "best"]
    _, trained = submit(api, **body | {"shots": None}, method={"type": "flyp"})
    assert [trained[name] for name in shown] == [None, 0, 9, "full", "best_and_last"]


def test_a_classifier_is_tagged_and_pinned(api: Api, core: Core, dataset_id: str) -> None:
    id = add_classifier(core, dataset_id, {"top1": 0.5})
    path = f"/v1/classifiers/{id}"
    assert api.anna.patch(path, json={"tags": ["a", "b", "a"]}).json()["tags"] == ["a", "b"]
    pinned = api.anna.patch(path, json={"pinned": True}).json()
    assert (pinned["pinned"], pinned["tags"]) == (True, ["a", "b"])
    listed = api.anna.get("/v1/classifiers", params={"tag": "b"}).json()["data"]
    assert [each["id"] for each in listed] == [id]
    assert api.anna.get("/v1/classifiers", params={"tag": "c"}).json()["data"] == []
    assert api.anna.patch(path, json={"tags": [""]}).status_code == 422
    assert api.anna.patch(path, json={"setting": "x"}).status_code == 422
    assert api.reader.patch(path, json={"pinned": False}).status_code == 403


def test_a_deleted_classifier_takes_its_files_along(api: Api, core: Core, dataset_id: str) -> None:
    id = add_classifier(core, dataset_id, {"top1": 0.5})
    row = api.anna.get(f"/v1/classifiers/{id}").json()
    add_checkpoint(core, row["job_id"], kind="last", key="classifiers/last")
    for key in (row["storage_key"], "classifiers/last"):
        core.store.put_bytes(f"{key}/head.safetensors", b"x")
    version = leaderboard_version_of(core, dataset_id)
    assert api.anna.delete(f"/v1/classifiers/{id}").status_code == 204
    assert not core.store.exists(row["storage_key"])
    assert not core.store.exists("classifiers/last")
    assert leaderboard_version_of(core, dataset_id) > version
    assert api.anna.get(f"/v1/classifiers/{id}").status_code == 404


def leaderboard_version_of(core: Core, dataset_id: str) -> int:
    with core.transaction() as session:
        row = session.get(LeaderboardVersion, dataset_id)
        return 0 if row is None else row.version
