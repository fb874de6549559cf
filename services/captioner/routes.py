"""REST: data sets, their images, caption jobs and captions."""

import hashlib
import json
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Response, UploadFile
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.auth import Principal, Reader, Writer
from shared.datasets.archive import sniff
from shared.datasets.lookup import get_dataset, usable_dataset
from shared.db.models import FINAL, Caption, CaptionJobItem, Dataset, Image, Job
from shared.errors import Conflict, NotFound
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import SubmissionDep, get_job, job_routes
from shared.paging import page
from shared.schemas import captions as caption_schema
from shared.schemas import common
from shared.schemas import datasets as schema
from shared.web import After, CoreDep, Limit

router = APIRouter(prefix="/v1", tags=["captioner"])


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

    def create(session: Session) -> str:
        submission.core.store.put_file(archive_key, file.file)
        owner = submission.who.owner
        ledger.create(session, id=dataset_id, kind="ingest", owner=owner, request=fields, dataset_id=dataset_id)
        session.add(Dataset(id=dataset_id, owner=owner, archive_key=archive_key, **fields))
        session.flush()
        return dataset_id

    return submission.accept(json.dumps(fields, sort_keys=True), create, render_dataset)


def _digest(file: Any) -> tuple[str, int]:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = file.tell()
    file.seek(0)
    return digest, size


@router.delete("/datasets/{id}", status_code=204, summary="Delete a data set, its images and captions")
def delete_dataset(id: str, core: CoreDep, who: Writer) -> None:
    """Refused while a job uses it. Classifiers made from it stay, with their scores."""
    with core.transaction() as session:
        row = get_dataset(session, who, id, lock=True)
        busy = session.scalars(select(Job.id).where(Job.dataset_id == id, Job.status.not_in(FINAL)).limit(5)).all()
        if busy:
            raise Conflict(
                f"{id} is in use by {', '.join(busy)}; cancel these jobs or wait for them", code="in_use", param="id"
            )
        session.delete(row)
        session.flush()
        for job in session.scalars(select(Job).where(Job.dataset_id == id, Job.kind.in_(("ingest", "caption")))):
            session.delete(job)
        session.info.setdefault("obsolete", []).append(row.archive_key)


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
    with core.transaction() as session:
        get_dataset(session, who, id)
        query = select(Image).where(Image.dataset_id == id)
        if split is not None:
            query = query.where(Image.split == split)
        if class_name is not None:
            query = query.where(Image.class_name == class_name)
        rows, more = page(session, query, Image.id, after, limit, ascending=True)
    data = [schema.Image.model_validate(row) for row in rows]
    return common.Page.of(data, more)


@router.get("/images/{id}/content", response_class=Response, summary="An image's bytes, as uploaded")
def image_content(id: str, core: CoreDep, who: Reader) -> Response:
    with core.transaction() as session:
        row = session.scalar(select(Image).where(Image.id == id, who.sees(Image.owner)))
    if row is None:
        raise NotFound(f"there is no image '{id}' among yours", param="id")
    headers = {
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=31536000, immutable",
        "ETag": f'"{row.sha256}"',
    }
    return Response(core.store.read_blob(row.sha256), media_type=row.media_type, headers=headers)


def render_caption_job(_: Session, job: Job) -> caption_schema.CaptionJob:
    life = common.JobResource.model_validate(job).model_dump()
    return caption_schema.CaptionJob(**life, dataset_id=job.dataset_id, request=job.request, result=job.result)


@router.post(
    "/caption_jobs", status_code=202, response_model=caption_schema.CaptionJob, summary="Caption a split of a data set"
)
def create_caption_job(body: caption_schema.CaptionJobRequest, submission: SubmissionDep) -> Any:
    return submission.accept(body.model_dump_json(), lambda s: _submit(s, submission.who, body), render_caption_job)


def _submit(session: Session, who: Principal, body: caption_schema.CaptionJobRequest) -> str:
    dataset = usable_dataset(session, who, body.dataset_id, lock=True)
    if body.domain is None:
        body = body.model_copy(update={"domain": dataset.domain})
    if len(set(body.characteristics)) != len(body.characteristics):
        body = body.model_copy(update={"characteristics": list(dict.fromkeys(body.characteristics))})
    job = ledger.create(
        session,
        id=new_id("cap"),
        kind="caption",
        owner=dataset.owner,
        request=body.model_dump(),
        dataset_id=dataset.id,
    )
    return job.id


router.include_router(job_routes("caption", "/caption_jobs", render_caption_job, caption_schema.CaptionJob))


@router.get("/datasets/{id}/captions", response_model=common.Page[caption_schema.Caption], summary="Captions")
def list_captions(
    id: str,
    core: CoreDep,
    who: Reader,
    after: After = None,
    limit: Limit = 100,
    caption_job_id: Annotated[str | None, Query(max_length=100)] = None,
    class_name: Annotated[str | None, Query(max_length=500)] = None,
) -> Any:
    with core.transaction() as session:
        get_dataset(session, who, id)
        query = select(Caption).where(Caption.dataset_id == id)
        if caption_job_id is not None:
            get_job(session, who, "caption", caption_job_id)
            query = query.join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id).where(
                CaptionJobItem.job_id == caption_job_id
            )
        if class_name is not None:
            query = query.join(Image, Image.id == Caption.image_id).where(Image.class_name == class_name)
        rows, more = page(session, query, Caption.id, after, limit, ascending=True)
        ids = {row.image_id for row in rows}
        images = {image.id: image for image in session.scalars(select(Image).where(Image.id.in_(ids)))}
    data = [_caption(row, images[row.image_id]) for row in rows]
    return common.Page.of(data, more)


def _caption(row: Caption, image: Image) -> caption_schema.Caption:
    columns = {c.key: getattr(row, c.key) for c in Caption.__table__.columns}
    return caption_schema.Caption(**columns, path=image.path, class_name=image.class_name)
