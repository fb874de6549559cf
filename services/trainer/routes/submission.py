"""What a run was asked for, made whole: everything that can be refused is refused before a job is made."""

import json
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from services.trainer import methods
from services.trainer.methods import Method
from shared.db.models import FINAL, Classifier, Dataset, Job
from shared.errors import Conflict, InvalidInput
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import get_job
from shared.schemas.captions import EXCLUDED_BY_DEFAULT
from shared.schemas.fine_tuning import FineTuningRequest, MethodSpec
from shared.web.auth import Principal

BASELINES = ("zero_shot", "zero_shot_ensemble")  # made once for each (data set, model), so that they are always ranked
NAMES_NO_SETTING = ("metadata", "tags")


def resolve(session: Session, who: Principal, dataset: Dataset, body: FineTuningRequest) -> FineTuningRequest:
    """The request with every hyperparameter written out, and without what its method does not use: runs that compute
    the same are then asked for alike. Raises what a user can mend."""
    method = methods.build(body.method.type, body.method.hyperparameters, body.method.preset)
    check_captions(session, who, body.dataset_id, body.caption_job_id, [method])
    body = normalised(body, method)
    check_validation(dataset, body)
    return body


def normalised(body: FineTuningRequest, method: Method) -> FineTuningRequest:
    """See `resolve`; nothing is checked here."""
    hyperparameters = method.hyperparameters.model_dump(mode="json")
    changes: dict[str, Any] = {"method": body.method.model_copy(update={"hyperparameters": hyperparameters})}
    if not method.needs_captions:
        changes |= {"caption_job_id": None, "exclude_flags": list(EXCLUDED_BY_DEFAULT)}
    if method.kind == "zero_shot":  # nothing is chosen
        changes |= {"validation": "none"}
        if not method.needs_captions:  # with them, the shots say whose captions
            changes |= {"shots": None}
    if changes.get("shots", body.shots) is None:  # every image is taken, and none is drawn
        changes |= {"shot_seed": 0}
    if method.kind != "fine_tune":
        # Nothing is drawn but the shots, so a run with another seed would be the same run counted twice; with the same
        # number for both it pairs with the runs that do draw.
        changes |= {"seed": changes.get("shot_seed", body.shot_seed), "checkpoints": "best"}
    return body.model_copy(update=changes)


def identity(request: dict[str, Any]) -> str:
    """Equal for requests that compute the same: of a `FineTuningRequest` as the ledger keeps it."""
    spec = request["method"]
    same = {name: value for name, value in request.items() if name not in NAMES_NO_SETTING}
    same["method"] = {"type": spec["type"], "hyperparameters": spec["hyperparameters"]}  # by whatever preset
    same["exclude_flags"] = sorted(request.get("exclude_flags", ()))
    return json.dumps(same, sort_keys=True)


def check_captions(
    session: Session,
    who: Principal,
    dataset_id: str,
    caption_job_id: str | None,
    chosen: list[Method],
    param: str = "caption_job_id",
) -> None:
    """That the methods and the caption job go together. Raises InvalidInput, NotFound or Conflict."""
    readers = [method.name for method in chosen if method.needs_captions]
    names = ", ".join(f"'{name}'" for name in dict.fromkeys(readers or [method.name for method in chosen]))
    if not readers:
        if caption_job_id is not None:
            raise InvalidInput(
                f"method {names} reads no captions; leave '{param}' out",
                code="captions_unused",
                param=param,
            )
        return
    if caption_job_id is None:
        raise InvalidInput(
            f"method {names} reads captions: give '{param}', by the id of a caption job of this data set "
            "(POST /v1/caption_jobs makes one)",
            code="captions_missing",
            param=param,
        )
    job = get_job(session, who, "caption", caption_job_id)
    if job.dataset_id != dataset_id:
        raise InvalidInput(
            f"{job.id} captioned the data set {job.dataset_id}, not {dataset_id}; name a caption job of that one",
            code="captions_of_another_dataset",
            param=param,
        )
    if job.request.get("split", "train") != "train":  # an import covers every split
        raise InvalidInput(
            f"{job.id} captioned the '{job.request['split']}' split; training needs captions of 'train'",
            code="captions_of_another_split",
            param=param,
        )
    if job.status != "succeeded":
        raise Conflict(
            f"{job.id} is {job.status}; training needs a caption job that has succeeded",
            code="captions_not_ready",
            param=param,
        )


def check_validation(dataset: Dataset, body: FineTuningRequest) -> None:
    """That the data allow the validation protocol. Raises InvalidInput."""
    if body.validation == "none":
        if body.method.hyperparameters.get("wise_ft") == "val":
            raise InvalidInput(
                "`wise_ft` 'val' chooses the interpolation on validation images, and validation is 'none': give a "
                "fraction, or choose 'few_shot' or 'full'",
                code="invalid_hyperparameter",
                param="method.hyperparameters.wise_ft",
            )
        return
    if body.validation == "few_shot" and body.shots is None:
        raise InvalidInput(
            "validation 'few_shot' takes as many val images per class as there are shots: give 'shots', or choose "
            "'full' or 'none'",
            code="shots_missing",
            param="shots",
        )
    if dataset.counts is not None and not sum(dataset.counts.get("val", {}).values()):
        raise no_val_split(body.validation)


def no_val_split(validation: str) -> InvalidInput:
    return InvalidInput(
        f"validation '{validation}' needs a val split, and this data set has none: choose 'none', or upload it again "
        "with val_fraction above 0",
        code="no_val_split",
        param="validation",
    )


def create_run(session: Session, dataset: Dataset, body: FineTuningRequest, group_id: str | None = None) -> Job:
    """A queued job of a resolved request."""
    job = ledger.create(
        session,
        id=new_id("ft"),
        kind="fine_tune",
        owner=dataset.owner,
        request=body.model_dump(mode="json"),
        dataset_id=dataset.id,
    )
    job.group_id = group_id
    return job


def ensure_baselines(session: Session, dataset: Dataset, model: str) -> None:
    """Runs under the data set's row lock, so two submissions at once make one of each."""
    for name in BASELINES:
        if not _exists(session, dataset, model, name):
            body = FineTuningRequest(
                model=model,
                dataset_id=dataset.id,
                method=MethodSpec(type=name),
                metadata={"made_by": "captune", "role": "baseline"},
            )
            create_run(session, dataset, normalised(body, methods.build(name, {})))


def _exists(session: Session, dataset: Dataset, model: str, method: str) -> bool:
    query = (
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
    )
    return session.scalar(query.limit(1)) is not None
