"""One owner's things do not exist for another; the routes come from the OpenAPI document, so that no new one is
forgotten here."""

from dataclasses import dataclass

import pytest
from fastapi import FastAPI
from sqlalchemy import select

from shared.core import Core
from shared.db.models import Image
from tests.integration.evaluations import add_predictions, card_of
from tests.integration.factories import (
    add_caption,
    add_checkpoint,
    add_classifier,
    add_dataset,
    add_group,
    add_job,
    caption_request,
    fine_tune_request,
    read_job,
)
from tests.integration.support import Api

# Bodies of the routes that need one to get as far as looking for the thing.
BODIES: dict[tuple[str, str], dict[str, object]] = {
    ("PATCH", "/v1/datasets/{id}"): {"name": "ours", "display_names": {"cat": "ours"}},
    ("PATCH", "/v1/captions/{id}"): {"text": "ours", "excluded": True},
    ("PATCH", "/v1/classifiers/{id}"): {"tags": ["ours"], "pinned": True},
    ("POST", "/v1/fine_tuning/groups/{id}/runs"): {"methods": [{"type": "zero_shot"}]},
    ("POST", "/v1/fine_tuning/groups/{id}/soup"): {},
}


@dataclass
class Belongings:
    """One thing of every kind."""

    dataset: str
    image: str
    caption_job: str
    caption: str
    fine_tuning_job: str
    classifier: str
    evaluation: str
    group: str

    def id_in(self, path: str) -> str:
        prefixes = {
            "/v1/datasets/": self.dataset,
            "/v1/images/": self.image,
            "/v1/caption_jobs/": self.caption_job,
            "/v1/captions/": self.caption,
            "/v1/fine_tuning/jobs/": self.fine_tuning_job,
            "/v1/classifiers/": self.classifier,
            "/v1/evaluations/": self.evaluation,
            "/v1/fine_tuning/groups/": self.group,
        }
        return next(id for prefix, id in prefixes.items() if path.startswith(prefix))


@pytest.fixture
def annas(core: Core) -> Belongings:
    dataset = add_dataset(core, images=1)
    with core.transaction() as session:
        image = session.scalars(select(Image).order_by(Image.id)).first()
    assert image is not None
    caption_job = add_job(core, "caption", request=caption_request(dataset), dataset_id=dataset, status="succeeded")
    caption = add_caption(core, image, caption_job)
    fine_tuning_job = add_job(core, "fine_tune", request=fine_tune_request(dataset), dataset_id=dataset)
    add_checkpoint(core, fine_tuning_job)
    core.store.put_bytes("classifiers/1/captune.json", card_of().model_dump_json().encode())
    classifier = add_classifier(core, dataset, {"top1": 0.5}, storage_key="classifiers/1")
    evaluation = add_job(core, "evaluate", request={"classifier_id": classifier, "split": "val"}, dataset_id=dataset)
    add_predictions(core, evaluation, classifier, dataset)
    group = add_group(core, dataset)
    return Belongings(dataset, image.id, caption_job, caption, fine_tuning_job, classifier, evaluation, group)


def operations(app: FastAPI, *, with_id: bool) -> list[tuple[str, str]]:
    return [
        (method.upper(), path)
        for path, found in app.openapi()["paths"].items()
        for method in found
        if path.startswith("/v1/") and ("{id}" in path) == with_id and not path.startswith("/v1/keys")
    ]


def test_another_owners_ids_are_404_in_every_route(api: Api, app: FastAPI, annas: Belongings) -> None:
    found = operations(app, with_id=True)
    assert len(found) > 25
    assert all(path.count("{") == 1 for _, path in found)
    for method, path in found:
        address = path.replace("{id}", annas.id_in(path))
        answer = api.ben.request(method, address, json=BODIES.get((method, path)))
        assert answer.status_code == 404, f"{method} {address}: {answer.text}"
        assert answer.json()["code"] == "not_found"
        if method == "GET":
            for who in (api.anna, api.admin):
                assert who.get(address).status_code == 200, f"{method} {address}"


def test_bens_tries_changed_nothing(api: Api, core: Core, annas: Belongings) -> None:
    for action in ("cancel", "pause", "resume"):
        api.ben.post(f"/v1/fine_tuning/jobs/{annas.fine_tuning_job}/{action}")
    api.ben.patch(f"/v1/datasets/{annas.dataset}", json={"name": "ours", "display_names": {"cat": "ours"}})
    api.ben.patch(f"/v1/captions/{annas.caption}", json={"text": "ours"}, headers={"If-Match": "*"})
    api.ben.delete(f"/v1/datasets/{annas.dataset}")
    api.ben.delete(f"/v1/classifiers/{annas.classifier}")
    api.ben.post(f"/v1/fine_tuning/groups/{annas.group}/runs", json={"methods": [{"type": "zero_shot"}]})
    assert read_job(core, annas.fine_tuning_job).status == "queued"
    dataset = api.anna.get(f"/v1/datasets/{annas.dataset}").json()
    assert (dataset["name"], dataset["classes"][0]["display_name"]) == ("pets", "cat")
    assert api.anna.get(f"/v1/fine_tuning/groups/{annas.group}").json()["runs"] == 0
    caption = api.anna.get(f"/v1/captions/{annas.caption}").json()
    assert (caption["text"], caption["version"]) == ("a soft coat", 1)
    assert api.anna.get(f"/v1/classifiers/{annas.classifier}").status_code == 200


def test_an_unknown_id_reads_the_same_as_another_owners(api: Api, annas: Belongings) -> None:
    theirs = api.ben.get(f"/v1/datasets/{annas.dataset}").json()
    unknown = api.ben.get("/v1/datasets/ds_nothing").json()
    assert theirs["detail"].replace(annas.dataset, "X") == unknown["detail"].replace("ds_nothing", "X")


def test_lists_show_ones_own_and_an_admin_all(api: Api, app: FastAPI, core: Core, annas: Belongings) -> None:
    bens = add_dataset(core, "ben")
    for method, path in operations(app, with_id=False):
        if method != "GET" or path in ("/v1/leaderboard", "/v1/leaderboard/compare", "/v1/fine_tuning/methods"):
            continue
        mine, theirs, everyones = (
            {item["id"] for item in who.get(path).json()["data"]} for who in (api.anna, api.ben, api.admin)
        )
        assert mine, path
        assert theirs == ({bens} if path == "/v1/datasets" else set()), path
        assert everyones == mine | theirs, path


def test_what_a_query_or_a_body_names_is_looked_for_among_ones_own(api: Api, core: Core, annas: Belongings) -> None:
    bens = add_dataset(core, "ben")
    assert api.ben.get("/v1/leaderboard", params={"dataset_id": annas.dataset}).status_code == 404
    answer = api.ben.get(f"/v1/datasets/{bens}/captions", params={"caption_job_id": annas.caption_job})
    assert answer.status_code == 404
    for path, body in {
        "/v1/caption_jobs": {"dataset_id": annas.dataset},
        "/v1/caption_jobs/preview": {"dataset_id": annas.dataset, "live": True},
        "/v1/fine_tuning/jobs": {"dataset_id": annas.dataset, "method": {"type": "zero_shot"}},
        "/v1/fine_tuning/groups": {"dataset_id": annas.dataset, "methods": [{"type": "zero_shot"}]},
        "/v1/evaluations": {"classifier_id": annas.classifier},
    }.items():
        assert api.ben.post(path, json=body).status_code == 404, path
    for body in ({}, {"caption_ids": [annas.caption]}):
        redo = {"dataset_id": bens, "redo": {"caption_job_id": annas.caption_job, **body}}
        assert api.ben.post("/v1/caption_jobs", json=redo).status_code == 404
        assert api.ben.post("/v1/caption_jobs/preview", json=redo).status_code == 404
    for name, theirs in {"image_id": annas.image, "q": "coat", "class_name": "cat"}.items():
        assert api.ben.get(f"/v1/datasets/{bens}/captions", params={name: theirs}).json()["data"] == []
    body = {"dataset_id": bens, "caption_job_id": annas.caption_job, "method": {"type": "mmft"}}
    assert api.ben.post("/v1/fine_tuning/jobs", json=body).status_code == 404
    many = {"dataset_id": bens, "caption_job_ids": [annas.caption_job]}
    assert api.ben.post("/v1/fine_tuning/groups", json=many).status_code == 404
    for path in ("/v1/caption_jobs", "/v1/fine_tuning/jobs", "/v1/evaluations"):
        assert api.ben.get(path).json()["data"] == []
        assert api.ben.get(path, params={"dataset_id": annas.dataset}).json()["data"] == []


def test_what_an_admin_starts_belongs_to_the_owner_of_the_data(api: Api, core: Core, annas: Belongings) -> None:
    made = [
        api.admin.post("/v1/caption_jobs", json={"dataset_id": annas.dataset}),
        api.admin.post("/v1/evaluations", json={"classifier_id": annas.classifier, "split": "train"}),
        api.admin.post("/v1/fine_tuning/jobs", json={"dataset_id": annas.dataset, "method": {"type": "flyp"}}),
    ]
    for answer in made:
        assert answer.status_code == 202, answer.text
        assert read_job(core, answer.json()["id"]).owner == "anna"
