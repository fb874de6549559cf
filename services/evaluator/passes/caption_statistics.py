"""The captions that a classifier was trained on, in figures, from the rows of their job: mean length in CLIP tokens,
the share with a flag, distinct-2 (Li et al. 2016, arXiv 1510.03055) and the share that names its class. All of the
job's captions, those that the run left out too."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from sqlalchemy import Float, func, select
from sqlalchemy.orm import Session

from services.evaluator.passes.base import OnStep
from shared.db.models import Caption, CaptionJobItem

SAMPLE = 2_000  # captions read for distinct-2
_NO_LABEL = "label_missing"


class CaptionStatistics:
    """Yields nothing where the captions were deleted."""

    def __init__(self, session: Session, caption_job_id: str) -> None:
        self._session, self._job_id = session, caption_job_id
        self.detail: dict[str, Any] = {}

    def run(self, on_step: OnStep) -> Iterator[tuple[str, float]]:
        flags = Caption.flags + CaptionJobItem.flags
        captions, tokens, flagged, unnamed = self._session.execute(
            self._of_the_job(
                func.count(),
                func.avg(Caption.clip_tokens).cast(Float),
                func.count().filter(func.cardinality(flags) > 0),
                func.count().filter(flags.any(_NO_LABEL)),
            )
        ).one()
        if not captions:
            return
        # By md5 of the id: as good as drawn by lot, and the same at every call.
        texts = self._session.scalars(self._of_the_job(Caption.text).order_by(func.md5(Caption.id)).limit(SAMPLE)).all()
        self.detail = {"captions": captions, "tokens_mean": round(tokens, 2), "distinct_2_of": len(texts)}
        yield "captions_flagged", flagged / captions
        yield "captions_naming_class", 1 - unnamed / captions
        yield "captions_distinct_2", distinct_2(texts)

    def _of_the_job(self, *columns: Any) -> Any:
        query = select(*columns).select_from(Caption).join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
        return query.where(CaptionJobItem.job_id == self._job_id)


def distinct_2(texts: Iterable[str]) -> float:
    """Different word pairs / word pairs, case and punctuation aside; a pair lies within one text. 0 without any."""
    seen, total = set(), 0
    for text in texts:
        for pair in pairwise(re.findall(r"\w+(?:'\w+)*", text.lower())):
            seen.add(pair)
            total += 1
    return len(seen) / total if total else 0.0
