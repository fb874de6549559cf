"""REST: data sets and their images."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Response, UploadFile
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from services.captioner.placing import dataset_fingerprint
from shared.clip.templates import display_name
from shared.datasets import classes
from shared.datasets.archive import sniff
from shared.datasets.images import MEDIA_TYPES
from shared.datasets.lookup import display_names, get_dataset, usable_dataset
from shared.datasets.report import listed
from shared.db.models import FINAL, Dataset, Image, Job
from shared.errors import Conflict, InvalidInput, NotFound
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import SubmissionDep, job_routes
from shared.leaderboard_version import bump
from shared.schemas import common
from shared.schemas import datasets as schema
from shared.store.references import keep
from shared.web.api import After, CoreDep, Limit
from shared.web.auth import Reader, Writer
from shared.web.paging import page

router = APIRouter()

AT_ONCE = 10_000  # images whose rows, and those of their captions, go in one statement: some seconds


def render_dataset(session: Session, job: Job) -> schema.Dataset:
    row = session.get_one(Dataset, job.id)
    columns = {c.key: getattr(row, c.key) for c in Dataset.__table__.columns}
    return schema.Dataset(**common.JobResource.model_validate(job).model_dump() | columns)


@router.post("/datasets", status_code=202, response_model=schema.Dataset, summary="Upload labelled images")
def create_dataset(
    submission: SubmissionDep,
    file: Annotated[
        UploadFile,
        File(description="zip or tar of `class/file`, `split/class/file`, or images with `metadata.csv|jsonl`"),
    ],
    name: Annotated[str, Form(min_length=1, max_length=200)],
    domain: Annotated[str, Form(min_length=1, max_length=100, description="what the images are of: pets, birds, …")],
    split_seed: Annotated[int, Form(ge=0, lt=2**31)] = 0,
    val_fraction: Annotated[float, Form(ge=0, le=0.5, description="of train, where the data has no val split")] = 0.1,
    test_fraction: Annotated[float, Form(gt=0, le=0.5, description="where the data has no test split")] = 0.2,
) -> Any:
    sniff(file.file)
    digest, size = _digest(file.file)
    fields = {
        "name": name.strip(),
        "domain": domain.strip(),
        "archive_sha256": digest,
        "archive_bytes": size,
        "split_seed": split_seed,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
    }
    dataset_id = new_id("ds")
    archive_key = f"uploads/{dataset_id}"

    submission.core.store.put_file(archive_key, file.file)

    def create(session: Session) -> str:
        owner = submission.who.owner
        ledger.create(session, id=dataset_id, kind="ingest", owner=owner, request=fields, dataset_id=dataset_id)
        session.add(Dataset(id=dataset_id, owner=owner, archive_key=archive_key, **fields))
        session.flush()
        keep(session, submission.core.store, [archive_key])
        return dataset_id

    return submission.accept(json.dumps(fields, sort_keys=True), create, render_dataset, archive_key)


def _digest(file: Any) -> tuple[str, int]:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = file.tell()
    file.seek(0)
    return digest, size


@router.patch("/datasets/{id}", response_model=schema.Dataset, summary="Rename a data set, or its classes in prompts")
def edit_dataset(id: str, body: schema.DatasetEdit, core: CoreDep, who: Writer) -> Any:
    """Display names are what prompts and prefixes call a class whose folder has a code for a name. Captions written
    before keep their text and what was measured of it; classifiers scored before are ranked no more until they are
    scored again, as the data set's fingerprint is another. Display names are refused (409) before the ingestion has
    ended and while a job uses the data set: its prompts would be mixed."""
    with core.transaction() as session:
        row = get_dataset(session, who, id, lock=True)
        if body.name is not None:
            row.name = body.name
        if body.display_names is not None:
            usable_dataset(session, who, id)
            _refuse_in_use(session, id)
            names = _renamed(display_names(row), body.display_names)
            row.classes = [{"name": folder, "display_name": name} for folder, name in names.items()]
            row.fingerprint = _fingerprint(session, id, names)
        session.flush()
        bump(session, id)
        return render_dataset(session, session.get_one(Job, id))


def _renamed(names: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """Class name -> display name after the changes. Raises InvalidInput where captions could not tell classes apart."""
    if unknown := sorted(changes.keys() - names.keys()):
        raise InvalidInput(
            f"the data set has no class {listed(unknown)}; display names are given by class name, as in its 'classes'",
            code="unknown_class",
            param="display_names",
        )
    changed = {**names, **{folder: " ".join(classes.class_name(name).split()) for folder, name in changes.items()}}
    uses = Counter(changed.values())
    if same := sorted(folder for folder, name in changed.items() if uses[name] > 1):
        raise InvalidInput(
            f"the classes {listed(same)} would be called alike; give each class a display name of its own",
            code="class_names_collide",
            param="display_names",
        )
    classes.check_distinct(changed.values())
    return changed


def _fingerprint(session: Session, id: str, names: Mapping[str, str]) -> str:
    given = {folder: folder if name == display_name(folder) else f"{folder}\0{name}" for folder, name in names.items()}
    return dataset_fingerprint(session, id, given)


def _refuse_in_use(session: Session, id: str) -> None:
    reads = (Job.dataset_id == id) | (Job.request["held_aside_dataset_id"].astext == id)  # the latter: an evaluation
    busy = session.scalars(select(Job.id).where(reads, Job.status.not_in(FINAL)).limit(5)).all()
    if busy:
        raise Conflict(
            f"{id} is in use by {', '.join(busy)}; cancel these jobs or wait for them", code="in_use", param="id"
        )


@router.delete("/datasets/{id}", status_code=204, summary="Delete a data set, its images and captions")
def delete_dataset(id: str, core: CoreDep, who: Writer) -> None:
    """Refused while a job uses it. Classifiers made from it stay, with their scores."""
    with core.transaction() as session:
        row = get_dataset(session, who, id, lock=True)
        _refuse_in_use(session, id)
        while _delete_images(session, id):
            pass
        session.delete(row)
        session.flush()
        for job in session.scalars(select(Job).where(Job.dataset_id == id, Job.kind.in_(("ingest", "caption")))):
            session.delete(job)
        session.info.setdefault("obsolete", []).append(row.archive_key)
        bump(session, id)


def _delete_images(session: Session, id: str) -> bool:
    """Some of them, with their captions: a statement has bounded time, and a data set may have millions."""
    some = select(Image.id).where(Image.dataset_id == id).limit(AT_ONCE)
    return bool(session.scalars(delete(Image).where(Image.id.in_(some)).returning(Image.id)).first())


router.include_router(job_routes("ingest", "/datasets", render_dataset, schema.Dataset))


@router.get("/datasets/{id}/images", response_model=common.Page[schema.Image], summary="The images of a data set")
def list_images(
    id: str,
    core: CoreDep,
    who: Reader,
    after: After = None,
    limit: Limit = 100,
    split: common.Split | None = None,
    class_name: Annotated[str | None, Query(max_length=500)] = None,
) -> Any:
    with core.db.snapshot() as session:
        get_dataset(session, who, id)
        query = select(Image).where(Image.dataset_id == id)
        if split is not None:
            query = query.where(Image.split == split)
        if class_name is not None:
            query = query.where(Image.class_name == class_name)
        rows, more = page(session, query, Image.id, after, limit, ascending=True)
    data = [schema.Image.model_validate(row) for row in rows]
    return common.Page.of(data, more)


@router.get(
    "/images/{id}/content",
    response_class=Response,
    summary="An image's bytes, as uploaded",
    responses={200: {"content": {media_type: {} for media_type in MEDIA_TYPES}}},
)
def image_content(id: str, core: CoreDep, who: Reader) -> Response:
    with core.db.snapshot() as session:
        row = session.scalar(select(Image).where(Image.id == id, who.sees(Image.owner)))
    if row is None:
        raise NotFound(f"there is no image '{id}' among yours", param="id")
    headers = {
        "Content-Disposition": f'inline; filename="{row.id}.{row.media_type.rpartition("/")[2]}"',
        "Cache-Control": "private, max-age=31536000, immutable",
        "ETag": f'"{row.sha256}"',
    }
    return Response(core.store.read_blob(row.sha256), media_type=row.media_type, headers=headers)
