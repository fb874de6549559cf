"""REST: evaluations."""

import os
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from services.evaluator.scoring import rescoring
from services.evaluator.scoring.submission import submit
from shared.db.models import Job
from shared.jobs.routes import SubmissionDep, job_routes
from shared.schemas import common
from shared.schemas import evaluations as schema
from shared.web.api import CoreDep
from shared.web.auth import Reader, Writer

router = APIRouter(prefix="/v1", tags=["evaluator"])


def render(_: Session, job: Job) -> schema.Evaluation:
    life = common.JobResource.model_validate(job).model_dump()
    result = dict(job.result or {})
    asked = {**job.request, "dataset_id": job.dataset_id}
    if asked.get("classifier_id") is None:  # a bare model's is known once it was scored
        asked["classifier_id"] = result.get("classifier_id")
    return schema.Evaluation(**life, **asked, scores=result.pop("scores", None), result=result or None)


@router.post(
    "/evaluations", status_code=202, response_model=schema.Evaluation, summary="Score a classifier or a bare model"
)
def create_evaluation(body: schema.EvaluationRequest, submission: SubmissionDep) -> Any:
    return submission.accept(body.model_dump_json(), lambda s: submit(s, submission.who, body), render)


@router.post(
    "/evaluations/{id}/rescore",
    response_model=schema.Evaluation,
    summary="Compute every metric anew from the predictions kept, without the model",
)
def rescore(id: str, core: CoreDep, who: Writer) -> Any:
    """For metrics that are newer than the evaluation. What needs the model (robustness, forgetting, latency) stays."""
    return rescoring.rescore(core, who, id, render)


@router.get(
    "/evaluations/{id}/predictions",
    response_class=StreamingResponse,
    summary="Logits of every image, as Parquet",
    responses={
        200: {"content": {"application/vnd.apache.parquet": {}}},
        409: {"description": "none are kept: it has not succeeded, or a later one took its place"},
    },
)
def read_predictions(id: str, core: CoreDep, who: Reader) -> StreamingResponse:
    """Columns: image_id, path, label, logits; the class names stand in the file's metadata."""
    with core.db.snapshot() as session:
        key = rescoring.standing(session, who, id).predictions_key
    with ExitStack() as found:
        path = found.enter_context(core.store.local_file(key))
        file = found.enter_context(path.open("rb"))  # at once: a later evaluation's may take its place
        headers = {
            "Content-Disposition": f'attachment; filename="{id}.parquet"',
            "Content-Length": str(os.fstat(file.fileno()).st_size),
        }
        done = BackgroundTask(found.pop_all().close)
    parts = iter(partial(file.read, 1 << 20), b"")
    return StreamingResponse(parts, media_type="application/vnd.apache.parquet", headers=headers, background=done)


router.include_router(job_routes("evaluate", "/evaluations", render, schema.Evaluation))
