"""What a request for an evaluation must be, checked before a job is made of it."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.datasets.lookup import usable_dataset
from shared.db.models import Classifier, Dataset
from shared.errors import Conflict, InvalidInput, NotFound
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import get_job
from shared.schemas.evaluations import EvaluationRequest
from shared.web.auth import Principal


def submit(session: Session, who: Principal, body: EvaluationRequest) -> str:
    """Makes the job and returns its id. Raises NotFound for what is not the caller's, InvalidInput for captions of
    other images, Conflict for what is not finished."""
    dataset_id, owner = body.dataset_id, None
    if body.classifier_id is not None:
        classifier = _classifier(session, who, body.classifier_id)
        dataset_id, owner = dataset_id or classifier.dataset_id, classifier.owner
    assert dataset_id is not None  # the schema asks for one beside a model
    dataset = usable_dataset(session, who, dataset_id, lock=True)
    if body.classifier_id is not None:  # after the data set, as who writes scores does; not deleted before the job is
        _classifier(session, who, body.classifier_id, lock=True)
    _check_owner(owner or dataset.owner, dataset, "dataset_id")
    if body.held_aside_dataset_id is not None:
        aside = _held_aside(session, who, body.held_aside_dataset_id, dataset.id)
        _check_owner(dataset.owner, aside, "held_aside_dataset_id")
    if body.caption_job_id is not None:
        _check_captions(session, who, body.caption_job_id, dataset.id, body.split)
    # A bare model has no head but the zero-shot one, which is its own.
    head = "own" if body.model is not None else body.head
    request = body.model_copy(update={"dataset_id": dataset.id, "head": head})
    job = ledger.create(
        session,
        id=new_id("eval"),
        kind="evaluate",
        owner=owner or dataset.owner,
        request=request.model_dump(),
        dataset_id=dataset.id,
    )
    return job.id


def _classifier(session: Session, who: Principal, id: str, *, lock: bool = False) -> Classifier:
    query = select(Classifier).where(Classifier.id == id, who.sees(Classifier.owner))
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(
            f"there is no classifier '{id}' among yours; GET /v1/classifiers lists them", param="classifier_id"
        )
    return row


def _check_owner(owner: str, dataset: Dataset, param: str) -> None:
    """An admin sees both; the owner of the job, which shows the data set's images and classes, must see it too."""
    if dataset.owner != owner:
        raise InvalidInput(
            f"{dataset.id} is of {dataset.owner}, and {owner} would see it in the evaluation; name one of {owner}",
            code="owners_differ",
            param=param,
        )


def _held_aside(session: Session, who: Principal, id: str, scored: str) -> Dataset:
    if id == scored:
        raise InvalidInput(
            "what was forgotten shows on other data than the classifier is scored on; name another data set",
            code="not_held_aside",
            param="held_aside_dataset_id",
        )
    try:
        return usable_dataset(session, who, id, lock=True)
    except (NotFound, Conflict) as error:
        error.param = "held_aside_dataset_id"
        raise


def _check_captions(session: Session, who: Principal, id: str, dataset_id: str, split: str) -> None:
    try:
        job = get_job(session, who, "caption", id)
    except NotFound as error:
        error.param = "caption_job_id"
        raise
    if job.dataset_id != dataset_id:
        raise InvalidInput(
            f"{id} captioned the data set {job.dataset_id}, not {dataset_id}; name a caption job of that one",
            code="captions_of_another_dataset",
            param="caption_job_id",
        )
    if job.request.get("split", split) != split:  # an import covers every split
        raise InvalidInput(
            f"{id} captioned the '{job.request['split']}' split; retrieval on '{split}' needs captions of its images",
            code="captions_of_another_split",
            param="caption_job_id",
        )
    if job.status != "succeeded":
        raise Conflict(
            f"{id} is {job.status}; retrieval needs a caption job that has succeeded",
            code="captions_not_ready",
            param="caption_job_id",
        )
