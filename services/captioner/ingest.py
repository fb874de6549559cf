"""The ingest job: an uploaded archive becomes images with classes and splits. Two passes over the archive, few files in
memory at a time, however many there are. Repeating any step is harmless: blobs are stored by their hash, images are
unique by path, and what an earlier attempt stored is not stored again."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Final, NamedTuple

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.captioner.placing import place
from shared.clip.templates import display_name
from shared.datasets import metadata
from shared.datasets.archive import Archive, Member, open_archive
from shared.datasets.catalogue import Names, Records
from shared.datasets.images import ImageInfo, inspect
from shared.datasets.layout import Item, plan
from shared.datasets.limits import MIB, BadArchive
from shared.datasets.report import Notice
from shared.db.models import Dataset, Image
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.store.references import keep

CHUNK: Final = 500  # images per commit
CHUNK_BYTES: Final = 16 * MIB
THREADS: Final = 2  # that decode; Python's own part of the work keeps no more of them busy
AHEAD: Final = 250  # images read while others are decoded or written
AHEAD_BYTES: Final = 16 * MIB


class _Picture(NamedTuple):
    item: Item
    data: bytes
    info: Future[ImageInfo]


def ingest(claim: Claim) -> Finish:
    with claim.core.transaction() as session:
        dataset = session.get_one(Dataset, claim.id)
    claim.progress("reading the archive", 0, 1)
    with claim.core.store.local_file(dataset.archive_key) as path:
        archive = open_archive(path, keep=metadata.is_metadata)
        try:
            layout = plan(archive.files(), archive.kept, archive.folders, archive.report)
            archive.kept.clear()
            _store(claim, archive, layout.items)
            placed = place(claim, dataset, layout.classes)
        except InvalidInput:
            with claim.transaction() as session:  # what was refused, file by file, explains why the whole was
                session.get_one(Dataset, claim.id).report = archive.report.as_dict()
            raise
    archive.report.notices += placed.notices
    if any(item.caption for item in layout.items):
        text = (
            "The metadata holds captions; they are not imported with the images. POST the same metadata file to "
            "/v1/caption_jobs/import with this data set's id ('captune captions import') to train on them."
        )
        archive.report.notices.append(Notice("captions_not_imported", text))
    images = sum(sum(classes.values()) for classes in placed.counts.values())

    def finish(session: Session) -> dict[str, Any]:
        row = session.get_one(Dataset, claim.id)
        names = sorted({name for classes in placed.counts.values() for name in classes})
        row.classes = [{"name": name, "display_name": display_name(name)} for name in names]
        row.counts = placed.counts
        row.report = archive.report.as_dict() | {"layout": layout.layout, "images": images}
        row.fingerprint = placed.fingerprint
        return {"images": images, "refused": archive.report.as_dict()["refused_total"]}

    return finish


def _store(claim: Claim, archive: Archive, items: Records[Item]) -> None:
    """Verify pictures by decoding them, and store them; in the report, in archive order, those that are refused."""
    stored, total = _stored(claim), len(items)
    done = len(stored)
    chunk: list[tuple[_Picture, ImageInfo]] = []
    size = 0
    with closing(_pictures(archive, items, stored)) as pictures:
        for picture in pictures:
            claim.check()
            claim.progress("storing images", done, total)
            done += 1
            try:
                chunk.append((picture, picture.info.result()))
            except InvalidInput as refused:
                archive.report.refuse(picture.item.path, refused.code, refused.message)
                continue
            size += len(picture.data)
            if len(chunk) == CHUNK or size >= CHUNK_BYTES:
                _write(claim, chunk)
                chunk, size = [], 0
    _write(claim, chunk)
    claim.progress("storing images", total, max(total, 1))


def _pictures(archive: Archive, items: Records[Item], stored: Names) -> Generator[_Picture]:
    """In archive order, each with its verdict to come: they are decoded while the next ones are read."""
    waiting: deque[_Picture] = deque()
    size = 0
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
    try:
        for member in archive.members():
            item = items.get(member.path)
            if item is None or _as_stored(item) in stored:
                continue
            waiting.append(_read(pool, member, item))
            size += len(waiting[-1].data)
            while len(waiting) > AHEAD or size > AHEAD_BYTES:
                size -= len(waiting[0].data)
                yield waiting.popleft()
        yield from waiting
    except BadArchive:
        yield from waiting  # what stands before the damage is reported before it
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _read(pool: ThreadPoolExecutor, member: Member, item: Item) -> _Picture:
    """Raises BadArchive; what concerns this file alone is left to the verdict."""
    try:
        data = member.read()
    except BadArchive:
        raise
    except InvalidInput as refused:
        verdict: Future[ImageInfo] = Future()
        verdict.set_exception(refused)
        return _Picture(item, b"", verdict)
    return _Picture(item, data, pool.submit(inspect, data))


def _stored(claim: Claim) -> Names:
    """What earlier attempts stored. An image whose split was drawn already is not among them: storing it again gives
    it back the split that the upload says, so that the draw begins anew."""
    stored = Names()
    if claim.attempt > 1:
        query = select(Image.split, Image.path).where(Image.dataset_id == claim.id)
        with claim.core.transaction() as session:
            for split, path in session.execute(query.execution_options(yield_per=10_000)):
                stored.add(f"{split}/{path}")
    return stored


def _as_stored(item: Item) -> str:
    return f"{item.split or 'train'}/{item.path}"


def _write(claim: Claim, chunk: list[tuple[_Picture, ImageInfo]]) -> None:
    """The rows are committed after the blobs that they name are durable."""
    if not chunk:
        return
    store = claim.core.store
    digests = store.put_blobs([picture.data for picture, _ in chunk])
    rows = [
        {
            "id": new_id("img"),
            "owner": claim.owner,
            "dataset_id": claim.id,
            "path": picture.item.path,
            "class_name": picture.item.class_name,
            "split": picture.item.split or "train",
            "sha256": digest,
            "media_type": info.media_type,
            "width": info.width,
            "height": info.height,
            "bytes": len(picture.data),
        }
        for (picture, info), digest in zip(chunk, digests, strict=True)
    ]
    statement = insert(Image)
    again = {"split": statement.excluded.split}
    statement = statement.on_conflict_do_update(index_elements=[Image.dataset_id, Image.path], set_=again)
    with claim.transaction() as session:
        session.execute(statement, rows)
        keep(session, store, {store.blob_key(digest) for digest in digests})
