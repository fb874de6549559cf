"""The captions of a job in figures: what `GET /v1/caption_jobs/{id}/report` answers."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from sqlalchemy import Float, Select, case, func, select
from sqlalchemy.orm import Session

from services.captioner.routes.captions import render_caption
from shared.clip.tokens import DEFAULT_CONTEXT
from shared.db.models import Caption, CaptionJobItem, Image, Job
from shared.schemas.captions import Caption as CaptionSchema
from shared.schemas.captions import CaptionReport, Flag, TokenBin

EXAMPLES = 5  # per flag
SAMPLE = 2_000  # captions read for the distinct figures
BIN = 10  # tokens


def report(session: Session, job: Job) -> CaptionReport:
    """Counted in the database; texts are read of a sample only."""
    totals = session.execute(
        _of(
            job,
            func.count(),
            func.count(Caption.image_id.distinct()),
            func.count().filter(Caption.excluded),
            func.count(Caption.original_text),
            func.coalesce(func.avg(func.regexp_count(Caption.text, r"\S+")).cast(Float), 0.0),
        )
    ).one()
    captions, images, excluded, edited, words_mean = totals
    # By md5 of the id: as good as drawn by lot, and the same at every call.
    texts = session.scalars(_of(job, Caption.text).order_by(func.md5(Caption.id)).limit(SAMPLE)).all()
    distinct_1, distinct_2 = distinct(texts)
    flag = func.unnest(Caption.flags + CaptionJobItem.flags)
    lengths = _counts(session, job, Caption.clip_tokens)
    budget = (job.result or {}).get("budget", DEFAULT_CONTEXT)
    return CaptionReport(
        caption_job_id=job.id,
        images=images,
        captions=captions,
        excluded=excluded,
        edited=edited,
        flags=_counts(session, job, flag),
        characteristics=_counts(session, job, Caption.characteristic),
        tokens=histogram(lengths, budget),
        budget=budget,
        words_mean=round(words_mean, 2),
        distinct_1=distinct_1,
        distinct_2=distinct_2,
        distinct_sample=len(texts),
        agreement=_agreement(session, job),
        examples=_examples(session, job),
    )


def distinct(texts: Iterable[str]) -> tuple[float, float]:
    """Different words / words and different word pairs / word pairs over all texts (Li et al. 2016, arXiv
    1510.03055), case and punctuation aside; a pair lies within one text. 0 where there is none."""
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for text in texts:
        found = re.findall(r"\w+(?:'\w+)*", text.lower())
        words.update(found)
        pairs.update(pairwise(found))
    return _share(words), _share(pairs)


def _share(counts: Counter[Any]) -> float:
    return round(len(counts) / counts.total(), 4) if counts else 0.0


def histogram(lengths: dict[int, int], budget: int) -> list[TokenBin]:
    """Captions by length in tokens. The bins are ten wide and cover 1 to `budget`, where one ends, empty ones
    included; beyond it come those that hold something. `0..0` holds captions that were never measured.

    lengths: tokens -> captions."""
    bins = {(low, min(low + BIN - 1, budget)): 0 for low in range(1, budget + 1, BIN)}
    for length, captions in lengths.items():
        place = _bin(length, budget)
        bins[place] = bins.get(place, 0) + captions
    return [TokenBin(low=low, high=high, captions=n) for (low, high), n in sorted(bins.items())]


def _bin(length: int, budget: int) -> tuple[int, int]:
    if length <= 0:
        return 0, 0
    within = length <= budget
    low = length - (length - (1 if within else budget + 1)) % BIN
    return low, min(low + BIN - 1, budget) if within else low + BIN - 1


def _of(job: Job, *columns: Any) -> Select[Any]:
    query = select(*columns).select_from(Caption).join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
    return query.where(CaptionJobItem.job_id == job.id)


def _counts(session: Session, job: Job, value: Any) -> dict[Any, int]:
    """Value -> captions, the most frequent first."""
    found = _of(job, value.label("value")).subquery()
    query = select(found.c.value, func.count()).group_by(found.c.value).order_by(func.count().desc(), found.c.value)
    return {value: count for value, count in session.execute(query)}


def _agreement(session: Session, job: Job) -> dict[str, float] | None:
    score, rank = (CaptionJobItem.agreement[name].astext.cast(Float) for name in ("clip_score", "retrieval_rank"))
    found_first = case((rank == 1, 1.0), else_=0.0)
    means = _of(job, func.avg(score), func.avg(found_first).cast(Float)).where(score.is_not(None))
    clip_score, recall = session.execute(means).one()
    return None if clip_score is None else {"clip_score": round(clip_score, 4), "recall_at_1": round(recall, 4)}


def _examples(session: Session, job: Job) -> dict[Flag, list[CaptionSchema]]:
    """The oldest captions with each flag."""
    flag = func.unnest(Caption.flags + CaptionJobItem.flags).label("flag")
    flagged = _of(job, Caption.id, flag).subquery()
    place = func.row_number().over(partition_by=flagged.c.flag, order_by=flagged.c.id).label("place")
    numbered = select(flagged.c.id, flagged.c.flag, place).subquery()
    query = select(numbered.c.flag, Caption, Image, CaptionJobItem).join(Caption, Caption.id == numbered.c.id)
    query = query.join(Image, Image.id == Caption.image_id)
    query = query.join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
    query = query.where(CaptionJobItem.job_id == job.id, numbered.c.place <= EXAMPLES)
    rows: Sequence[Any] = session.execute(query.order_by(numbered.c.flag, Caption.id)).all()
    examples: dict[Flag, list[CaptionSchema]] = {}
    for name, caption, image, item in rows:
        examples.setdefault(name, []).append(render_caption(caption, image, item))
    return examples
