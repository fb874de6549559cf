"""REST: captions made elsewhere come in, and go out in the same formats."""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Response, UploadFile
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from services.captioner.routes.caption_jobs import render_caption_job
from services.captioner.transfer.export import MEDIA_TYPES, WRITERS, Include, exported
from services.captioner.transfer.parse import check, guess
from shared.datasets.lookup import usable_dataset
from shared.datasets.report import printable
from shared.db.models import Dataset
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import SubmissionDep, get_job
from shared.schemas import captions as schema
from shared.store.references import keep
from shared.web.api import CoreDep, accepted
from shared.web.auth import Reader

router = APIRouter()


@router.post(
    "/caption_jobs/import",
    status_code=202,
    response_model=schema.CaptionJob,
    summary="Import captions made elsewhere",
)
def import_captions(
    submission: SubmissionDep,
    response: Response,
    file: Annotated[
        UploadFile,
        File(
            description="JSON keyed by image path or file name; a JSON list, JSONL or CSV of `file_name` (or `path`, "
            "`image`), `caption` (or `text`) and, if wanted, `characteristic` and `excluded` (true: left out of "
            "training); or a zip or tar of `.txt` sidecars, one caption a line, which carry neither of the two"
        ),
    ],
    dataset_id: Annotated[str, Form(max_length=100)],
    format: Annotated[schema.TransferFormat | None, Form(description="guessed from the file where not given")] = None,
    clip_model: Annotated[
        str, Form(max_length=500, description="the CLIP whose tokenizer sets the length budget")
    ] = "starter",
    language: Annotated[Literal["en", "any"], Form(description="any: the language is not checked")] = "en",
) -> Any:
    """A caption job like any other, so fine-tuning can name it. Captions belong to the image whose whole path they
    give, or the end of it where that is unique; the job's result lists those that name none or several. A caption that
    an earlier import brought stays as it is now, `excluded` too."""
    name = file.filename or "captions"
    if format is None:
        format = guess(file.file, name)
    else:
        check(file.file, format)
    fields: dict[str, Any] = {
        "dataset_id": dataset_id,
        "format": format,
        "file_name": printable(name),
        "sha256": hashlib.file_digest(file.file, "sha256").hexdigest(),  # type: ignore[arg-type]
        "clip_model": clip_model,
        "language": None if language == "any" else language,
    }
    file.file.seek(0)
    job_id = new_id("cap")
    request = schema.CaptionImport(**fields, upload_key=f"uploads/{job_id}")
    submission.core.store.put_file(request.upload_key, file.file)

    def create(session: Session) -> str:
        dataset = usable_dataset(session, submission.who, dataset_id, lock=True)
        ledger.create(
            session,
            id=job_id,
            kind="caption",
            owner=dataset.owner,
            request=request.model_dump(),
            dataset_id=dataset.id,
        )
        keep(session, submission.core.store, [request.upload_key])
        return job_id

    asked = json.dumps(fields, sort_keys=True)
    job = submission.accept(asked, create, render_caption_job, request.upload_key)
    accepted(response, f"/v1/caption_jobs/{job.id}")
    return job


@router.get(
    "/caption_jobs/{id}/export",
    response_class=StreamingResponse,
    summary="A job's captions as a file",
    responses={200: {"content": {media_type: {} for media_type, _ in MEDIA_TYPES.values()}}},
)
def export_captions(
    id: str,
    core: CoreDep,
    who: Reader,
    format: Annotated[schema.TransferFormat, Query(description="txt: a zip of sidecars")] = "json",
    include: Annotated[
        Include, Query(description="usable: without what is excluded by hand or by fine-tuning's default flags")
    ] = "all",
) -> StreamingResponse:
    """The captions as they are now, edits included, by image path. What was exported can be imported again; txt carries
    neither characteristics nor what is excluded."""
    with core.db.snapshot() as session:
        job = get_job(session, who, "caption", id)
        assert job.dataset_id is not None
        dataset_id, dataset = job.dataset_id, session.get_one(Dataset, job.dataset_id).name
    media_type, suffix = MEDIA_TYPES[format]
    name = "-".join(part for part in (re.sub(r"[^A-Za-z0-9]+", "-", dataset).strip("-")[:60], "captions", id) if part)
    return StreamingResponse(
        WRITERS[format](exported(core, id, dataset_id, include)),
        media_type=media_type,
        headers={"Content-Disposition": f'attachment; filename="{name}.{suffix}"', "X-Content-Type-Options": "nosniff"},
    )
