"""REST: fine-tuning jobs in OpenAI's shape, the methods, and the classifiers they made. Groups: groups.py."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session

from services.trainer import methods
from services.trainer.routes import soup_request
from services.trainer.routes.rendering import render
from services.trainer.routes.submission import create_run, ensure_baselines, resolve
from shared import leaderboard_version
from shared.datasets.lookup import usable_dataset
from shared.db.models import FINAL, Checkpoint, Classifier, Evaluation, Job
from shared.errors import Conflict, NotFound
from shared.jobs.routes import SubmissionDep, Where, get_job, job_routes
from shared.schemas import common
from shared.schemas import fine_tuning as schema
from shared.web.api import After, CoreDep, Limit
from shared.web.auth import Principal, Reader, Writer
from shared.web.paging import page

router = APIRouter(prefix="/v1", tags=["trainer"])


@router.post(
    "/fine_tuning/jobs", status_code=202, response_model=schema.FineTuningJob, summary="Fine-tune CLIP on a data set"
)
def create_job(body: schema.FineTuningRequest, submission: SubmissionDep) -> Any:
    def create(session: Session) -> str:
        dataset = usable_dataset(session, submission.who, body.dataset_id, lock=True)
        job = create_run(session, dataset, resolve(session, submission.who, dataset, body))
        ensure_baselines(session, dataset, body.model)
        return job.id

    return submission.accept(body.model_dump_json(), create, render)


def _of_group(group_id: Annotated[str | None, Query(max_length=100)] = None) -> Where:
    return [] if group_id is None else [Job.group_id == group_id]


@router.get("/fine_tuning/methods", response_model=common.Page[schema.Method], summary="Ways of making a classifier")
def list_methods(who: Reader) -> Any:
    return common.Page(data=[schema.Method(**m) for m in methods.describe()], has_more=False, last_id=None)


router.include_router(job_routes("fine_tune", "/fine_tuning/jobs", render, schema.FineTuningJob, _of_group))


@router.get(
    "/fine_tuning/jobs/{id}/checkpoints",
    response_model=common.Page[schema.FineTuningCheckpoint],
    summary="What the job has saved",
)
def list_checkpoints(id: str, core: CoreDep, who: Reader, after: After = None, limit: Limit = 20) -> Any:
    with core.db.snapshot() as session:
        get_job(session, who, "fine_tune", id)
        rows, more = page(session, select(Checkpoint).where(Checkpoint.job_id == id), Checkpoint.id, after, limit)
    data = [schema.FineTuningCheckpoint.model_validate(row) for row in rows]
    return common.Page.of(data, more)


@router.get("/classifiers", response_model=common.Page[schema.Classifier], summary="What fine-tuning made")
def list_classifiers(
    core: CoreDep,
    who: Reader,
    after: After = None,
    limit: Limit = 20,
    dataset_id: Annotated[str | None, Query(max_length=100)] = None,
    group_id: Annotated[str | None, Query(max_length=100)] = None,
    tag: Annotated[str | None, Query(max_length=64)] = None,
) -> Any:
    query = select(Classifier).where(who.sees(Classifier.owner))
    if dataset_id is not None:
        query = query.where(Classifier.dataset_id == dataset_id)
    if group_id is not None:
        query = query.where(Classifier.group_id == group_id)
    if tag is not None:
        query = query.where(Classifier.tags.contains([tag]))
    with core.db.snapshot() as session:
        rows, more = page(session, query, Classifier.id, after, limit)
    data = [schema.Classifier.model_validate(row) for row in rows]
    return common.Page.of(data, more)


def _classifier(session: Session, who: Principal, id: str, *, lock: bool = False) -> Classifier:
    query = select(Classifier).where(Classifier.id == id, who.sees(Classifier.owner))
    row = session.scalar(query.with_for_update(key_share=True) if lock else query)
    if row is None:
        raise NotFound(f"there is no classifier '{id}' among yours; GET /v1/classifiers lists them", param="id")
    return row


@router.get("/classifiers/{id}", response_model=schema.Classifier, summary="One classifier")
def show_classifier(id: str, core: CoreDep, who: Reader) -> Any:
    with core.db.snapshot() as session:
        return schema.Classifier.model_validate(_classifier(session, who, id))


@router.patch("/classifiers/{id}", response_model=schema.Classifier, summary="Change its tags, or pin it")
def edit_classifier(id: str, body: schema.ClassifierEdit, core: CoreDep, who: Writer) -> Any:
    """Neither is part of its setting: it stays in its row of the leaderboard."""
    with core.transaction() as session:
        row = _classifier(session, who, id, lock=True)
        if body.tags is not None:
            row.tags = list(dict.fromkeys(body.tags))
        if body.pinned is not None:
            row.pinned = body.pinned
        session.flush()
        _bump(session, row)
        return schema.Classifier.model_validate(row)


@router.delete("/classifiers/{id}", status_code=204, summary="Delete a classifier, its scores and its files")
def delete_classifier(id: str, core: CoreDep, who: Writer) -> None:
    with core.transaction() as session:
        row = _classifier(session, who, id, lock=True)
        if busy := _used_by(session, id):
            raise Conflict(f"{busy} is using this classifier; cancel it or wait", code="in_use", param="id")
        obsolete = {row.storage_key, *session.scalars(select(Evaluation.predictions_key).where(_scored(id)))}
        if row.job_id is not None:
            checkpoints = session.scalars(select(Checkpoint).where(Checkpoint.job_id == row.job_id)).all()
            obsolete |= {each.storage_key for each in checkpoints}
            session.execute(delete(Checkpoint).where(Checkpoint.job_id == row.job_id))
        _bump(session, row)
        session.delete(row)
        session.info.setdefault("obsolete", []).extend(sorted(obsolete))


def _scored(id: str) -> ColumnElement[bool]:
    return Evaluation.classifier_id == id


def _used_by(session: Session, id: str) -> str | None:
    """A job that is not final and needs the classifier: one that scores it, or a soup it may become a member of."""
    scoring = (Job.kind == "evaluate") & (Job.request["classifier_id"].astext == id)
    member = Job.request["method"]["hyperparameters"]["classifier_ids"].contains([id])
    averaging = (Job.kind == "fine_tune") & (Job.request["method"]["type"].astext == soup_request.METHOD) & member
    return session.scalar(select(Job.id).where(Job.status.not_in(FINAL), scoring | averaging).limit(1))


def _bump(session: Session, row: Classifier) -> None:
    """Every leaderboard that shows the classifier has changed."""
    elsewhere = session.scalars(select(Evaluation.dataset_id).where(_scored(row.id))).all()
    for dataset_id in sorted({row.dataset_id, *elsewhere}):
        leaderboard_version.bump(session, dataset_id)
