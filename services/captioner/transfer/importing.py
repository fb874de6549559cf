"""The task of an import: captions of a file become rows like a model's, at most once each.

The file is read three times: for which of its names each image goes to, then for what it would match, so that a file
that cannot be used changes nothing, then to write. Repeating any step is harmless: a caption is unique by (image, key).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.captioner.captioning import writing
from services.captioner.quality.inspect import Inspector
from services.captioner.quality.passes import mark_duplicates
from services.captioner.transfer.matching import Claims, Matcher, Target
from services.captioner.transfer.parse import Entry, Found, Refused, read
from shared.clip.tokens import token_counter
from shared.datasets.lookup import display_names
from shared.datasets.report import listed, printable
from shared.db.models import Caption, CaptionJobItem, Dataset, Image
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.captions import CaptionImport

CHUNK = 1_000  # captions per commit
LISTED = 100


@dataclass
class Listing:
    """All counted, the first 100 kept."""

    total: int = 0
    first: list[Any] = field(default_factory=list)

    def add(self, item: Any) -> None:
        self.total += 1
        if len(self.first) < LISTED and item not in self.first:
            self.first.append(item)

    def as_dict(self) -> dict[str, Any]:
        return {"total": self.total, "first": self.first}


@dataclass
class Survey:
    """What became of each caption in the file; `failures` lists all that were left out, as any caption job does."""

    matched: int = 0
    unmatched: Listing = field(default_factory=Listing)
    ambiguous: Listing = field(default_factory=Listing)
    refused: Listing = field(default_factory=Listing)
    failures: Listing = field(default_factory=Listing)

    def add(self, found: Entry | Refused, images: Iterable[Target], claimed: bool) -> None:
        if isinstance(found, Refused):
            where, message = printable(found.where), printable(found.message)
            self.refused.add({"where": where, "code": found.code, "message": message})
            self.failures.add({"path": where, "code": found.code, "message": message})
            return
        paths, name = [image.path for image in images], printable(found.name)
        if claimed:
            self.matched += 1
        elif paths:
            self.ambiguous.add({"name": name, "images": paths[:5]})
            called = (
                f"{len(paths)} images are called so" if len(paths) > 1 else "another name in the file means the same"
            )
            message = f"{called}: {listed(paths)}. Write the whole path."
            self.failures.add({"path": name, "code": "ambiguous_name", "message": message})
        else:
            self.unmatched.add(name)
            message = f"{found.where}: the data set has no image of this name."
            self.failures.add({"path": name, "code": "unknown_file", "message": printable(message)})

    def as_dict(self) -> dict[str, Any]:
        return {
            "matched": self.matched,
            "unmatched": self.unmatched.as_dict(),
            "ambiguous": self.ambiguous.as_dict(),
            "refused": self.refused.as_dict(),
            "failed": self.failures.total,
            "failures": self.failures.first,
        }


def import_captions(claim: Claim) -> Finish:
    request = CaptionImport.model_validate(claim.request)
    with claim.core.store.local_file(request.upload_key) as file:  # deleted when the job has ended, however
        settings = claim.core.settings
        counter = token_counter(request.clip_model, settings.model_cache, settings.model_roots)
        with claim.core.transaction() as session:
            names = display_names(session.get_one(Dataset, request.dataset_id))
            query = select(Image.id, Image.path, Image.class_name, Image.split)
            images = query.where(Image.dataset_id == request.dataset_id).execution_options(yield_per=10_000)
            claims = Claims(Matcher(Target(*row) for row in session.execute(images)))
        survey = _survey(claim, file, request, claims)
        inspector = Inspector(counter, list(names.values()), language=request.language)
        matched, done = _matched(file, request, claims), 0
        while chunk := list(islice(matched, CHUNK)):
            claim.check()
            claim.progress("importing captions", done, survey.matched)
            _write(claim, [_row(claim, request, inspector, names, entry, image) for entry, image in chunk])
            done += len(chunk)
        claim.progress("importing captions", done, max(done, 1))
        mark_duplicates(claim, claim.id)

    def finish(session: Session) -> dict[str, Any]:
        found = _counts(session, claim) | survey.as_dict()
        return found | {"reasked": 0, "trimmed": 0, "budget": counter.context_length, "captioner": _captioner(request)}

    return finish


def _survey(claim: Claim, file: Path, request: CaptionImport, claims: Claims) -> Survey:
    """Fills the claims. Raises InvalidInput where no caption names an image (`nothing_matched`), or the file makes no
    sense."""
    survey = Survey()
    claim.progress("reading the file", 0, 1)
    for found in _checking(claim, read(file, request.format)):
        if isinstance(found, Entry):
            claims.add(found.name, sidecar=found.sidecar)
    for found in _checking(claim, read(file, request.format)):
        if isinstance(found, Entry):
            survey.add(found, *claims.find(found.name, sidecar=found.sidecar))
        else:
            survey.add(found, (), False)
    if not survey.matched:
        first = "; ".join(f"{each['path']}: {each['message']}" for each in survey.failures.first[:3])
        raise InvalidInput(
            f"none of the {survey.failures.total} captions in {request.file_name} belongs to an image of "
            f"{request.dataset_id}; the first: {first or 'the file holds none'}",
            code="nothing_matched",
            param="file",
        )
    if survey.failures.total:
        claim.event(
            "import.left_out",
            f"{survey.failures.total} captions were left out: {survey.unmatched.total} name no image, "
            f"{survey.ambiguous.total} more than one, {survey.refused.total} cannot be used; the result lists them",
            level="warning",
        )
    return survey


def _checking(claim: Claim, entries: Found) -> Found:
    for number, found in enumerate(entries):
        if number % CHUNK == 0:
            claim.check()
        yield found


def _matched(file: Path, request: CaptionImport, claims: Claims) -> Iterator[tuple[Entry, Target]]:
    for found in read(file, request.format):
        if isinstance(found, Entry):
            images, claimed = claims.find(found.name, sidecar=found.sidecar)
            if claimed:
                yield found, images[0]


def _row(
    claim: Claim, request: CaptionImport, inspector: Inspector, names: dict[str, str], entry: Entry, image: Target
) -> writing.Row:
    # What the row's length and flags depend on belongs to it; what `excluded` says may change at any time.
    identity = ["import", entry.text, entry.characteristic, request.clip_model, request.language]
    inspected = inspector.edited(entry.text, names[image.class_name])
    return {
        "id": new_id("cpt"),
        "image_id": image.image_id,
        "key": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "characteristic": entry.characteristic,
        "text": entry.text,
        "clip_tokens": inspected.clip_tokens,
        "flags": inspected.flags,
        "excluded": entry.excluded,
        "provenance": {
            "source": "import",
            "file": request.file_name,
            "job_id": claim.id,
            "attempt": claim.attempt,
        },
        "replaces": False,
    }


def _write(claim: Claim, rows: list[writing.Row]) -> None:
    """Those that are there already, from this import or an earlier one, stay as they are and belong to this job too."""
    assert claim.dataset_id is not None
    with claim.transaction() as session:
        written = writing.write(
            session, job_id=claim.id, owner=claim.owner, dataset_id=claim.dataset_id, rows=rows, links=()
        )
        if written:  # walking over what is there already is no progress, or attempts would have no bound
            claim.advanced(session)


def _counts(session: Session, claim: Claim) -> dict[str, Any]:
    mine = Caption.provenance["job_id"].astext == claim.id
    excluded = func.count().filter(Caption.excluded)
    query = select(func.count(Caption.image_id.distinct()), func.count(), func.count().filter(mine), excluded)
    joined = (CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
    counts = session.execute(query.join(*joined).where(CaptionJobItem.job_id == claim.id)).one()
    images, captions, written, left_out = counts
    flag = func.unnest(Caption.flags + CaptionJobItem.flags).label("flag")
    each = select(flag).join(*joined).where(CaptionJobItem.job_id == claim.id).subquery().c.flag
    return {
        "images": images,
        "captions": captions,
        "written": written,
        "reused": captions - written,
        "excluded": left_out,
        "flags": {flag: n for flag, n in session.execute(select(each, func.count()).group_by(each).order_by(each))},
    }


def _captioner(request: CaptionImport) -> dict[str, str]:
    return {"engine": "import", "revision": f"import sha256:{request.sha256}", "precision": "none"}
