"""What a caption job's submission fills in, and what it refuses before there is a job."""

from typing import Any

import pytest
from sqlalchemy import select

from shared.core import Core
from shared.db.models import Image, Job
from tests.integration.factories import add_caption, add_dataset, add_job, change_job
from tests.integration.support import Api

BASE = {
    "characteristics": ["shape", {"name": "ears", "template": "Its {characteristic}?"}],
    "words": 20,
    "domain": "cats and dogs",
    "shots": 4,
    "limit": 10,
    "seed": 5,
    "clip_model": "ViT-B-32/openai",
}


def submit(api: Api, dataset: str, **fields: Any) -> Any:
    return api.anna.post("/v1/caption_jobs", json={"dataset_id": dataset, **fields})


@pytest.fixture
def base(api: Api, core: Core) -> tuple[str, str, list[str]]:
    """A data set, its finished job, and the job's captions: shape, shape (a refusal), ears."""
    dataset = add_dataset(core, images=1)
    answer = submit(api, dataset, **BASE)
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    change_job(core, job, status="succeeded")
    with core.transaction() as session:
        cat, dog = session.scalars(select(Image).order_by(Image.class_name)).all()
    ids = [
        add_caption(core, cat, job, key="1", characteristic="shape"),
        add_caption(core, dog, job, key="2", characteristic="shape", flags=["refusal"], excluded=True),
        add_caption(core, dog, job, key="3", characteristic="ears"),
    ]
    return dataset, job, ids


def test_a_redo_takes_over_what_is_not_sent_and_draws_anew(api: Api, base: tuple[str, str, list[str]]) -> None:
    dataset, job, _ = base
    answer = submit(api, dataset, redo={"caption_job_id": job, "flag": "refusal"})
    assert answer.status_code == 202, answer.text
    request = answer.json()["request"]
    assert request["seed"] == 5 + 1009
    for name in ("characteristics", "words", "domain", "clip_model"):
        assert request[name] == BASE[name], name
    assert (request["shots"], request["limit"]) == (None, None)  # the selection says which images
    assert (request["redo"]["caption_job_id"], request["redo"]["flag"]) == (job, "refusal")


def test_what_is_sent_with_a_redo_holds_also_where_it_is_the_default(
    api: Api, base: tuple[str, str, list[str]]
) -> None:
    dataset, job, _ = base
    sent = {"seed": 0, "words": 50, "domain": "pets"}
    request = submit(api, dataset, redo={"caption_job_id": job}, **sent).json()["request"]
    assert {name: request[name] for name in sent} == sent
    assert request["clip_model"] == BASE["clip_model"]


def test_leaving_a_field_out_of_a_redo_is_another_request_than_sending_its_default(
    api: Api, base: tuple[str, str, list[str]]
) -> None:
    dataset, job, _ = base
    body = {"dataset_id": dataset, "redo": {"caption_job_id": job}}
    key = {"Idempotency-Key": "once"}
    first = api.anna.post("/v1/caption_jobs", json=body, headers=key).json()["id"]
    assert api.anna.post("/v1/caption_jobs", json=body, headers=key).json()["id"] == first
    answer = api.anna.post("/v1/caption_jobs", json=body | {"seed": 0}, headers=key)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("selection", "accepted"),
    [
        ({}, True),
        ({"class_name": "dog", "flag": "refusal"}, True),
        ({"excluded": True}, True),
        ({"class_name": "cat", "flag": "refusal"}, False),
        ({"flag": "empty"}, False),
        ({"class_name": "bird"}, False),
    ],
)
def test_a_selection_that_holds_nothing_is_refused(
    api: Api, core: Core, base: tuple[str, str, list[str]], selection: dict[str, Any], accepted: bool
) -> None:
    dataset, job, _ = base
    answer = submit(api, dataset, redo={"caption_job_id": job, **selection})
    assert answer.status_code == (202 if accepted else 422), answer.text
    if not accepted:
        assert answer.json()["param"] == "redo"
        with core.transaction() as session:
            assert len(session.scalars(select(Job).where(Job.kind == "caption")).all()) == 1


def test_captions_named_one_by_one_are_the_jobs(api: Api, core: Core, base: tuple[str, str, list[str]]) -> None:
    dataset, job, ids = base
    assert submit(api, dataset, redo={"caption_job_id": job, "caption_ids": ids[:2]}).status_code == 202
    other = add_job(core, request={"dataset_id": dataset}, dataset_id=dataset, status="succeeded")
    with core.transaction() as session:
        image = session.scalars(select(Image)).first()
    assert image is not None
    foreign = add_caption(core, image, other, key="9")
    for wrong in (foreign, "txt_nothing"):
        answer = submit(api, dataset, redo={"caption_job_id": job, "caption_ids": [ids[0], wrong]})
        assert (answer.status_code, answer.json()["param"]) == (422, "redo.caption_ids")
        assert wrong in answer.json()["detail"]
        assert ids[0] not in answer.json()["detail"]


def test_a_redo_of_what_is_not_there(api: Api, core: Core, base: tuple[str, str, list[str]]) -> None:
    dataset, job, _ = base
    assert submit(api, add_dataset(core), redo={"caption_job_id": job}).status_code == 404
    assert submit(api, dataset, redo={"caption_job_id": "cap_nothing"}).status_code == 404
    change_job(core, job, status="running")
    assert submit(api, dataset, redo={"caption_job_id": job}).status_code == 409


def test_what_does_not_go_with_what_is_taken_over(api: Api, core: Core, base: tuple[str, str, list[str]]) -> None:
    dataset, job, _ = base
    answer = submit(api, dataset, redo={"caption_job_id": job}, samples_per_prompt=3, temperature=0.5)
    again = answer.json()["id"]
    change_job(core, again, status="succeeded")
    with core.transaction() as session:
        image = session.scalars(select(Image)).first()
    assert image is not None
    add_caption(core, image, again, key="7", characteristic="shape")
    answer = submit(api, dataset, redo={"caption_job_id": again}, temperature=0)
    assert (answer.status_code, answer.json()["param"]) == (422, "redo"), answer.text
    assert "samples_per_prompt" in answer.json()["detail"]


def test_an_import_can_be_redone_by_a_model(api: Api, core: Core, base: tuple[str, str, list[str]]) -> None:
    dataset, *_ = base
    request = {
        "source": "import",
        "dataset_id": dataset,
        "format": "csv",
        "file_name": "captions.csv",
        "sha256": "0" * 64,
        "upload_key": "uploads/x",
        "clip_model": "ViT-B-32/openai",
        "language": None,
    }
    imported = add_job(core, request=request, dataset_id=dataset, status="succeeded")
    with core.transaction() as session:
        image = session.scalars(select(Image)).first()
    assert image is not None
    add_caption(core, image, imported, key="import", flags=["refusal"])
    answer = submit(api, dataset, redo={"caption_job_id": imported, "flag": "refusal"}, words=12)
    assert answer.status_code == 202, answer.text
    made = answer.json()["request"]
    assert (made["source"], made["words"], made["clip_model"], made["language"]) == (
        "model",
        12,
        "ViT-B-32/openai",
        None,
    )
    assert api.anna.get(f"/v1/caption_jobs/{imported}").json()["request"]["source"] == "import"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        (
            {"characteristics": [{"name": "x", "template": "a {classname}"}]},
            "unknown_template_field",
            "characteristics",
        ),
        ({"characteristics": [{"name": "Bad Name", "template": "a"}]}, "invalid_request", None),
        ({"characteristics": ["shape", "shape"]}, "invalid_request", None),
        ({"clip_model": "nothing"}, "unknown_model", "clip_model"),
        ({"clip_model": "/etc"}, "model_not_allowed", "clip_model"),
        ({"shear_tokens": 8}, "shear_too_short", "shear_tokens"),
        ({"words": 151}, "invalid_request", "words"),
        ({"samples_per_prompt": 2, "temperature": 0}, "invalid_request", None),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    api: Api, core: Core, fields: dict[str, Any], code: str, param: str | None
) -> None:
    answer = submit(api, add_dataset(core, images=1), **fields)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    if param is not None:
        assert answer.json()["param"] == param
    with core.transaction() as session:
        assert session.scalars(select(Job).where(Job.kind == "caption")).all() == []


def test_a_published_clip_is_not_fetched_at_submission(api: Api, core: Core) -> None:
    """This one's tokenizer is on a model hub; the job gets it."""
    answer = submit(api, add_dataset(core, images=1), clip_model="ViT-B-16-SigLIP/webli")
    assert answer.status_code == 202, answer.text
