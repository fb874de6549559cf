"""REST: fine-tuning jobs in OpenAI's shape, the methods, and the classifiers they made."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from services.trainer import methods
from shared.auth import Principal, Reader, Writer
from shared.datasets.lookup import usable_dataset
from shared.db.models import FINAL, Checkpoint, Classifier, Dataset, Job
from shared.errors import Conflict, InvalidInput, NotFound
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import SubmissionDep, get_job, job_routes
from shared.paging import page
from shared.schemas import common
from shared.schemas import fine_tuning as schema
from shared.web import After, CoreDep, Limit

BASELINES = ("zero_shot", "zero_shot_ensemble")  # made once for each (data set, model), so that they are always ranked

router = APIRouter(prefix="/v1", tags=["trainer"])


def render(_: Session, job: Job) -> schema.FineTuningJob:
    life = common.JobResource.model_validate(job).model_dump()
    result = job.result or {}
    return schema.FineTuningJob(
        **life,
        **job.request,
        result=job.result,
        fine_tuned_model=result.get("classifier_id"),
        evaluation_id=result.get("evaluation_id"),
    )


@router.post(
    "/fine_tuning/jobs", status_code=202, response_model=schema.FineTuningJob, summary="Fine-tune CLIP on a data set"
)
def create_job(body: schema.FineTuningRequest, submission: SubmissionDep) -> Any:
    return submission.accept(body.model_dump_json(), lambda s: _submit(s, submission.who, body), render)


def _submit(session: Session, who: Principal, body: schema.FineTuningRequest) -> str:
    dataset = usable_dataset(session, who, body.dataset_id, lock=True)
    method = methods.build(body.method.type, body.method.hyperparameters)
    _check_captions(session, who, body, method.needs_captions)
    if body.validation == "few_shot" and body.shots is None:
        raise InvalidInput(
            "validation 'few_shot' takes as many val images per class as there are shots: give 'shots', or choose "
            "'full' or 'none'",
            code="shots_missing",
            param="shots",
        )
    if not method.trains:
        # Nothing is drawn and nothing is chosen: such a run does not depend on shots, seeds or validation.
        body = body.model_copy(update={"shots": None, "validation": "none", "seed": 0, "shot_seed": 0})
    body.method.hyperparameters = method.hyperparameters.model_dump()
    job = ledger.create(
        session,
        id=new_id("ft"),
        kind="fine_tune",
        owner=dataset.owner,
        request=body.model_dump(),
        dataset_id=dataset.id,
    )
    for baseline in BASELINES:
        _ensure_baseline(session, dataset, body.model, baseline)
    return job.id


def _check_captions(session: Session, who: Principal, body: schema.FineTuningRequest, needed: bool) -> None:
    if not needed:
        if body.caption_job_id is not None:
            raise InvalidInput(
                f"method '{body.method.type}' reads no captions; leave 'caption_job_id' out",
                code="captions_unused",
                param="caption_job_id",
            )
        return
    if body.caption_job_id is None:
        raise InvalidInput(
            f"method '{body.method.type}' trains on captions: give 'caption_job_id', the id of a caption job of this "
            "data set (POST /v1/caption_jobs makes one)",
            code="captions_missing",
            param="caption_job_id",
        )
    job = get_job(session, who, "caption", body.caption_job_id)
    if job.dataset_id != body.dataset_id:
        raise InvalidInput(
            f"{job.id} captioned the data set {job.dataset_id}, not {body.dataset_id}; name a caption job of that one",
            code="captions_of_another_dataset",
            param="caption_job_id",
        )
    if job.request.get("split", "train") != "train":  # an import covers every split
        raise InvalidInput(
            f"{job.id} captioned the '{job.request['split']}' split; training needs captions of 'train'",
            code="captions_of_another_split",
            param="caption_job_id",
        )
    if job.status != "succeeded":
        raise Conflict(
            f"{job.id} is {job.status}; training needs a caption job that has succeeded",
            code="captions_not_ready",
            param="caption_job_id",
        )


def _ensure_baseline(session: Session, dataset: Dataset, model: str, method: str) -> None:
    """Runs under the data set's row lock, so two submissions at once make one baseline."""
    exists = session.scalar(
        select(Job.id)
        .outerjoin(Classifier, Classifier.job_id == Job.id)
        .where(
            Job.kind == "fine_tune",
            Job.dataset_id == dataset.id,
            Job.owner == dataset.owner,
            # Renaming its classes gives a data set another fingerprint, and its baselines other texts.
            or_(Job.status.not_in(FINAL), Classifier.data_fingerprint == dataset.fingerprint),
            Job.request["model"].astext == model,
            Job.request["method"]["type"].astext == method,
        )
        .limit(1)
    )
    if exists is None:
        body = schema.FineTuningRequest(
            model=model,
            dataset_id=dataset.id,
            method=schema.MethodSpec(type=method),
            validation="none",
            metadata={"made_by": "captune", "role": "baseline"},
        )
        ledger.create(
            session,
            id=new_id("ft"),
            kind="fine_tune",
            owner=dataset.owner,
            request=body.model_dump(),
            dataset_id=dataset.id,
        )


@router.get("/fine_tuning/methods", response_model=common.Page[schema.Method], summary="Ways of making a classifier")
def list_methods(who: Reader) -> Any:
    return common.Page(data=[schema.Method(**m) for m in methods.describe()], has_more=False, last_id=None)


router.include_router(job_routes("fine_tune", "/fine_tuning/jobs", render, schema.FineTuningJob))


@router.get(
    "/fine_tuning/jobs/{id}/checkpoints",
    response_model=common.Page[schema.FineTuningCheckpoint],
    summary="What the job has saved",
)
def list_checkpoints(id: str, core: CoreDep, who: Reader, after: After = None, limit: Limit = 20) -> Any:
    with core.transaction() as session:
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
) -> Any:
    query = select(Classifier).where(who.sees(Classifier.owner))
    if dataset_id is not None:
        query = query.where(Classifier.dataset_id == dataset_id)
    with core.transaction() as session:
        rows, more = page(session, query, Classifier.id, after, limit)
    data = [schema.Classifier.model_validate(row) for row in rows]
    return common.Page.of(data, more)


def _classifier(session: Session, who: Principal, id: str) -> Classifier:
    row = session.scalar(select(Classifier).where(Classifier.id == id, who.sees(Classifier.owner)))
    if row is None:
        raise NotFound(f"there is no classifier '{id}' among yours; GET /v1/classifiers lists them", param="id")
    return row


@router.get("/classifiers/{id}", response_model=schema.Classifier, summary="One classifier")
def show_classifier(id: str, core: CoreDep, who: Reader) -> Any:
    with core.transaction() as session:
        return schema.Classifier.model_validate(_classifier(session, who, id))


@router.delete("/classifiers/{id}", status_code=204, summary="Delete a classifier, its scores and its files")
def delete_classifier(id: str, core: CoreDep, who: Writer) -> None:
    with core.transaction() as session:
        row = _classifier(session, who, id)
        busy = session.scalar(
            select(Job.id).where(
                Job.kind == "evaluate", Job.status.not_in(FINAL), Job.request["classifier_id"].astext == id
            )
        )
        if busy is not None:
            raise Conflict(f"{busy} is scoring this classifier; cancel it or wait", code="in_use", param="id")
        session.execute(delete(Checkpoint).where(Checkpoint.job_id == row.job_id))
        session.delete(row)
        session.info.setdefault("obsolete", []).append(row.storage_key)
