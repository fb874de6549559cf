"""What can be said only of all captions of a job together. It is kept with the job's items, not with the captions:
other jobs hold the same captions among others. A pass streams them in pages, writes in short transactions of its claim,
and sets its flags to what holds now: doing it twice changes nothing. Of a text that was replaced since it was read it
says nothing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, func, select, text

from services.captioner.quality.duplicates import Duplicates
from shared.clip.templates import display_name
from shared.datasets.lookup import display_names
from shared.db.models import Caption, CaptionJobItem, Dataset, Image, Job
from shared.jobs.claim import Claim
from shared.schemas.captions import FLAGS, Flag

PAGE = 2000  # captions read or written at a time

_WRITE = text("""
    UPDATE caption_job_items AS item SET flags = new.flags, agreement = new.agreement
    FROM json_to_recordset(CAST(:rows AS json)) AS new (id text, md5 text, flags text[], agreement jsonb)
    JOIN captions ON captions.id = new.id AND md5(captions.text) = new.md5
    WHERE item.job_id = :job_id AND item.caption_id = new.id
""")


def mark_duplicates(claim: Claim, job_id: str) -> dict[str, int]:
    """Sets and removes `duplicate` (the earliest caption, by id, stays unflagged) and `duplicate_other_class`;
    duplicates.py says what they mean. -> how many captions have each."""
    with claim.core.transaction() as session:
        total = session.scalar(select(func.count()).where(CaptionJobItem.job_id == job_id)) or 0
        dataset = session.get(Dataset, session.get_one(Job, job_id).dataset_id)
        names = display_names(dataset) if dataset else {}
    captions = Duplicates()
    read: list[tuple[str, str]] = []
    for page in _pages(claim, job_id):
        claim.progress("finding duplicates", len(read), total)
        classes = [names.get(row.class_name) or display_name(row.class_name) for row in page]
        captions.add([row.text for row in page], classes)
        read.extend((row.id, row.md5) for row in page)
    duplicate, across = captions.find(lambda _: claim.check())
    flagged: dict[Flag, list[bool]] = {"duplicate": duplicate.tolist(), "duplicate_other_class": across.tolist()}
    for start in range(0, len(read), PAGE):
        part = slice(start, start + PAGE)
        claim.check()
        _write(claim, job_id, read[part], {flag: holds[part] for flag, holds in flagged.items()})
    claim.progress("finding duplicates", total, total)
    return {flag: sum(holds) for flag, holds in flagged.items()}


def measure_agreement(claim: Claim, job_id: str, clip_model: str) -> dict[str, float]:
    """Fills `agreement` of the job's items and sets and removes `low_agreement` (agreement.py has the scale and the
    rule). Keeps one embedding per image in memory: 200 MB for 100,000 images of 512 dimensions.

    -> means over the job's captions: clip_score, recall_at_1 and low_agreement (shares); and how many images and
    captions. Raises what `shared.clip.loading.load_clip` raises."""
    from services.captioner.quality.agreement import agreements, clip_for_measuring, embed
    from shared.row_cache import open_cache

    core = claim.core
    cache = open_cache(core.settings.model_cache / "rows", core.settings.cache_bytes)
    with core.transaction() as session:
        query = select(func.count(), func.count(Caption.image_id.distinct())).join(CaptionJobItem)
        captions, images = session.execute(query.where(CaptionJobItem.job_id == job_id)).one()
    total = captions + images
    claim.progress("measuring agreement", 0, total)
    clip = clip_for_measuring(clip_model, core.settings.model_cache, core.settings.model_roots)

    rows: dict[str, int] = {}  # image id -> row of `embedded`
    embedded = None
    for page in _pages(claim, job_id):
        new = {row.image_id for row in page if row.image_id not in rows}
        if not new:
            continue
        with core.transaction() as session:
            pictures = session.scalars(select(Image).where(Image.id.in_(new)).order_by(Image.id)).all()
        known = len(rows)

        def on_chunk(done: int, known: int = known) -> None:
            claim.check()
            claim.progress("measuring agreement", known + done, total)

        vectors = embed(core.store, pictures, clip, on_chunk, cache)
        if embedded is None:
            embedded = vectors.new_empty(images, vectors.shape[1])
        embedded[known : known + len(vectors)] = vectors
        rows.update({picture.id: known + i for i, picture in enumerate(pictures)})
    if embedded is None:
        return {}

    sums = {"clip_score": 0.0, "recall_at_1": 0.0, "low_agreement": 0.0}
    done = 0
    for page in _pages(claim, job_id):
        measured = agreements(clip, embedded, [row.text for row in page], [rows[row.image_id] for row in page])
        low = [each.low(images) for each in measured]
        found = [
            {"clip_score": each.clip_score, "retrieval_rank": each.rank, "retrieval_of": images} for each in measured
        ]
        _write(claim, job_id, [(row.id, row.md5) for row in page], {"low_agreement": low}, found)
        sums["clip_score"] += sum(each.clip_score for each in measured)
        sums["recall_at_1"] += sum(each.rank == 1 for each in measured)
        sums["low_agreement"] += sum(low)
        done += len(page)
        claim.progress("measuring agreement", images + done, total)
    return {name: round(value / done, 4) for name, value in sums.items()} | {"images": images, "captions": done}


def _pages(claim: Claim, job_id: str) -> Iterator[Sequence[Row[str, str, str, str, str]]]:
    """The job's captions by id: (id, text, md5 of the text, image_id, class_name)."""
    query = (
        select(Caption.id, Caption.text, func.md5(Caption.text).label("md5"), Caption.image_id, Image.class_name)
        .join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
        .join(Image, Image.id == Caption.image_id)
        .where(CaptionJobItem.job_id == job_id)
        .order_by(CaptionJobItem.caption_id)
        .limit(PAGE)
    )
    last = ""
    while True:
        claim.check()
        with claim.core.transaction() as session:
            page = session.execute(query.where(CaptionJobItem.caption_id > last)).all()
        if not page:
            return
        yield page
        last = page[-1].id


def _write(
    claim: Claim,
    job_id: str,
    read: Sequence[tuple[str, str]],
    holds: Mapping[Flag, Sequence[bool]],
    agreements: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Only items that change are written; their other flags stay, and the agreement where none is given.

    read: (id, md5 of the text) of captions, in the order of ids as is all else. The items are locked in that order
    before the texts are compared: see `writing.forget_comparisons`."""
    query = select(CaptionJobItem.caption_id, CaptionJobItem.flags, CaptionJobItem.agreement)
    query = query.where(CaptionJobItem.job_id == job_id, CaptionJobItem.caption_id == func.any([id for id, _ in read]))
    query = query.order_by(CaptionJobItem.caption_id).with_for_update()
    with claim.transaction() as session:
        items = {id: (flags, agreement) for id, flags, agreement in session.execute(query)}
        rows = []
        for i, (id, md5) in enumerate(read):
            if id not in items:
                continue
            before, agreement = items[id]
            after = [flag for flag in FLAGS if (holds[flag][i] if flag in holds else flag in before)]
            if agreements is not None:
                agreement = agreements[i]
            if (after, agreement) != items[id]:
                rows.append({"id": id, "md5": md5, "flags": after, "agreement": agreement})
        if rows:
            session.execute(_WRITE, {"job_id": job_id, "rows": json.dumps(rows)})
