"""REST: evaluations, the leaderboard, and the API keys of all services."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.evaluator import leaderboard
from shared.auth import Admin, Principal, Reader, create_key
from shared.datasets.lookup import get_dataset
from shared.db.models import ApiKey, Classifier, Job, Score
from shared.errors import NotFound
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import SubmissionDep, job_routes
from shared.paging import page
from shared.schemas import common
from shared.schemas import evaluations as schema
from shared.schemas import keys as key_schema
from shared.web import After, CoreDep, Limit

router = APIRouter(prefix="/v1", tags=["evaluator"])


def render(session: Session, job: Job) -> schema.Evaluation:
    of_this = (Score.classifier_id == job.request["classifier_id"], Score.split == job.request["split"])
    done = job.status == "succeeded"
    scores = session.execute(select(Score.metric, Score.value).where(*of_this)).all() if done else []
    life = common.JobResource.model_validate(job).model_dump()
    found = {metric: value for metric, value in scores} or None
    return schema.Evaluation(**life, dataset_id=job.dataset_id, **job.request, result=job.result, scores=found)


@router.post("/evaluations", status_code=202, response_model=schema.Evaluation, summary="Score a classifier on a split")
def create_evaluation(body: schema.EvaluationRequest, submission: SubmissionDep) -> Any:
    return submission.accept(body.model_dump_json(), lambda s: _submit(s, submission.who, body), render)


def _submit(session: Session, who: Principal, body: schema.EvaluationRequest) -> str:
    query = select(Classifier).where(Classifier.id == body.classifier_id, who.sees(Classifier.owner))
    classifier = session.scalar(query.with_for_update())
    if classifier is None:
        raise NotFound(
            f"there is no classifier '{body.classifier_id}' among yours; GET /v1/classifiers lists them",
            param="classifier_id",
        )
    get_dataset(session, who, classifier.dataset_id, lock=True)
    job = ledger.create(
        session,
        id=new_id("eval"),
        kind="evaluate",
        owner=classifier.owner,
        request=body.model_dump(),
        dataset_id=classifier.dataset_id,
    )
    return job.id


router.include_router(job_routes("evaluate", "/evaluations", render, schema.Evaluation))


@router.get(
    "/leaderboard",
    response_model=schema.Leaderboard,
    summary="Every setting on a data set, ranked: mean and standard error over seeds",
    responses={200: {"content": {"text/csv": {}}}},
)
def read_leaderboard(
    core: CoreDep,
    who: Reader,
    dataset_id: Annotated[str, Query(max_length=100)],
    metric: Annotated[str, Query(max_length=50)] = "top1",
    split: common.Split = "test",
    shots: Annotated[
        Annotated[int, Query(ge=1, lt=2**31)] | Literal["full"] | None, Query(description="a number, `full`, or all")
    ] = None,
    format: Literal["json", "csv"] = "json",
) -> Any:
    with core.transaction() as session:
        dataset = get_dataset(session, who, dataset_id)
        board = leaderboard.read(session, who, dataset, metric=metric, split=split, shots=shots)
    return PlainTextResponse(leaderboard.to_csv(board), media_type="text/csv") if format == "csv" else board


@router.post("/keys", status_code=201, response_model=key_schema.NewKey, summary="Make an API key", tags=["keys"])
def make_key(body: key_schema.KeyRequest, core: CoreDep, who: Admin) -> Any:
    with core.transaction() as session:
        row, secret = create_key(session, owner=body.owner, name=body.name, scopes=tuple(body.scopes))
        return key_schema.NewKey(**key_schema.Key.model_validate(row).model_dump(), key=secret)


@router.get("/keys", response_model=common.Page[key_schema.Key], summary="List API keys", tags=["keys"])
def list_keys(core: CoreDep, who: Admin, after: After = None, limit: Limit = 100) -> Any:
    with core.transaction() as session:
        rows, more = page(session, select(ApiKey), ApiKey.id, after, limit)
    data = [key_schema.Key.model_validate(row) for row in rows]
    return common.Page.of(data, more)


@router.delete("/keys/{id}", status_code=204, summary="Revoke an API key", tags=["keys"])
def revoke_key(id: str, core: CoreDep, who: Admin) -> None:
    with core.transaction() as session:
        row = session.get(ApiKey, id)
        if row is None:
            raise NotFound(f"there is no key '{id}'; GET /v1/keys lists them", param="id")
        row.revoked_at = func.now()
