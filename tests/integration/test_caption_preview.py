"""Dry runs, against the real embedded caption model."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from services.captioner.captioning import planning
from services.captioner.captioning.planning import asks
from services.captioner.engines import build
from services.captioner.serving.batcher import Batcher
from services.captioner.settings import EngineSpec
from shared.clip.templates import prefixed
from shared.clip.tokens import token_counter
from shared.core import Core
from shared.db.models import Caption, CaptionJobItem, Dataset, Image, Job
from shared.schemas.captions import CaptionJobRequest
from shared.web.api import create_api
from shared.web.auth import create_key
from tests.integration.conftest import ROUTERS
from tests.integration.factories import add_caption, add_dataset, add_job, caption_request
from tests.integration.support import Api, client, wait_for

TEMPLATE = {
    "name": "ears",
    "template": "Which ears has this {class_name}? {words} words, as {json: 1}, on its {characteristic}.",
}


@pytest.fixture(scope="module")
def batcher() -> Iterator[Batcher]:
    batcher = Batcher(build("attributes", EngineSpec()), max_wait_ms=1)
    batcher.start()
    wait_for(lambda: batcher.state != "loading", 120)
    assert batcher.ready, batcher.error
    yield batcher
    batcher.stop()


@pytest.fixture
def serving(core: Core, batcher: Batcher) -> FastAPI:
    """The routes in a process that serves models: one that is loaded, and one that is not."""
    app = create_api("Captune", core, ROUTERS)
    app.state.batchers = {"attributes": batcher, "asleep": Batcher(build("asleep", EngineSpec()))}
    return app


@pytest.fixture
def anna(serving: FastAPI, core: Core) -> TestClient:
    with core.transaction() as session:
        _, secret = create_key(session, owner="anna", name="test", scopes=("write",))
    return client(serving, secret)


def preview(who: TestClient, dataset: str, **fields: Any) -> dict[str, Any]:
    answer = who.post("/v1/caption_jobs/preview", json={"dataset_id": dataset, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def pictures(core: Core, dataset: str) -> list[Image]:
    with core.transaction() as session:
        return list(session.scalars(select(Image).where(Image.dataset_id == dataset).order_by(Image.id)))


def stored(core: Core) -> tuple[int, int, int]:
    with core.transaction() as session:
        counts = [session.scalar(select(func.count()).select_from(t)) or 0 for t in (Caption, CaptionJobItem, Job)]
    return counts[0], counts[1], counts[2]


def test_a_dry_run_counts_and_estimates_and_stores_nothing(anna: TestClient, core: Core, batcher: Batcher) -> None:
    dataset = add_dataset(core, images=3)
    before = stored(core)
    body = preview(anna, dataset, samples_per_prompt=2)
    assert (body["images"], body["captions"], body["reusable"], body["model_calls"]) == (6, 36, 0, 36)
    rate = batcher.rate()
    assert rate is not None
    assert body["estimated_seconds"] == pytest.approx(36 / rate.captions_per_second, abs=0.06)
    assert body["estimated_prompt_tokens"] == round(36 * rate.prompt_tokens_per_caption) > 0
    assert body["estimated_completion_tokens"] == round(36 * rate.completion_tokens_per_caption) > 0
    assert [each["characteristic"] for each in body["examples"]] == ["visual", "shape", "texture"]
    assert all(each["text"] is None for each in body["examples"])
    assert body["image_id"] == pictures(core, dataset)[0].id
    assert stored(core) == before


@pytest.mark.parametrize(("fields", "images"), [({"shots": 1}, 2), ({"limit": 3}, 3), ({"shots": 2, "limit": 1}, 1)])
def test_the_images_are_those_the_job_would_take(
    anna: TestClient, core: Core, fields: dict[str, int], images: int
) -> None:
    assert preview(anna, add_dataset(core, images=3), **fields)["images"] == images


def test_the_prompt_is_final_with_display_names_and_plain_braces(anna: TestClient, core: Core) -> None:
    classes = [{"name": "cat", "display_name": "n02123045"}, {"name": "dog", "display_name": "wire-haired terrier"}]
    dataset = add_dataset(core, images=1, classes=classes, domain="pets")
    dog = next(image for image in pictures(core, dataset) if image.class_name == "dog")
    body = preview(anna, dataset, image_id=dog.id, words=30, characteristics=["color", TEMPLATE])
    assert (body["class_name"], body["display_name"], body["path"]) == ("dog", "wire-haired terrier", dog.path)
    color, ears = body["examples"]
    assert color["prompt"].startswith("To differentiate this wire-haired terrier photo from other pets photos")
    assert ears == {
        "characteristic": "ears",
        "prompt": "Which ears has this wire-haired terrier? 30 words, as {json: 1}, on its ears.",
        "raw": None,
        "text": None,
        "clip_tokens": None,
        "flags": [],
    }


def test_what_exists_costs_no_call_here_and_in_other_data_sets_of_the_owner(
    anna: TestClient, core: Core, batcher: Batcher
) -> None:
    dataset = add_dataset(core, images=2)
    twin = add_dataset(core, images=2)  # the same bytes
    add_dataset(core, "ben", images=2)
    request = CaptionJobRequest(dataset_id=dataset, domain="pets")
    job = add_job(core, request=caption_request(dataset), dataset_id=dataset, status="succeeded")
    image = pictures(core, dataset)[0]
    for characteristic, _, _, key in asks(request, {"revision": batcher.engine.revision}, image.class_name)[:2]:
        add_caption(core, image, job, key=key, characteristic=characteristic)
    for id in (dataset, twin):
        body = preview(anna, id)
        assert (body["captions"], body["reusable"], body["model_calls"]) == (12, 2, 10)
    assert preview(anna, dataset, temperature=0.9)["reusable"] == 0
    assert preview(anna, dataset, mode="overwrite")["model_calls"] == 12


def test_bens_captions_are_not_reused(anna: TestClient, core: Core, batcher: Batcher) -> None:
    bens = add_dataset(core, "ben", images=1)
    job = add_job(core, owner="ben", request=caption_request(bens), dataset_id=bens, status="succeeded")
    request = CaptionJobRequest(dataset_id=bens, domain="pets")
    image = pictures(core, bens)[0]
    for _, _, _, key in asks(request, {"revision": batcher.engine.revision}, image.class_name):
        add_caption(core, image, job, key=key)
    assert preview(anna, add_dataset(core, images=1))["reusable"] == 0


def test_a_redo_counts_what_it_asks_for_anew(anna: TestClient, core: Core, batcher: Batcher) -> None:
    dataset = add_dataset(core, images=2)
    job = add_job(
        core,
        request=CaptionJobRequest(dataset_id=dataset, domain="pets").model_dump(),
        dataset_id=dataset,
        status="succeeded",
    )
    first, second, *_ = pictures(core, dataset)
    add_caption(core, first, job, key="1", flags=["refusal"], characteristic="shape")
    add_caption(core, second, job, key="2")
    body = preview(anna, dataset, redo={"caption_job_id": job, "flag": "refusal"})
    assert (body["images"], body["captions"], body["model_calls"]) == (1, 1, 1)
    assert body["image_id"] == first.id


def test_live_shows_what_would_be_kept(anna: TestClient, core: Core) -> None:
    dataset = add_dataset(core, images=1)
    before = stored(core)
    body = preview(anna, dataset, live=True, samples_per_prompt=2)
    assert len(body["examples"]) == 3
    counter = token_counter("starter", core.settings.model_cache)
    for each in body["examples"]:
        assert each["raw"]
        assert each["text"]
        assert each["clip_tokens"] == counter.count(prefixed(body["display_name"], each["text"])) <= 77
    assert len({each["text"] for each in body["examples"]}) == 3
    assert stored(core) == before


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"engine": "llava"}, 422, "unknown_engine", "engine"),
        ({"engine": "asleep"}, 503, "engine_unavailable", None),
        (
            {"characteristics": [{"name": "x", "template": "a {class}"}]},
            422,
            "unknown_template_field",
            "characteristics",
        ),
        ({"clip_model": "ViT-nothing"}, 422, "unknown_model", "clip_model"),
        ({"image_id": "img_nothing"}, 404, "not_found", "image_id"),
        ({"split": "val"}, 422, "empty_split", "split"),
        ({"words": 4}, 422, "invalid_request", "words"),
        ({"lively": True}, 422, "invalid_request", "lively"),
    ],
)
def test_what_a_job_would_be_refused_for_is_refused(
    anna: TestClient, core: Core, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = anna.post("/v1/caption_jobs/preview", json={"dataset_id": add_dataset(core, images=1), **fields})
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem.get("param")) == (status, code, param), problem
    assert answer.headers["content-type"] == "application/problem+json"


def test_an_image_of_another_data_set_is_not_found(anna: TestClient, core: Core) -> None:
    theirs = pictures(core, add_dataset(core, "ben", images=1))[0].id
    body = {"dataset_id": add_dataset(core, images=1), "image_id": theirs}
    assert anna.post("/v1/caption_jobs/preview", json=body).status_code == 404


def test_an_unknown_engine_is_refused_at_submission_where_models_are_served(
    anna: TestClient, api: Api, core: Core
) -> None:
    body = {"dataset_id": add_dataset(core, images=1), "engine": "llava"}
    answer = anna.post("/v1/caption_jobs", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_engine")
    assert "asleep, attributes" in answer.json()["detail"]
    assert api.anna.post("/v1/caption_jobs", json=body).status_code == 202  # that process cannot know


def test_a_process_without_models_says_so(api: Api, core: Core) -> None:
    answer = api.anna.post("/v1/caption_jobs/preview", json={"dataset_id": add_dataset(core, images=1)})
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")
    assert api.reader.post("/v1/caption_jobs/preview", json={"dataset_id": "ds"}).status_code == 403


def test_a_data_set_that_is_not_ready(anna: TestClient, core: Core) -> None:
    body = {"dataset_id": add_dataset(core, status="running")}
    answer = anna.post("/v1/caption_jobs/preview", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "dataset_not_ready")
    with core.transaction() as session:
        assert len(session.scalars(select(Dataset)).all()) == 1


def test_images_that_are_deleted_meanwhile_are_none(anna: TestClient, core: Core, monkeypatch: Any) -> None:
    dataset = add_dataset(core)
    monkeypatch.setattr(planning, "image_pages", lambda *_: iter([[]]))
    answer = anna.post("/v1/caption_jobs/preview", json={"dataset_id": dataset})
    assert (answer.status_code, answer.json()["code"]) == (422, "empty_split")
