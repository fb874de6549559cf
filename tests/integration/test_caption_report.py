"""`GET /v1/caption_jobs/{id}/report`."""

from typing import Any

import pytest
from sqlalchemy import select

from services.captioner.routes import report as module
from shared.core import Core
from shared.db.models import Image
from tests.integration.factories import (
    add_caption,
    add_dataset,
    add_job,
    caption_request,
    change_job,
    share_caption,
)
from tests.integration.support import Api


@pytest.fixture
def job(core: Core) -> tuple[str, Image, Image]:
    dataset = add_dataset(core, images=1)
    with core.transaction() as session:
        cat, dog = session.scalars(select(Image).order_by(Image.class_name)).all()
    return add_job(core, request=caption_request(dataset), dataset_id=dataset, status="succeeded"), cat, dog


def read(api: Api, job_id: str) -> dict[str, Any]:
    answer = api.anna.get(f"/v1/caption_jobs/{job_id}/report")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_the_captions_of_a_job_in_figures(api: Api, core: Core, job: tuple[str, Image, Image]) -> None:
    job_id, cat, dog = job
    score = {"clip_score": 0.5, "retrieval_rank": 1, "retrieval_of": 2}
    add_caption(core, cat, job_id, "a grey cat", key="1", clip_tokens=9, agreement=score)
    add_caption(
        core,
        dog,
        job_id,
        "a grey dog",
        key="2",
        clip_tokens=77,
        agreement=score | {"clip_score": 1.0, "retrieval_rank": 2},
    )
    long = add_caption(core, dog, job_id, "", key="3", clip_tokens=78, flags=["over_budget", "empty"], excluded=True)
    edited = add_caption(
        core,
        dog,
        job_id,
        "so soft",
        key="4",
        characteristic="shape",
        original_text="x",
        flags=["empty"],
        job_flags=["duplicate"],
    )
    elsewhere = add_job(core, request=caption_request(cat.dataset_id), dataset_id=cat.dataset_id, status="succeeded")
    add_caption(core, cat, elsewhere, "not of this job", key="5", flags=["refusal"])
    share_caption(core, edited, elsewhere, ["low_agreement"], score | {"clip_score": 2.0})

    report = read(api, job_id)
    assert (report["images"], report["captions"], report["excluded"], report["edited"]) == (2, 4, 1, 1)
    assert report["flags"] == {"empty": 2, "duplicate": 1, "over_budget": 1}
    assert report["characteristics"] == {"visual": 3, "shape": 1}
    assert report["budget"] == 77
    held = {(b["low"], b["high"]): b["captions"] for b in report["tokens"] if b["captions"]}
    assert held == {(1, 10): 1, (11, 20): 1, (71, 77): 1, (78, 87): 1}
    assert report["words_mean"] == pytest.approx((3 + 3 + 0 + 2) / 4)
    assert report["distinct_1"] == pytest.approx(6 / 8)
    assert report["distinct_2"] == pytest.approx(4 / 5)
    assert report["distinct_sample"] == 4
    assert report["agreement"] == {"clip_score": 0.75, "recall_at_1": 0.5}
    assert {flag: [c["id"] for c in some] for flag, some in report["examples"].items()} == {
        "empty": sorted([long, edited]),
        "over_budget": [long],
        "duplicate": [edited],
    }
    assert [(c["flags"], c["agreement"]) for c in report["examples"]["duplicate"]] == [(["empty", "duplicate"], None)]
    other = read(api, elsewhere)
    assert (other["flags"], other["agreement"]) == (
        {"empty": 1, "low_agreement": 1, "refusal": 1},
        {"clip_score": 2.0, "recall_at_1": 1.0},
    )
    assert report["examples"]["over_budget"][0]["path"] == dog.path


def test_a_job_without_captions(api: Api, job: tuple[str, Image, Image]) -> None:
    report = read(api, job[0])
    assert (report["captions"], report["words_mean"], report["distinct_1"]) == (0, 0.0, 0.0)
    assert (report["flags"], report["examples"], report["agreement"]) == ({}, {}, None)


def test_five_examples_and_the_same_sample_each_time(
    api: Api, core: Core, job: tuple[str, Image, Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE", 3)
    for i in range(8):
        add_caption(core, job[1], job[0], "same " * i + f"word{i}", key=str(i), flags=["repetition"])
    report = read(api, job[0])
    assert report["distinct_sample"] == 3
    assert len(report["examples"]["repetition"]) == 5
    assert report["flags"] == {"repetition": 8}
    assert read(api, job[0]) == report


def test_the_budget_is_that_of_the_jobs_clip(api: Api, core: Core) -> None:
    dataset = add_dataset(core)
    request = caption_request(dataset) | {"clip_model": "ViT-B-32/openai"}
    id = add_job(core, request=request, dataset_id=dataset, status="succeeded")
    assert read(api, id)["budget"] == 77
    change_job(core, id, result={"budget": 64})
    report = read(api, id)
    assert (report["budget"], report["tokens"][-1]["high"]) == (64, 64)
    answer = api.anna.get(f"/v1/caption_jobs/{dataset}/report")  # an id, but of no caption job
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
