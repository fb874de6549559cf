"""A fine-tuning job as the API shows it."""

from sqlalchemy.orm import Session

from shared.db.models import Job
from shared.schemas import common
from shared.schemas import fine_tuning as schema


def render(_: Session, job: Job) -> schema.FineTuningJob:
    life = common.JobResource.model_validate(job).model_dump()
    result = job.result or {}
    return schema.FineTuningJob(
        **life,
        **job.request,
        group_id=job.group_id,
        result=job.result,
        fine_tuned_model=result.get("classifier_id"),
        evaluation_id=result.get("evaluation_id"),
    )
