"""The passes over a job's captions, on real rows."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from services.captioner.captioning.planning import to_redo
from services.captioner.captioning.writing import forget_comparisons, write
from services.captioner.quality import passes
from services.captioner.quality.passes import mark_duplicates, measure_agreement
from shared.clip import warm
from shared.core import Core
from shared.db.models import Caption, CaptionJobItem, Image
from shared.jobs import LeaseLost, ledger
from shared.jobs.claim import Claim
from shared.schemas.captions import Flag, Redo
from tests.integration.factories import (
    add_caption,
    add_dataset,
    add_job,
    change_job,
    read_item,
    read_job,
    share_caption,
)
from tests.tiny_clip import write_tiny_clip

SAME = "A small animal with a soft grey coat and two green eyes rests on a wooden floor near a bright window"
OTHER = "Round black ears above a narrow face that looks straight at the camera from behind a low stone wall"


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PAGE", 3)


@pytest.fixture
def job_id(core: Core) -> str:
    names = [{"name": "cat", "display_name": "tabby cat"}, {"name": "dog", "display_name": "dog"}]
    return add_job(core, "caption", dataset_id=add_dataset(core, images=4, classes=names))


def claimed(core: Core, job_id: str) -> Claim:
    with core.transaction() as session:
        job = ledger.claim(session, job_id, "caption", "test", 60)
    assert job is not None
    return Claim(core, job, threading.Event())


def pictures(core: Core, job_id: str) -> dict[str, list[Image]]:
    """By class."""
    with core.transaction() as session:
        query = select(Image).where(Image.dataset_id == read_job(core, job_id).dataset_id).order_by(Image.id)
        images = session.scalars(query).all()
    return {name: [image for image in images if image.class_name == name] for name in ("cat", "dog")}


def captions(core: Core, ids: list[str]) -> list[Caption]:
    with core.transaction() as session:
        return [session.get_one(Caption, id) for id in ids]


def items(core: Core, ids: list[str], job_id: str) -> list[CaptionJobItem]:
    return [read_item(core, id, job_id) for id in ids]


def flags(core: Core, ids: list[str], job_id: str) -> list[list[str]]:
    """What the job says of its captions."""
    return [list(item.flags) for item in items(core, ids, job_id)]


def versions(core: Core, ids: list[str]) -> list[int]:
    return [caption.version for caption in captions(core, ids)]


def change(core: Core, id: str, **columns: Any) -> None:
    with core.transaction() as session:
        row = session.get_one(Caption, id)
        for name, value in columns.items():
            setattr(row, name, value)


def test_duplicates_are_flagged_and_unflagged_as_the_texts_change(core: Core, job_id: str) -> None:
    cats, dogs = pictures(core, job_id).values()
    ids = [
        add_caption(core, cats[0], job_id, f"{SAME}.", "a"),
        add_caption(core, cats[0], job_id, f"{SAME}!", "b", flags=["over_budget"]),  # of the same image
        add_caption(core, cats[1], job_id, f"{SAME} today", "a"),
        add_caption(core, cats[1], job_id, f"A tabby cat: {OTHER}", "b"),
        add_caption(core, dogs[0], job_id, f"A dog: {OTHER}", "a", job_flags=["duplicate", "low_agreement"]),
        add_caption(core, dogs[1], job_id, "Quite another text.", "a"),
        add_caption(core, dogs[1], job_id, "", "b", flags=["empty"]),
        add_caption(core, dogs[2], job_id, "", "a", flags=["empty"]),
    ]
    other = add_job(core, "caption")
    elsewhere = add_caption(core, cats[2], other, f"{SAME}.", "a")
    expected = [
        [],
        ["duplicate"],
        ["duplicate"],
        ["duplicate_other_class"],
        ["duplicate_other_class", "low_agreement"],  # the first was of an earlier state
        [],
        [],
        [],
    ]
    claim = claimed(core, job_id)
    assert mark_duplicates(claim, job_id) == {"duplicate": 2, "duplicate_other_class": 2}
    assert flags(core, ids, job_id) == expected
    assert flags(core, [elsewhere], other) == [[]], "another job's"
    assert mark_duplicates(claim, job_id) == {"duplicate": 2, "duplicate_other_class": 2}
    assert flags(core, ids, job_id) == expected
    assert versions(core, ids) == [1] * 8, "the captions themselves are as they were"
    assert [caption.flags for caption in captions(core, ids)] == [[], ["over_budget"], *[[]] * 4, ["empty"], ["empty"]]
    progress = read_job(core, job_id).progress
    assert progress is not None
    assert (progress["stage"], progress["done"], progress["total"]) == ("finding duplicates", 8, 8)

    change(core, ids[0], text="The only one of its kind.")
    change(core, ids[4], text="A dog that was edited.")
    assert mark_duplicates(claim, job_id) == {"duplicate": 1, "duplicate_other_class": 0}
    assert flags(core, ids, job_id) == [[], [], ["duplicate"], [], ["low_agreement"], [], [], []]


def test_a_later_job_on_some_of_the_captions_leaves_the_earlier_ones_flags(core: Core, job_id: str) -> None:
    cats, _ = pictures(core, job_id).values()
    ids = [add_caption(core, cats[i], job_id, SAME) for i in range(3)]
    mark_duplicates(claimed(core, job_id), job_id)
    assert flags(core, ids, job_id) == [[], ["duplicate"], ["duplicate"]]
    later = add_job(core, dataset_id=read_job(core, job_id).dataset_id)
    for id in ids[1:]:
        share_caption(core, id, later)
    assert mark_duplicates(claimed(core, later), later) == {"duplicate": 1, "duplicate_other_class": 0}
    assert flags(core, ids[1:], later) == [[], ["duplicate"]]
    assert flags(core, ids, job_id) == [[], ["duplicate"], ["duplicate"]]
    assert versions(core, ids) == [1, 1, 1]


def test_jobs_that_share_captions_do_not_wait_for_each_other(core: Core, job_id: str) -> None:
    cats, _ = pictures(core, job_id).values()
    ids = [add_caption(core, cats[i], job_id, SAME) for i in range(3)]
    later = add_job(core, dataset_id=read_job(core, job_id).dataset_id)
    for id in ids:
        share_caption(core, id, later)
    claim = claimed(core, job_id)
    with core.transaction() as session:  # as the other job's pass, or an edit, half-way
        session.execute(select(CaptionJobItem).where(CaptionJobItem.job_id == later).with_for_update())
        session.execute(select(Caption).with_for_update())
        thread = threading.Thread(target=mark_duplicates, args=(claim, job_id))
        thread.start()
        thread.join(10)
        waited = thread.is_alive()
    thread.join()
    assert not waited
    assert flags(core, ids, job_id) == [[], ["duplicate"], ["duplicate"]]


def test_of_a_text_that_is_replaced_meanwhile_nothing_is_said(
    core: Core, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cats, _ = pictures(core, job_id).values()
    ids = [add_caption(core, cats[i], job_id, SAME) for i in range(2)]
    claim = claimed(core, job_id)
    with core.transaction() as session:  # an edit that is not done when the pass is
        session.get_one(Caption, ids[1]).text = "An edited text."
        session.flush()
        assert mark_duplicates(claim, job_id)["duplicate"] == 1
        assert flags(core, ids, job_id) == [[], ["duplicate"]]
        forget_comparisons(session, ids[1:])
    assert flags(core, ids, job_id) == [[], []]

    change(core, ids[1], text=SAME)
    write_items = passes._write

    def after_an_edit(*args: Any) -> None:
        change(core, ids[1], text="Edited after the pass read it.")
        write_items(*args)

    monkeypatch.setattr(passes, "_write", after_an_edit)
    mark_duplicates(claim, job_id)
    assert flags(core, ids, job_id) == [[], []]


def test_an_overwritten_text_loses_what_every_job_said_of_it(core: Core, job_id: str) -> None:
    cats, _ = pictures(core, job_id).values()
    replaced, kept = (add_caption(core, cats[i], job_id, SAME, job_flags=["duplicate"]) for i in range(2))
    later = add_job(core, dataset_id=cats[0].dataset_id)
    share_caption(core, replaced, later, ["low_agreement"], {"clip_score": 0.1})
    row = {"id": "txt_new", "image_id": cats[0].id, "key": "k", "characteristic": "visual", "text": "Another text."}
    row |= {"clip_tokens": 9, "flags": [], "provenance": {}, "replaces": True}
    with core.transaction() as session:
        where = {"job_id": later, "owner": "anna", "dataset_id": cats[0].dataset_id}
        assert write(session, **where, rows=[row], links=[]) == 1
    assert captions(core, [replaced])[0].text == "Another text."
    assert (flags(core, [replaced, kept], job_id), flags(core, [replaced], later)) == ([[], ["duplicate"]], [[]])
    assert read_item(core, replaced, later).agreement is None


def test_a_redo_goes_by_the_flags_of_its_own_base_job(core: Core, job_id: str) -> None:
    cats, _ = pictures(core, job_id).values()
    ids = [
        add_caption(core, cats[0], job_id, job_flags=["duplicate"]),
        add_caption(core, cats[1], job_id, flags=["refusal"]),
    ]
    later = add_job(core, dataset_id=cats[0].dataset_id)
    share_caption(core, ids[0], later)
    share_caption(core, ids[1], later, ["duplicate"])

    def selected(base: str, flag: Flag) -> list[str]:
        with core.transaction() as session:
            return [row.id for row in session.scalars(to_redo(Redo(caption_job_id=base, flag=flag)))]

    assert (selected(job_id, "duplicate"), selected(later, "duplicate")) == ([ids[0]], [ids[1]])
    assert selected(job_id, "refusal") == selected(later, "refusal") == [ids[1]]


def test_what_a_lost_claim_finds_is_not_written(core: Core, job_id: str) -> None:
    cats, _ = pictures(core, job_id).values()
    ids = [add_caption(core, cats[0], job_id, SAME, key) for key in "ab"]
    claim = claimed(core, job_id)
    change_job(core, job_id, attempt=2)
    with pytest.raises(LeaseLost):
        mark_duplicates(claim, job_id)
    assert flags(core, ids, job_id) == [[], []]


def test_a_job_without_captions(core: Core, job_id: str) -> None:
    claim = claimed(core, job_id)
    assert mark_duplicates(claim, job_id) == {"duplicate": 0, "duplicate_other_class": 0}


@pytest.fixture
def with_clip(core: Core, tmp_path: Path) -> Iterator[Core]:
    write_tiny_clip(tmp_path / "tiny")
    settings = core.settings.model_copy(update={"model_cache": tmp_path, "model_roots": [tmp_path]})
    yield Core(settings, core.db, core.queue, core.store)
    warm.forget()


def test_agreement_is_measured_flagged_and_measured_again(with_clip: Core, job_id: str) -> None:
    core = with_clip
    ids = [
        add_caption(core, image, job_id, f"Picture {image.path} of a {image.class_name}.", key)
        for images in pictures(core, job_id).values()
        for image in images
        for key in "ab"
    ]
    claim = claimed(core, job_id)
    means = measure_agreement(claim, job_id, "tiny")
    rows = items(core, ids, job_id)
    found = [row.agreement for row in rows if row.agreement is not None]
    assert len(found) == len(ids) == 16
    assert {each["retrieval_of"] for each in found} == {8}
    assert all(1 <= each["retrieval_rank"] <= 8 and 0 <= each["clip_score"] <= 2.5 for each in found)
    low = [each["retrieval_rank"] > 4 for each in found]
    assert 0 < sum(low) < 16
    assert [row.flags for row in rows] == [["low_agreement"] if each else [] for each in low]
    assert means == {
        "clip_score": pytest.approx(sum(each["clip_score"] for each in found) / 16, abs=1e-4),
        "recall_at_1": pytest.approx(sum(each["retrieval_rank"] == 1 for each in found) / 16, abs=1e-4),
        "low_agreement": pytest.approx(sum(low) / 16, abs=1e-4),
        "images": 8,
        "captions": 16,
    }
    progress = read_job(core, job_id).progress
    assert progress is not None
    assert (progress["stage"], progress["done"], progress["total"]) == ("measuring agreement", 24, 24)
    assert measure_agreement(claim, job_id, "tiny") == means
    assert [(row.flags, row.agreement) for row in items(core, ids, job_id)] == [
        (row.flags, row.agreement) for row in rows
    ]
    assert versions(core, ids) == [1] * 16, "the captions themselves are as they were"
    mark_duplicates(claim, job_id)
    assert [row.agreement for row in items(core, ids, job_id)] == found, "the other pass leaves it"

    with core.transaction() as session:  # with one picture left nothing can rank before it
        keep = session.get_one(Caption, ids[low.index(True)])
        others = select(CaptionJobItem).where(CaptionJobItem.caption_id != keep.id)
        for item in session.scalars(others).all():
            session.delete(item)
    assert measure_agreement(claim, job_id, "tiny")["recall_at_1"] == 1
    row = read_item(core, keep.id, job_id)
    assert (row.flags, (row.agreement or {})["retrieval_of"]) == ([], 1)


def test_agreement_of_a_lost_claim_is_not_written(with_clip: Core, job_id: str) -> None:
    cats, _ = pictures(with_clip, job_id).values()
    ids = [add_caption(with_clip, cats[0], job_id)]
    claim = claimed(with_clip, job_id)
    change_job(with_clip, job_id, attempt=2)
    with pytest.raises(LeaseLost):
        measure_agreement(claim, job_id, "tiny")
    assert read_item(with_clip, ids[0], job_id).agreement is None


def test_agreement_without_captions(with_clip: Core, job_id: str) -> None:
    assert measure_agreement(claimed(with_clip, job_id), job_id, "tiny") == {}
