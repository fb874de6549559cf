"""REST: caption jobs, what they would do, and what they did."""

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session

from services.captioner.routes.preview import preview
from services.captioner.routes.report import report
from services.captioner.routes.submission import batchers_of, resolve
from shared.db.models import Job
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import SubmissionDep, get_job, job_routes
from shared.schemas import captions as schema
from shared.schemas import common
from shared.web.api import CoreDep
from shared.web.auth import Reader, Writer

router = APIRouter()


def render_caption_job(_: Session, job: Job) -> schema.CaptionJob:
    life = common.JobResource.model_validate(job).model_dump()
    # Requests of before there were imports do not say their source.
    request = {"source": "model"} | job.request
    return schema.CaptionJob.model_validate(
        {**life, "dataset_id": job.dataset_id, "request": request, "result": job.result}
    )


@router.post(
    "/caption_jobs", status_code=202, response_model=schema.CaptionJob, summary="Caption a split of a data set"
)
def create_caption_job(body: schema.CaptionJobRequest, submission: SubmissionDep, request: Request) -> Any:
    """With `redo`, fields that are not sent are those of the earlier job, and the seed is a new one."""

    def create(session: Session) -> str:
        dataset, whole = resolve(session, submission.core.settings, submission.who, body, batchers_of(request))
        job = ledger.create(
            session,
            id=new_id("cap"),
            kind="caption",
            owner=dataset.owner,
            request=whole.model_dump(),
            dataset_id=dataset.id,
        )
        return job.id

    # What was left out of a redo is not the same as its default sent.
    asked = body.model_dump_json(exclude_unset=body.redo is not None)
    return submission.accept(asked, create, render_caption_job)


@router.post(
    "/caption_jobs/preview",
    response_model=schema.CaptionPreview,
    summary="Dry run: prompts, images, reuse, tokens and time of a caption job, before anything is spent",
)
async def preview_caption_job(body: schema.CaptionPreviewRequest, core: CoreDep, who: Writer, request: Request) -> Any:
    """The body is a caption job's. With `live`, one image is captioned now; nothing is stored either way. The captions
    shown are measured and flagged as the job's are; the job may ask again for what comes out too long."""
    return await preview(batchers_of(request), core, who, body)


router.include_router(job_routes("caption", "/caption_jobs", render_caption_job, schema.CaptionJob))


@router.get(
    "/caption_jobs/{id}/report", response_model=schema.CaptionReport, summary="The captions of a job in figures"
)
def report_caption_job(id: str, core: CoreDep, who: Reader) -> Any:
    """As they are now, edits included; also while the job runs."""
    with core.db.snapshot() as session:
        return report(session, get_job(session, who, "caption", id))
