"""What exists is not paid for again: reuse, and what a user does to have it asked again (overwrite, redo)."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event

from services.captioner.captioning import job as caption_job_module
from services.captioner.captioning.planning import check_redo
from shared.clip.tokens import TokenCounter, token_counter
from shared.core import Core
from shared.db.models import Caption
from shared.errors import CaptuneError
from shared.schemas.captions import CaptionJobRequest, Redo
from shared.web.auth import Principal
from tests.integration.caption_jobs import (
    SENTENCE,
    caption_all,
    captions_of,
    change_caption,
    counted,
    done,
    images_of,
    interrupted,
    submit,
)
from tests.integration.captioner_server import Answer, Asked, CaptionerServer
from tests.integration.factories import add_dataset, add_job, change_job, image_row


def test_a_second_identical_job_asks_nothing_and_keeps_edits(core: Core, server: CaptionerServer) -> None:
    dataset_id = add_dataset(core, images=3)
    first = caption_all(core, dataset_id)
    before = captions_of(core, first)
    change_caption(core, before[0].id, text="edited", version=2, original_text=before[0].text)
    second = submit(core, dataset_id)
    assert counted(done(core, second), "captions", "written", "reused") == (12, 0, 12)
    assert server.calls == 12
    after = captions_of(core, second)
    assert [row.id for row in after] == [row.id for row in before], "the very rows"
    assert (after[0].text, after[0].version) == ("edited", 2)


def test_the_same_bytes_in_another_data_set_are_not_asked_for_again(core: Core, server: CaptionerServer) -> None:
    server.answer = lambda asked: Answer(f"a {asked.class_name} like a wolf")
    first = caption_all(core, add_dataset(core, images=3))
    sources = {row.id: row for row in captions_of(core, first)}
    for id in sources:
        change_caption(core, id, text="edited there", version=2)
    classes = [{"name": name, "display_name": name} for name in ("cat", "dog", "wolf")]
    second = submit(core, add_dataset(core, images=4, classes=classes))
    assert counted(done(core, second), "images", "captions", "written", "reused") == (8, 16, 4, 12)
    assert server.calls == 12 + 4
    copies = [row for row in captions_of(core, second) if "reused_from" in row.provenance]
    assert len(copies) == 12
    for row in copies:
        source = sources[row.provenance["reused_from"]["caption_id"]]
        assert row.id != source.id
        assert row.provenance["reused_from"]["job_id"] == first
        assert (row.provenance["job_id"], row.key) == (second, source.key)
        assert "wolf" in row.text, "made from what the model said, not from an edit of another data set"
        assert (row.flags, source.flags.count("names_other_class")) == (["names_other_class", *row.flags[1:]], 0)


def test_captions_that_were_asked_for_otherwise_are_not_read(core: Core, server: CaptionerServer) -> None:
    """A data set may have those of any number of jobs, and a worker's memory does not follow it."""
    dataset_id = add_dataset(core, images=2)
    caption_all(core, dataset_id)
    read = []

    def count(_: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SELECT captions.image_id, captions.key"):
            read.append(cursor.rowcount)

    event.listen(core.db.engine, "after_cursor_execute", count)
    try:
        assert done(core, submit(core, dataset_id, seed=1))["reused"] == 0
        assert sum(read) == 0
        assert len(read) >= 1
        assert done(core, submit(core, dataset_id, seed=1))["reused"] == 8
        assert sum(read) == 8
    finally:
        event.remove(core.db.engine, "after_cursor_execute", count)


def test_nothing_is_ever_reused_across_owners(core: Core, server: CaptionerServer) -> None:
    caption_all(core, add_dataset(core, "anna", images=2))
    result = done(core, submit(core, add_dataset(core, "ben", images=2), owner="ben"))
    assert counted(result, "written", "reused") == (8, 0)
    assert server.calls == 16


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"temperature": 0.3}, {"words": 51}, {"domain": "animals"}, {"characteristics": ["color"]}]
)
def test_what_changes_the_answer_is_asked_for(core: Core, server: CaptionerServer, changed: dict[str, Any]) -> None:
    dataset_id = add_dataset(core, images=1)
    caption_all(core, dataset_id)
    assert done(core, submit(core, dataset_id, **changed))["reused"] == 0


def test_another_length_is_cut_from_the_same_answers(core: Core, server: CaptionerServer) -> None:
    dataset_id = add_dataset(core, images=1)
    server.answer = lambda asked: Answer(SENTENCE * 2)
    first = caption_all(core, dataset_id)
    sheared = submit(core, dataset_id, shear_tokens=16)
    assert counted(done(core, sheared), "captions", "reused") == (4, 4)
    assert server.calls == 4
    assert max(row.clip_tokens for row in captions_of(core, sheared)) <= 16
    assert min(row.clip_tokens for row in captions_of(core, first)) > 16, "the first job's are as they were"


def too_long_at_first(asked: Asked) -> Answer:
    return Answer(SENTENCE * (9 if asked.words == 50 else 2))


def test_another_number_of_reasks_goes_on_from_the_first_answers(core: Core, server: CaptionerServer) -> None:
    server.answer = too_long_at_first
    dataset_id = add_dataset(core, images=1)
    trimmed = caption_all(core, dataset_id, reasks=0)
    assert server.calls == 4
    again = submit(core, dataset_id, reasks=2)
    assert counted(done(core, again), "captions", "written", "reasked", "trimmed") == (4, 4, 4, 0)
    assert [asked.words < 50 for asked in server.asked] == [False] * 4 + [True] * 4, "the first is not asked again"
    sources = {row.id for row in captions_of(core, trimmed)}
    for row in captions_of(core, again):
        assert row.provenance["raw"] == SENTENCE * 2
        assert row.provenance["first"]["raw"] == SENTENCE * 9
        assert row.provenance["first"]["reused_from"]["job_id"] == trimmed
        assert row.provenance["first"]["reused_from"]["caption_id"] in sources
        assert "reused_from" not in row.provenance


def test_no_reasks_copies_the_first_answers(core: Core, server: CaptionerServer) -> None:
    server.answer = too_long_at_first
    dataset_id = add_dataset(core, images=1)
    caption_all(core, dataset_id, reasks=2)
    calls = server.calls
    trimmed = submit(core, dataset_id, reasks=0)
    assert counted(done(core, trimmed), "reused", "reasked", "trimmed") == (4, 0, 4)
    assert server.calls == calls
    for row in captions_of(core, trimmed):
        assert (row.provenance["raw"], row.provenance["completion_tokens"]) == (SENTENCE * 9, 3)
        assert row.provenance["prompt"].endswith("in 50 words.")
        assert "first" not in row.provenance


def test_a_shorter_answer_that_fits_is_not_paid_for_twice(core: Core, server: CaptionerServer) -> None:
    server.answer = too_long_at_first
    dataset_id = add_dataset(core, images=1)
    caption_all(core, dataset_id)
    calls = server.calls
    again = submit(core, dataset_id, language=None)
    assert counted(done(core, again), "reused", "reasked", "trimmed") == (4, 4, 0)
    assert done(core, submit(core, add_dataset(core, images=1), language=None))["reused"] == 4
    assert server.calls == calls
    row = captions_of(core, again)[0]
    assert (row.provenance["raw"], row.provenance["first"]["raw"]) == (SENTENCE * 2, SENTENCE * 9)


def test_a_longer_clip_gets_the_longer_answer(
    core: Core, server: CaptionerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CLIP with a longer context has its tokenizer at hand here: one is lengthened."""
    longer = "ViT-B-32/laion2b_s34b_b79k"

    def counter(model: str, *where: Any) -> TokenCounter:
        found = token_counter(model, *where)
        return replace(found, context_length=248) if model == longer else found

    monkeypatch.setattr(caption_job_module, "token_counter", counter)
    server.answer = too_long_at_first
    dataset_id = add_dataset(core, images=1)
    caption_all(core, dataset_id)
    calls = server.calls
    job_id = submit(core, dataset_id, clip_model=longer)
    assert counted(done(core, job_id), "reused", "reasked", "trimmed") == (4, 0, 0)
    assert server.calls == calls
    for row in captions_of(core, job_id):
        assert row.clip_tokens > 77
        assert (row.provenance["raw"], row.provenance["words"]) == (SENTENCE * 9, 50)


def twins(core: Core, pictures: int, each: int) -> str:
    """A data set of so many pictures, each as several images with the same bytes."""
    dataset_id = add_dataset(core, images=0)
    with core.transaction() as session:
        for number in range(pictures):
            for twin in range(each):
                image = image_row(core, dataset_id, "anna", 2 * number)
                image.path = f"cat/{number}-{twin}.png"
                session.add(image)
    return dataset_id


def test_twins_within_a_job_are_asked_for_once(core: Core, server: CaptionerServer) -> None:
    server.answer = too_long_at_first
    job_id = submit(core, twins(core, pictures=3, each=40))
    result = done(core, job_id)
    assert counted(result, "images", "captions", "written", "reused") == (120, 240, 6, 234)
    assert server.calls == 12, "six questions, each once more in fewer words"
    rows = {row.id: row for row in captions_of(core, job_id)}
    copies = [row for row in rows.values() if "reused_from" in row.provenance]
    assert len(copies) == 234
    for row in copies:
        source = rows[row.provenance["reused_from"]["caption_id"]]
        assert (row.text, row.key) == (source.text, source.key)


def test_a_refused_twin_is_refused_too(core: Core, server: CaptionerServer) -> None:
    server.answer = lambda asked: Answer(status=422) if asked.characteristic == "shape" else Answer()
    result = done(core, submit(core, twins(core, pictures=1, each=5)))
    assert counted(result, "images", "captions", "failed") == (5, 5, 5)
    assert server.calls == 2
    assert len({failure["path"] for failure in result["failures"]}) == 5


def redo_of(core: Core, base: str, **selection: Any) -> tuple[str, list[Caption]]:
    """A redo's job, made after the check that the routes do, and the earlier job's captions."""
    before = captions_of(core, base)
    fields = selection.pop("fields", {"seed": 9})
    redo = Redo(caption_job_id=base, **selection)
    request = {"engine": "m", "characteristics": ["visual", "shape"], "domain": "pets", **fields, "redo": redo}
    body = CaptionJobRequest(dataset_id=before[0].dataset_id, **request)
    with core.transaction() as session:
        check_redo(session, Principal("anna", frozenset({"write"})), body)
    job_id = add_job(core, "caption", request=body.model_dump(), dataset_id=before[0].dataset_id)
    return job_id, before


def test_overwrite_asks_again_and_replaces_edits_included(core: Core, server: CaptionerServer) -> None:
    dataset_id = add_dataset(core, images=2)
    before = captions_of(core, caption_all(core, dataset_id))
    edit = {"text": "edited", "original_text": "x", "edited_by": "anna", "excluded": True}
    change_caption(core, before[0].id, version=2, **edit)
    server.answer = lambda asked: Answer("quite another coat")
    job_id = submit(core, dataset_id, mode="overwrite")
    assert counted(done(core, job_id), "captions", "written", "reused") == (8, 8, 0)
    assert server.calls == 16
    after = captions_of(core, job_id)
    assert [row.id for row in after] == [row.id for row in before]
    assert {row.text.lower().rstrip(".") for row in after} == {"quite another coat"}
    assert all(new.version > old.version for new, old in zip(after[1:], before[1:], strict=True))
    assert after[0].version > 2
    row = after[0]
    assert (row.original_text, row.edited_by, row.excluded) == (None, None, False)
    assert {row.provenance["job_id"] for row in after} == {job_id}


def test_a_resumed_overwrite_does_not_overwrite_twice(core: Core, server: CaptionerServer) -> None:
    dataset_id = add_dataset(core, images=20)
    caption_all(core, dataset_id)
    job_id = submit(core, dataset_id, mode="overwrite")
    kept = interrupted(core, server, job_id)
    calls = server.calls
    assert counted(done(core, job_id), "captions", "written") == (80, 80)
    assert server.calls == calls + 80 - kept
    assert Counter(row.provenance["attempt"] for row in captions_of(core, job_id)) == {1: kept, 2: 80 - kept}


def test_a_redo_asks_for_its_selection_and_takes_over_the_others(core: Core, server: CaptionerServer) -> None:
    base = caption_all(core, add_dataset(core, images=3))
    chosen = captions_of(core, base)[2]
    job_id, before = redo_of(core, base, caption_ids=[chosen.id])
    result = done(core, job_id)
    assert counted(result, "captions", "written", "reused", "images") == (12, 1, 11, 1)
    assert server.calls == 13
    after = {row.id for row in captions_of(core, job_id)}
    new = after - {row.id for row in before}
    assert len(new) == 1
    assert chosen.id not in after
    (row,) = (row for row in captions_of(core, job_id) if row.id in new)
    assert (row.image_id, row.characteristic) == (chosen.image_id, chosen.characteristic)
    assert [row.id for row in captions_of(core, base)] == [row.id for row in before], "the earlier job has what it had"


@pytest.mark.parametrize("fields", [{"seed": 1009}, {"seed": 0}, {"seed": 1}, {"seed": 5, "samples_per_prompt": 1}])
def test_a_redo_of_some_samples_asks_for_as_many(core: Core, server: CaptionerServer, fields: dict[str, Any]) -> None:
    base = caption_all(core, add_dataset(core, images=1), samples_per_prompt=3)
    first, second, *_, last = captions_of(core, base)
    calls = server.calls
    job_id, before = redo_of(
        core, base, caption_ids=[first.id, second.id, last.id], fields={"samples_per_prompt": 3, **fields}
    )
    assert counted(done(core, job_id), "captions", "written") == (12, 3)
    assert server.calls == calls + 3
    after = captions_of(core, job_id)
    about = [(row.image_id, row.characteristic) for row in after]
    assert Counter(about) == Counter((row.image_id, row.characteristic) for row in before)
    kept = {row.id for row in before} - {first.id, second.id, last.id}
    assert kept <= {row.id for row in after}
    if fields["seed"] == 0:
        assert [row.id for row in after] == [row.id for row in before], "the very captions are replaced"


@pytest.mark.parametrize("seed", [9, 1, 0])
def test_a_resumed_redo_of_samples_asks_no_more(core: Core, server: CaptionerServer, seed: int) -> None:
    base = caption_all(core, add_dataset(core, images=10), samples_per_prompt=3)
    chosen = [row.id for number, row in enumerate(captions_of(core, base)) if number % 3]
    fields = {"samples_per_prompt": 3, "seed": seed}
    job_id, _ = redo_of(core, base, caption_ids=chosen, fields=fields)
    kept = interrupted(core, server, job_id)
    calls = server.calls
    assert counted(done(core, job_id), "captions", "written") == (120, 80)
    assert server.calls == calls + 80 - (kept - 40)
    assert set(Counter((row.image_id, row.characteristic) for row in captions_of(core, job_id)).values()) == {3}


def test_a_redo_with_the_same_parameters_replaces_its_selection(core: Core, server: CaptionerServer) -> None:
    base = caption_all(core, add_dataset(core, images=2))
    caption_all(core, add_dataset(core, images=2))  # has the same answers; they are not what is asked for
    marked = captions_of(core, base)[:3]
    for row in marked:
        change_caption(core, row.id, flags=["label_missing"], text="edited", original_text="x", version=2)
    calls = server.calls
    job_id, before = redo_of(core, base, flag="label_missing", fields={})
    assert counted(done(core, job_id), "captions", "written") == (8, 3)
    assert server.calls == calls + 3
    after = captions_of(core, job_id)
    assert [row.id for row in after] == [row.id for row in before]
    replaced = [row for row in after if row.id in {m.id for m in marked}]
    assert [(row.version > 2, row.original_text, row.text == "edited") for row in replaced] == [(True, None, False)] * 3


@pytest.mark.parametrize("selection", [{"class_name": "cat"}, {"excluded": True}, {"flag": "refusal"}])
def test_a_redo_selects_by_class_flag_and_exclusion(
    core: Core, server: CaptionerServer, selection: dict[str, Any]
) -> None:
    dataset_id = add_dataset(core, images=2)
    base = caption_all(core, dataset_id)
    images = images_of(core, dataset_id)
    cats = [row for row in captions_of(core, base) if images[row.image_id].class_name == "cat"]
    for row in cats:
        change_caption(core, row.id, excluded=True, flags=["refusal"])
    job_id, _ = redo_of(core, base, **selection)
    assert counted(done(core, job_id), "captions", "written") == (8, 4)
    assert {row.id for row in cats}.isdisjoint(row.id for row in captions_of(core, job_id))


def test_a_resumed_redo_keeps_to_its_selection(core: Core, server: CaptionerServer) -> None:
    """Flags change while a job works: what the first attempt took over is not asked for by the second."""
    base = caption_all(core, add_dataset(core, images=20))
    rows = captions_of(core, base)
    for row in rows[:60]:
        change_caption(core, row.id, flags=["refusal"])
    job_id, _ = redo_of(core, base, flag="refusal")
    kept = interrupted(core, server, job_id)
    for row in rows[60:]:
        change_caption(core, row.id, flags=["refusal"])
    calls = server.calls
    assert counted(done(core, job_id), "captions", "written") == (80, 60)
    assert server.calls == calls + 60 - (kept - 20)


def test_a_redo_that_cannot_be_done_is_refused_at_submission(core: Core, server: CaptionerServer) -> None:
    base = caption_all(core, add_dataset(core, images=1))

    def code(**selection: Any) -> str:
        with pytest.raises(CaptuneError) as error:
            redo_of(core, base, **selection)
        return error.value.code

    assert code(fields={"characteristics": ["visual"]}) == "characteristic_missing"
    assert code(flag="refusal") == "empty_redo"
    assert code(fields={"limit": 2}) == "redo_has_its_images"
    change_job(core, base, status="running")
    assert code() == "caption_job_not_ready"
    change_job(core, base, status="succeeded", owner="ben")
    assert code() == "not_found"
