"""A job's captions as a file, written while they are read: the same formats that can be imported."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Select, func, select

from services.captioner.transfer.matching import stem
from shared.core import Core
from shared.db.models import Caption, CaptionJobItem, Image, Job
from shared.errors import NotFound
from shared.schemas.captions import EXCLUDED_BY_DEFAULT, TransferFormat
from shared.spreadsheet import defused

Include = Literal["all", "usable"]
PAGE: Final = 500  # images per page
COLUMNS: Final = ("file_name", "caption", "characteristic", "flags", "excluded")


@dataclass(frozen=True, slots=True)
class Exported:
    """One image with its captions, at least one. `sidecar` is the name of its `.txt` file."""

    path: str
    sidecar: str
    captions: list[dict[str, Any]]  # caption, characteristic, flags, excluded


def exported(core: Core, job_id: str, dataset_id: str, include: Include) -> Iterator[Exported]:
    """By image path, in keyset pages of 500 images, each a short transaction: memory does not grow with the job.
    Raises NotFound where the job was deleted meanwhile: what was sent must not pass for all of it."""
    shared_stems = _shared_stems(core, dataset_id)
    last = ""
    while True:
        with core.db.snapshot() as session:
            page = select(Image.id, Image.path).where(Image.dataset_id == dataset_id, Image.path > last)
            images = session.execute(page.order_by(Image.path).limit(PAGE)).all()
            rows = session.execute(
                _captions(job_id, include).where(Caption.image_id.in_([id for id, _ in images]))
            ).all()
            if session.get(Job, job_id) is None:
                raise NotFound(f"the caption job {job_id} was deleted while its captions were read")
        if not images:
            return
        captions: dict[str, list[dict[str, Any]]] = {}
        for image_id, text, characteristic, flags, excluded in rows:
            row = {"caption": text, "characteristic": characteristic, "flags": flags, "excluded": excluded}
            captions.setdefault(image_id, []).append(row)
        for id, path in images:
            if id in captions:
                own = stem(path)
                yield Exported(path, f"{path if own in shared_stems else own}.txt", captions[id])
        last = images[-1].path


def _captions(job_id: str, include: Include) -> Select[str, str, str, list[str], bool]:
    flags = Caption.flags + CaptionJobItem.flags
    query = select(Caption.image_id, Caption.text, Caption.characteristic, flags, Caption.excluded)
    query = query.join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id).where(CaptionJobItem.job_id == job_id)
    if include == "usable":
        query = query.where(~Caption.excluded, ~flags.overlap(list(EXCLUDED_BY_DEFAULT)))
    return query.order_by(Caption.id)


def _shared_stems(core: Core, dataset_id: str) -> set[str]:
    """Paths without extension that do not say which image they mean: `1.jpg` beside `1.png`, or beside an image `1`.
    As `matching.stem` has it; usually none."""
    own = func.regexp_replace(Image.path, r"([^/])\.[^./]*$", r"\1")
    stems = select(own.label("stem")).where(Image.dataset_id == dataset_id).subquery()
    repeated = select(stems.c.stem).group_by(stems.c.stem).having(func.count() > 1)
    whole = select(Image.path).where(Image.dataset_id == dataset_id, Image.path.in_(select(stems.c.stem)))
    with core.db.snapshot() as session:
        return {*session.scalars(repeated), *session.scalars(whole)}


def as_json(images: Iterable[Exported]) -> Iterator[bytes]:
    """`{"cat/1.png": [{"caption": …, "characteristic": …}], …}`"""
    before = "{\n"
    for image in images:
        yield f"{before}{_dump(image.path)}: {_dump(image.captions)}".encode()
        before = ",\n"
    yield b"{}\n" if before == "{\n" else b"\n}\n"


def as_jsonl(images: Iterable[Exported]) -> Iterator[bytes]:
    for image in images:
        yield "".join(_dump({"file_name": image.path, **caption}) + "\n" for caption in image.captions).encode()


def as_csv(images: Iterable[Exported]) -> Iterator[bytes]:
    """Several flags of a caption stand in one cell, spaces between them. What a spreadsheet would take for a formula
    stands behind a single quote, which an import takes away again."""
    yield _csv([COLUMNS])
    for image in images:
        yield _csv(
            [image.path, c["caption"], c["characteristic"], " ".join(c["flags"]), str(c["excluded"]).lower()]
            for c in image.captions
        )


def as_txt(images: Iterable[Exported]) -> Iterator[bytes]:
    """A zip of sidecars, one caption a line: a line break inside becomes a space, and characteristics are lost. What
    grows is the zip's own directory, a few hundred bytes per image."""
    out = _Pipe()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for image in images:
            lines = (" ".join(c["caption"].replace("\r", "\n").split("\n")) for c in image.captions)
            entry = zipfile.ZipInfo(image.sidecar)  # a fixed date: the same captions give the same bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(entry, "".join(f"{line}\n" for line in lines))
            yield out.taken()
    yield out.taken()


WRITERS: dict[TransferFormat, Callable[[Iterable[Exported]], Iterator[bytes]]] = {
    "json": as_json,
    "jsonl": as_jsonl,
    "csv": as_csv,
    "txt": as_txt,
}
MEDIA_TYPES: dict[TransferFormat, tuple[str, str]] = {  # and how a file of it is called
    "json": ("application/json", "json"),
    "jsonl": ("application/x-ndjson", "jsonl"),
    "csv": ("text/csv; charset=utf-8", "csv"),
    "txt": ("application/zip", "zip"),
}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _csv(rows: Iterable[Iterable[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(map(defused, row) for row in rows)
    return out.getvalue().encode()


class _Pipe(io.RawIOBase):
    """What a zip is written to: it cannot seek, and forgets what was taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)
