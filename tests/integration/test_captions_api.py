"""Captions found, read and reviewed over REST."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from sqlalchemy.dialects import postgresql

from services.captioner.routes.captions import Filters
from shared.clip.templates import prefixed
from shared.clip.tokens import token_counter
from shared.core import Core
from shared.db.models import Caption, CaptionJobItem, Image
from shared.web.auth import create_key
from tests.integration.factories import (
    add_caption,
    add_dataset,
    add_job,
    caption_request,
    read_item,
    share_caption,
)
from tests.integration.support import Api, client

BPE = "ViT-B-32/laion2b_s34b_b79k"  # open_clip's own tokenizer; the starter's counts otherwise


@dataclass
class Shelf:
    """A data set with a cat and a dog, and the job that captioned them."""

    dataset: str
    cat: Image
    dog: Image
    job: str


@pytest.fixture
def shelf(core: Core) -> Shelf:
    dataset = add_dataset(core, images=1)
    with core.transaction() as session:
        cat, dog = session.scalars(select(Image).order_by(Image.class_name)).all()
    return Shelf(dataset, cat, dog, new_job(core, dataset))


def new_job(core: Core, dataset: str, **fields: Any) -> str:
    request = caption_request(dataset) | fields
    return add_job(core, request=request, dataset_id=dataset, status="succeeded")


def found(api: Api, dataset: str, **params: Any) -> set[str]:
    answer = api.anna.get(f"/v1/datasets/{dataset}/captions", params=params)
    assert answer.status_code == 200, answer.text
    return {row["id"] for row in answer.json()["data"]}


# -- finding -----------------------------------------------------------------------------------------------------------


def test_every_filter_finds_its_own_and_all_hold_at_once(api: Api, core: Core, shelf: Shelf) -> None:
    plain = add_caption(core, shelf.cat, shelf.job, key="1")
    shape = add_caption(core, shelf.cat, shelf.job, key="2", characteristic="shape")
    doubled = add_caption(core, shelf.dog, shelf.job, key="3", job_flags=["duplicate", "low_agreement"])
    refused = add_caption(core, shelf.dog, shelf.job, key="7", flags=["refusal"])
    left_out = add_caption(core, shelf.dog, shelf.job, key="4", excluded=True)
    edited = add_caption(core, shelf.dog, shelf.job, key="5", original_text="before", edited_by="eva")
    other = add_caption(core, shelf.dog, new_job(core, shelf.dataset), key="6")
    everything = {plain, shape, doubled, refused, left_out, edited, other}

    for params, ids in (
        ({}, everything),
        ({"class_name": "cat"}, {plain, shape}),
        ({"image_id": shelf.dog.id}, everything - {plain, shape}),
        ({"characteristic": "shape"}, {shape}),
        ({"flag": "low_agreement"}, {doubled}),
        ({"flag": "empty"}, set()),
        ({"flag": "refusal"}, {refused}),
        ({"flagged": "any"}, {doubled, refused}),
        ({"flagged": "none"}, everything - {doubled, refused}),
        ({"flag": "duplicate", "caption_job_id": shelf.job}, {doubled}),
        ({"flagged": "any", "caption_job_id": shelf.job}, {doubled, refused}),
        ({"excluded": True}, {left_out}),
        ({"excluded": False}, everything - {left_out}),
        ({"edited": True}, {edited}),
        ({"edited": False}, everything - {edited}),
        ({"caption_job_id": shelf.job}, everything - {other}),
        ({"caption_job_id": shelf.job, "class_name": "dog", "flagged": "none", "excluded": False}, {edited}),
    ):
        assert found(api, shelf.dataset, **params) == ids, params
    answer = api.anna.get(f"/v1/datasets/{shelf.dataset}/captions", params={"flag": "ugly"})
    assert (answer.status_code, answer.json()["param"]) == (422, "flag")


def test_what_a_job_says_of_a_caption_is_told_of_that_job_or_the_newest(api: Api, core: Core, shelf: Shelf) -> None:
    score = {"clip_score": 0.5, "retrieval_rank": 2.0, "retrieval_of": 9.0}
    id = add_caption(
        core, shelf.cat, shelf.job, flags=["over_budget"], job_flags=["low_agreement", "duplicate"], agreement=score
    )
    jobless = add_caption(core, shelf.dog, shelf.job, key="1")
    with core.transaction() as session:
        session.delete(session.get_one(CaptionJobItem, (shelf.job, jobless)))

    def listed(**params: Any) -> tuple[list[str], Any]:
        rows = api.anna.get(f"/v1/datasets/{shelf.dataset}/captions", params=params).json()["data"]
        return next((row["flags"], row["agreement"]) for row in rows if row["id"] == id)

    of_first = (["over_budget", "duplicate", "low_agreement"], score)
    assert listed() == listed(caption_job_id=shelf.job) == of_first
    second = new_job(core, shelf.dataset)
    share_caption(core, id, second, ["duplicate_other_class"])
    assert listed(caption_job_id=shelf.job) == of_first
    newest = api.anna.get(f"/v1/captions/{id}")
    assert newest.headers["ETag"] == '"1"'
    assert (newest.json()["flags"], newest.json()["agreement"]) == (["over_budget", "duplicate_other_class"], None)
    assert listed() == listed(caption_job_id=second) == (["over_budget", "duplicate_other_class"], None)
    for params, ids in (
        ({"flag": "duplicate"}, set()),
        ({"flag": "duplicate", "caption_job_id": shelf.job}, {id}),
        ({"flag": "duplicate", "caption_job_id": second}, set()),
        ({"flag": "duplicate_other_class"}, {id}),
        ({"flag": "over_budget", "caption_job_id": second}, {id}),
        ({"flagged": "none"}, {jobless}),
    ):
        assert found(api, shelf.dataset, **params) == ids, params


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        ("stripe", {"striped", "stripes"}),  # stemmed
        ("striped -grey", {"stripes"}),
        ('"soft coat"', {"soft"}),
        ("grey or white", {"striped", "soft"}),
        ("coat", {"soft", "apart"}),
        ("elephant", set()),
        ("the", set()),
        ("'; drop table captions --", set()),
    ],
)
def test_texts_are_searched_as_web_searches_are_written(
    api: Api, core: Core, shelf: Shelf, q: str, expected: set[str]
) -> None:
    texts = {
        "striped": "A striped, grey back.",
        "stripes": "Thin stripes on the tail.",
        "soft": "The soft coat is white.",
        "apart": "A coat that looks soft.",
    }
    ids = {add_caption(core, shelf.cat, shelf.job, words, key=name): name for name, words in texts.items()}
    assert {ids[id] for id in found(api, shelf.dataset, q=q)} == expected


def test_a_search_reads_its_index(core: Core) -> None:
    """The expression of the query is that of the index; otherwise every text would be parsed anew."""
    compiled = (
        Filters(q="grey stripes")
        .of(select(Caption))
        .compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
    )
    with core.transaction() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))
        plan = "\n".join(session.scalars(text(f"EXPLAIN {compiled}")))
    assert "ix_captions_search" in plan, plan


def test_found_captions_are_paged_by_id(api: Api, core: Core, shelf: Shelf) -> None:
    ids = sorted(add_caption(core, shelf.cat, shelf.job, "grey stripes", key=str(i)) for i in range(5))
    add_caption(core, shelf.cat, shelf.job, "a red nose", key="other")
    path, params = f"/v1/datasets/{shelf.dataset}/captions", {"q": "stripe", "limit": 2}
    seen: list[str] = []
    page = api.anna.get(path, params=params).json()
    while True:
        seen += [row["id"] for row in page["data"]]
        if not page["has_more"]:
            break
        page = api.anna.get(path, params={**params, "after": page["last_id"]}).json()
    assert seen == ids


# -- editing -----------------------------------------------------------------------------------------------------------


def edit(who: TestClient, id: str, version: int | str, **body: Any) -> Any:
    tag = f'"{version}"' if isinstance(version, int) else version
    return who.patch(f"/v1/captions/{id}", json=body, headers={"If-Match": tag})


def test_an_edit_keeps_the_first_text_the_editor_and_a_version(api: Api, app: Any, core: Core, shelf: Shelf) -> None:
    score = {"clip_score": 0.4, "retrieval_rank": 7, "retrieval_of": 9}
    id = add_caption(
        core, shelf.cat, shelf.job, "a soft coat", job_flags=["duplicate", "low_agreement"], agreement=score
    )
    other_job = new_job(core, shelf.dataset)
    share_caption(core, id, other_job, ["low_agreement"], score)
    kept = add_caption(core, shelf.cat, shelf.job, key="2", job_flags=["duplicate"], agreement=score)
    with core.transaction() as session:
        _, secret = create_key(session, owner="anna", name="eva's key", scopes=("write",))
    first = edit(client(app, secret), id, 1, text=" a cat with\n grey stripes ").json()
    assert (first["text"], first["original_text"], first["edited_by"], first["version"]) == (
        "a cat with grey stripes",
        "a soft coat",
        "eva's key",
        2,
    )
    assert first["flags"] == []  # what compared the old text with others went with it
    assert first["agreement"] is None
    assert first["clip_tokens"] != 12
    answer = edit(api.anna, id, 2, text="a cat with white paws")
    assert answer.headers["ETag"] == '"3"'
    second = answer.json()
    assert (second["original_text"], second["edited_by"], second["version"]) == ("a soft coat", "test", 3)
    read = api.anna.get(f"/v1/captions/{id}")
    assert (read.json(), read.headers["ETag"]) == (second, '"3"')
    assert second["provenance"] == {"engine": "attributes"}
    for job in (shelf.job, other_job):
        item = read_item(core, id, job)
        assert (item.flags, item.agreement) == ([], None), job
    with core.transaction() as session:  # null, not the JSON of null
        assert set(session.scalars(select(CaptionJobItem.caption_id).where(CaptionJobItem.agreement.is_(None)))) == {id}
    assert read_item(core, kept, shelf.job).flags == ["duplicate"]


def test_line_breaks_make_no_other_text(api: Api, core: Core, shelf: Shelf) -> None:
    id = add_caption(core, shelf.cat, shelf.job, "a cat with\na soft coat")
    same = edit(api.anna, id, 1, text="a cat with a soft coat").json()
    assert (same["version"], same["text"]) == (1, "a cat with\na soft coat")
    edit(api.anna, id, 1, text="a cat with grey stripes")
    back = edit(api.anna, id, 2, text="a cat with a soft coat").json()
    assert (back["text"], back["original_text"]) == ("a cat with\na soft coat", None)


def test_a_new_text_is_measured_and_flagged(api: Api, core: Core, shelf: Shelf) -> None:
    id = add_caption(core, shelf.cat, shelf.job, flags=["empty"])
    names_dog = edit(api.anna, id, 1, text="A dog with a long tail.").json()
    assert "names_other_class" in names_dog["flags"]
    assert "empty" not in names_dog["flags"]
    long = edit(api.anna, id, 2, text="a cat with " + "grey stripes and " * 40 + "paws").json()
    assert "over_budget" in long["flags"]
    assert long["text"].endswith("paws")  # flagged, not cut: a human wrote it
    assert long["clip_tokens"] > 77


def test_the_length_is_that_of_the_newest_jobs_clip(api: Api, core: Core, shelf: Shelf) -> None:
    words = "a cat of a tortoiseshell-like, brindled piebaldness"
    counted = {}
    for clip_model in ("starter", BPE):
        job = new_job(core, shelf.dataset, clip_model=clip_model)
        id = add_caption(core, shelf.cat, job, key=clip_model)
        edited = edit(api.anna, id, 1, text=words).json()
        counter = token_counter(clip_model, core.settings.model_cache)
        assert edited["clip_tokens"] == counter.count(prefixed("cat", words)), clip_model
        counted[clip_model] = edited["clip_tokens"]
    assert counted["starter"] != counted[BPE]


def test_setting_the_original_text_back_undoes_the_edit(api: Api, core: Core, shelf: Shelf) -> None:
    id = add_caption(core, shelf.cat, shelf.job, "a cat with a soft coat")
    edit(api.anna, id, 1, text="a cat with grey stripes")
    back = edit(api.anna, id, 2, text="a cat with a soft coat").json()
    assert (back["original_text"], back["edited_by"], back["version"]) == (None, None, 3)
    assert found(api, shelf.dataset, edited=True) == set()


def test_leaving_out_and_taking_back_touches_nothing_else(api: Api, core: Core, shelf: Shelf) -> None:
    id = add_caption(core, shelf.cat, shelf.job, job_flags=["duplicate"])
    out = edit(api.anna, id, 1, excluded=True).json()
    assert (out["excluded"], out["version"], out["flags"], out["edited_by"]) == (True, 2, ["duplicate"], None)
    assert out["original_text"] is None
    again = edit(api.anna, id, 2, excluded=True, text="a soft coat").json()
    assert (again["version"], again["flags"]) == (2, ["duplicate"])  # nothing was changed
    assert edit(api.anna, id, 2, excluded=False).json()["excluded"] is False


@pytest.mark.parametrize("tag", ['"2"', 'W/"1"', "1", '"1', ""])
def test_an_edit_of_another_version_is_refused(api: Api, core: Core, shelf: Shelf, tag: str) -> None:
    id = add_caption(core, shelf.cat, shelf.job)
    answer = edit(api.anna, id, tag, text="a cat")
    assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (412, "version_changed", "If-Match")
    assert answer.headers["content-type"] == "application/problem+json"
    assert 'If-Match: "1"' in answer.json()["detail"]
    assert api.anna.get(f"/v1/captions/{id}").json()["text"] == "a soft coat"


@pytest.mark.parametrize("tag", ["*", '"7", "1"'])
def test_any_of_several_tags_may_match(api: Api, core: Core, shelf: Shelf, tag: str) -> None:
    id = add_caption(core, shelf.cat, shelf.job)
    assert edit(api.anna, id, tag, text="a cat").json()["version"] == 2


def test_an_edit_says_which_version_it_was_made_from(api: Api, core: Core, shelf: Shelf) -> None:
    id = add_caption(core, shelf.cat, shelf.job)
    answer = api.anna.patch(f"/v1/captions/{id}", json={"text": "a cat"})
    assert (answer.status_code, answer.json()["code"]) == (428, "version_required")
    assert 'If-Match: "1"' in answer.json()["detail"]


@pytest.mark.parametrize("body", [{}, {"text": "  \n"}, {"text": ""}, {"text": "x" * 4001}, {"flags": []}])
def test_edits_that_say_nothing_or_too_much_are_refused(
    api: Api, core: Core, shelf: Shelf, body: dict[str, Any]
) -> None:
    id = add_caption(core, shelf.cat, shelf.job)
    answer = edit(api.anna, id, 1, **body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert api.anna.get(f"/v1/captions/{id}").json()["version"] == 1


def test_a_reader_edits_nothing(api: Api, core: Core, shelf: Shelf) -> None:
    id = add_caption(core, shelf.cat, shelf.job)
    assert edit(api.reader, id, 1, text="a cat").status_code == 403
    assert api.reader.get(f"/v1/captions/{id}").status_code == 200


def test_of_editors_at_the_same_time_exactly_one_wins(
    client_for: Callable[..., TestClient], core: Core, shelf: Shelf
) -> None:
    id = add_caption(core, shelf.cat, shelf.job)
    who = client_for("anna", "write")
    together = threading.Barrier(8)
    answers: dict[int, Any] = {}

    def write(number: int) -> None:
        together.wait()
        answers[number] = edit(who, id, 1, text=f"a cat, text {number}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers.values()) == [200] + [412] * 7
    winner = next(number for number, answer in answers.items() if answer.status_code == 200)
    with core.transaction() as session:
        row = session.get_one(Caption, id)
    assert (row.text, row.version, row.original_text) == (f"a cat, text {winner}", 2, "a soft coat")
