"""What can be said only of all captions of a job together. A pass streams them in pages, writes in short transactions
of its claim, and sets its flags to what holds now: doing it twice changes nothing. What it changes gets a new version,
as by any edit; an edit made meanwhile is not overwritten."""

from collections.abc import Iterator, Sequence

from sqlalchemy import ARRAY, Row, Text, any_, func, literal, select, text, update
from sqlalchemy.orm import Session

from services.captioner.quality.duplicates import Duplicates
from shared.datasets.lookup import display_names
from shared.db.models import Caption, CaptionJobItem, Dataset, Image, Job
from shared.jobs.claim import Claim
from shared.schemas.captions import Flag
from shared.templates import display_name

PAGE = 2000  # captions read or written at a time

_SET_AGREEMENT = text(
    """
    UPDATE captions AS c SET agreement = m.agreement, version = c.version + 1
    FROM (
        SELECT u.id, jsonb_build_object(
            'clip_score', u.score, 'retrieval_rank', u.rank, 'retrieval_of', CAST(:images AS integer)
        ) AS agreement
        FROM unnest(CAST(:ids AS text[]), CAST(:scores AS float8[]), CAST(:ranks AS integer[])) AS u (id, score, rank)
    ) AS m
    WHERE c.id = m.id AND c.agreement IS DISTINCT FROM m.agreement
    """
)


def mark_duplicates(claim: Claim, job_id: str) -> dict[str, int]:
    """Sets and removes `duplicate` (the earliest caption, by id, stays unflagged) and `duplicate_other_class`;
    duplicates.py says what they mean. -> how many captions have each. Memory: 4 bytes a word, 300 a caption."""
    with claim.core.transaction() as session:
        total = session.scalar(select(func.count()).where(CaptionJobItem.job_id == job_id)) or 0
        dataset = session.get(Dataset, session.get_one(Job, job_id).dataset_id)
        names = display_names(dataset) if dataset else {}
    captions = Duplicates()
    ids: list[str] = []
    for page in _pages(claim, job_id):
        claim.progress("finding duplicates", len(ids), total)
        classes = [names.get(row.class_name) or display_name(row.class_name) for row in page]
        captions.add([row.text for row in page], classes)
        ids.extend(row.id for row in page)
    duplicate, across = captions.find(lambda _: claim.check())
    flagged: tuple[tuple[Flag, list[bool]], ...] = (
        ("duplicate", duplicate.tolist()),
        ("duplicate_other_class", across.tolist()),
    )
    for start in range(0, len(ids), PAGE):
        claim.check()
        with claim.transaction() as session:
            for flag, holds in flagged:
                _set_flag(session, flag, ids[start : start + PAGE], holds[start : start + PAGE])
    claim.progress("finding duplicates", total, total)
    return {flag: sum(holds) for flag, holds in flagged}


def measure_agreement(claim: Claim, job_id: str, clip_model: str) -> dict[str, float]:
    """Fills `captions.agreement` and sets and removes `low_agreement` (agreement.py has the scale and the rule). Keeps
    one embedding per image in memory: 200 MB for 100,000 images of 512 dimensions.

    -> means over the job's captions: clip_score, recall_at_1 and low_agreement (shares); and how many images and
    captions. Raises what `shared.clip.load_clip` raises."""
    from services.captioner.quality.agreement import agreements, clip_for_measuring, embed

    core = claim.core
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

        vectors = embed(core.store, pictures, clip, on_chunk)
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
        ids, low = [row.id for row in page], [each.low(images) for each in measured]
        with claim.transaction() as session:
            values = {
                "ids": ids,
                "scores": [each.clip_score for each in measured],
                "ranks": [each.rank for each in measured],
                "images": images,
            }
            session.execute(_SET_AGREEMENT, values)
            _set_flag(session, "low_agreement", ids, low)
        sums["clip_score"] += sum(each.clip_score for each in measured)
        sums["recall_at_1"] += sum(each.rank == 1 for each in measured)
        sums["low_agreement"] += sum(low)
        done += len(page)
        claim.progress("measuring agreement", images + done, total)
    return {name: round(value / done, 4) for name, value in sums.items()} | {"images": images, "captions": done}


def _pages(claim: Claim, job_id: str) -> Iterator[Sequence[Row[str, str, str, str]]]:
    """The job's captions by id: (id, text, image_id, class_name)."""
    query = (
        select(Caption.id, Caption.text, Caption.image_id, Image.class_name)
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


def _set_flag(session: Session, flag: Flag, ids: Sequence[str], holds: Sequence[bool]) -> None:
    """Only rows that change are written."""
    for wanted in (True, False):
        chosen = literal([id for id, held in zip(ids, holds, strict=True) if held is wanted], ARRAY(Text))
        has = Caption.flags.contains([flag])
        change = func.array_append if wanted else func.array_remove
        session.execute(
            update(Caption)
            .where(Caption.id == any_(chosen), ~has if wanted else has)
            .values(flags=change(Caption.flags, flag), version=Caption.version + 1)
            .execution_options(synchronize_session=False)
        )
