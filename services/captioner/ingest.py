"""The ingest job: an uploaded archive becomes images with classes and splits. Two passes over the archive, one file in
memory at a time. Repeating any step is harmless: blobs are stored by their hash, images are unique by path."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.datasets import metadata
from shared.datasets.archive import Archive, Member, open_archive
from shared.datasets.checks import check_classes, fingerprint
from shared.datasets.images import inspect
from shared.datasets.layout import Item, Plan, plan
from shared.datasets.limits import BadArchive
from shared.datasets.report import Notice, Report
from shared.datasets.splits import Labelled, assign
from shared.db.models import Dataset, Image
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.templates import display_name

CHUNK = 200  # images per commit


def ingest(claim: Claim) -> Finish:
    with claim.core.transaction() as session:
        dataset = session.get_one(Dataset, claim.id)
    claim.progress("reading the archive", 0, 1)
    with claim.core.store.local_file(dataset.archive_key) as path:
        archive = open_archive(path, keep=metadata.is_metadata)
        try:
            layout = plan(archive.names(), archive.kept, archive.directories, archive.report)
            _store(claim, archive, {item.source: item for item in layout.items})
            rows, final = _place(claim, dataset, layout)
            archive.report.notices += check_classes(final, layout.classes)
        except InvalidInput:
            with claim.transaction() as session:  # what was refused, file by file, explains why the whole was
                session.get_one(Dataset, claim.id).report = archive.report.as_dict()
            raise
    if any(item.caption for item in layout.items):
        text = (
            "The metadata holds captions; they are not imported with the images. POST the same metadata file to "
            "/v1/caption_jobs/import with this data set's id ('captune captions import') to train on them."
        )
        archive.report.notices.append(Notice("captions_not_imported", text))

    def finish(session: Session) -> dict[str, Any]:
        _write_splits(session, [{"row_id": i, "drawn": x.split} for i, x in zip(rows, final, strict=True)])
        row = session.get_one(Dataset, claim.id)
        names = sorted({x.class_name for x in final})
        row.classes = [{"name": name, "display_name": display_name(name)} for name in names]
        row.counts = _counts(final)
        row.report = archive.report.as_dict() | {"layout": layout.layout, "images": len(final)}
        row.fingerprint = fingerprint((x.path, x.sha256, x.class_name, x.split or "train") for x in final)
        return {"images": len(final), "refused": archive.report.as_dict()["refused_total"]}

    return finish


def _place(claim: Claim, dataset: Dataset, layout: Plan) -> tuple[list[str], list[Labelled]]:
    """Ids of the stored images, and the images with their final splits, ordered by path."""
    with claim.core.transaction() as session:
        query = select(Image.id, Image.path, Image.class_name, Image.sha256).where(Image.dataset_id == claim.id)
        rows = session.execute(query.order_by(Image.path)).all()
    explicit = {item.path: item.split for item in layout.items}
    stored = [Labelled(r.path, r.class_name, explicit[r.path], r.sha256) for r in rows]
    splits = assign(stored, dataset.split_seed, dataset.val_fraction, dataset.test_fraction)
    return [r.id for r in rows], [replace(x, split=split) for x, split in zip(stored, splits, strict=True)]


def _store(claim: Claim, archive: Archive, items: dict[str, Item]) -> None:
    done = 0
    chunk: list[dict[str, Any]] = []
    for member in archive.members():
        item = items.get(member.path)
        if item is None:
            continue
        claim.check()
        claim.progress("storing images", done, len(items))
        done += 1
        if (row := _image(claim, member, item, archive.report)) is not None:
            chunk.append(row)
        if len(chunk) == CHUNK:
            _write_images(claim, chunk)
            chunk = []
    _write_images(claim, chunk)
    claim.progress("storing images", done, max(done, 1))


def _image(claim: Claim, member: Member, item: Item, report: Report) -> dict[str, Any] | None:
    """Verify a picture by decoding it, and store its bytes; None (and a word in the report) where it is refused."""
    try:
        data = member.read()
        info = inspect(data)
    except BadArchive:
        raise
    except InvalidInput as refused:
        report.refuse(item.path, refused.code, refused.message)
        return None
    return {
        "id": new_id("img"),
        "owner": claim.owner,
        "dataset_id": claim.id,
        "path": item.path,
        "class_name": item.class_name,
        "split": item.split or "train",
        "sha256": claim.core.store.put_blob(data),
        "media_type": info.media_type,
        "width": info.width,
        "height": info.height,
        "bytes": len(data),
    }


def _write_images(claim: Claim, chunk: Sequence[dict[str, Any]]) -> None:
    if chunk:
        with claim.transaction() as session:
            session.execute(insert(Image).on_conflict_do_nothing(), chunk)


def _write_splits(session: Session, drawn: Sequence[dict[str, str | None]]) -> None:
    statement = update(Image.__table__).where(Image.__table__.c.id == bindparam("row_id"))  # type: ignore[arg-type]
    session.connection().execute(statement.values(split=bindparam("drawn")), drawn)


def _counts(images: Sequence[Labelled]) -> dict[str, dict[str, int]]:
    found = {split: Counter[str]() for split in ("train", "val", "test")}
    for image in images:
        found[image.split or "train"][image.class_name] += 1
    return {split: dict(sorted(counts.items())) for split, counts in found.items()}
