"""The end of an ingest: splits are drawn, classes and duplicates looked at, the fingerprint taken. The stored images
are worked on in the database and pass by here: a million of them take no more memory than ten.

Splits that the upload names are kept, unnamed images are train. Where no image at all is test (or val), that split is
drawn from train, class by class (`splits.draw`); images of a class with the same bytes go to the same side."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from typing import Final, cast

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from shared.datasets.checks import Counts, check_counts, duplicates, fingerprint
from shared.datasets.classes import SPLITS, Split
from shared.datasets.report import Notice
from shared.datasets.splits import Labelled, draw, salt
from shared.db.models import Dataset, Image
from shared.jobs.claim import Claim

_READ: Final = 10_000  # rows fetched at once
_WRITTEN: Final = 2_000  # groups per commit

# Images of a class with the same bytes are one group. Ranks as in splits.py; a NUL can't stand in PostgreSQL's text.
_GROUPS: Final = text("""
    SELECT class_name, sha256, count(*) AS size
    FROM images
    WHERE dataset_id = :id AND split = 'train'
    GROUP BY class_name, sha256
    ORDER BY class_name, sha256(
        :salt || convert_to(class_name, 'UTF8') || '\\x00'::bytea || convert_to(min(path COLLATE "C"), 'UTF8')
    )
""")
_MOVE: Final = text("""
    UPDATE images SET split = drawn.split
    FROM unnest(CAST(:classes AS text[]), CAST(:digests AS text[]), CAST(:splits AS text[]))
        AS drawn (class_name, sha256, split)
    WHERE dataset_id = :id AND images.split = 'train'
        AND images.sha256 = drawn.sha256 AND images.class_name = drawn.class_name
""")
_DUPLICATES: Final = text("""
    SELECT * FROM (
        SELECT path, class_name, split, first_value(path) OVER same AS first_path,
            first_value(class_name) OVER same AS first_class, first_value(split) OVER same AS first_split
        FROM images WHERE dataset_id = :id
        WINDOW same AS (PARTITION BY sha256 ORDER BY path COLLATE "C")
    ) AS image
    WHERE class_name <> first_class OR split <> first_split
    ORDER BY path COLLATE "C"
""")


@dataclass(frozen=True)
class Placed:
    """`counts`: images by split and class."""

    counts: dict[str, dict[str, int]]
    notices: list[Notice]
    fingerprint: str


def place(claim: Claim, dataset: Dataset, declared: list[str]) -> Placed:
    """Gives each stored image its final split, where those that the upload names are stored already. May be begun
    again only after these have been stored again. `declared`, and what is raised: as in `check_counts`."""
    counts = _counts(claim)
    notices = check_counts(counts, declared)
    _draw(claim, dataset, counts)
    with claim.core.transaction() as session:
        rows = session.execute(_DUPLICATES, {"id": claim.id}, execution_options={"yield_per": _READ})
        found = duplicates(
            (Labelled(r.first_path, r.first_class, r.first_split), Labelled(r.path, r.class_name, r.split))
            for r in rows
        )
    with claim.core.transaction() as session:
        return Placed(_counts(claim), notices + found, dataset_fingerprint(session, claim.id))


def dataset_fingerprint(session: Session, dataset_id: str, labels: Mapping[str, str] | None = None) -> str:
    """Of the stored images; labels: by class name, where they are not just that."""
    query = select(Image.path, Image.sha256, Image.class_name, Image.split).where(Image.dataset_id == dataset_id)
    rows = session.execute(query.execution_options(yield_per=_READ))
    return fingerprint(
        (path, sha256, labels[folder] if labels else folder, cast(Split, split)) for path, sha256, folder, split in rows
    )


def _counts(claim: Claim) -> dict[str, dict[str, int]]:
    query = select(Image.split, Image.class_name, func.count()).where(Image.dataset_id == claim.id)
    with claim.core.transaction() as session:
        rows = session.execute(query.group_by(Image.split, Image.class_name)).all()
    return {split: dict(sorted((name, n) for s, name, n in rows if s == split)) for split in SPLITS}


def _draw(claim: Claim, dataset: Dataset, counts: Counts) -> None:
    train = counts["train"]
    val_fraction = 0.0 if counts["val"] else dataset.val_fraction
    test_fraction = 0.0 if counts["test"] else dataset.test_fraction
    with claim.core.transaction() as reading:
        values = {"id": claim.id, "salt": salt(dataset.split_seed, "").encode()}
        rows = reading.execute(_GROUPS, values, execution_options={"yield_per": _READ})
        moves = (
            (name, digest, split)
            for name, groups in groupby(rows, attrgetter("class_name"))
            for digest, split in draw(((g.sha256, g.size) for g in groups), train[name], val_fraction, test_fraction)
        )
        while chunk := list(islice(moves, _WRITTEN)):
            claim.check()
            with claim.transaction() as session:
                classes, digests, splits = map(list, zip(*chunk, strict=True))
                session.execute(_MOVE, {"id": claim.id, "classes": classes, "digests": digests, "splits": splits})
