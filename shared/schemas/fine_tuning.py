from typing import Any, Literal

from pydantic import Field

from shared.schemas.captions import EXCLUDED_BY_DEFAULT, Flag
from shared.schemas.common import JobResource, Request, Resource, UnixTime

Validation = Literal["none", "few_shot", "full"]


class MethodSpec(Request):
    type: str = Field(default="mmft", description="a method that `GET /v1/fine_tuning/methods` lists")
    hyperparameters: dict[str, Any] = {}


class FineTuningRequest(Request):
    model: str = Field(
        default="starter", description="`starter`, an open_clip `arch/pretrained`, or a local directory", max_length=500
    )
    dataset_id: str
    caption_job_id: str | None = Field(default=None, description="needed by methods that train on captions")
    exclude_flags: list[Flag] = Field(
        default=list(EXCLUDED_BY_DEFAULT), description="captions with one of these flags are left out of this run"
    )
    method: MethodSpec = MethodSpec()
    shots: int | None = Field(
        default=None, ge=1, lt=2**31, description="training images per class; all where not given"
    )
    shot_seed: int = Field(default=0, ge=0, lt=2**31, description="which images are the shots")
    seed: int = Field(default=0, ge=0, lt=2**31, description="initialisation, order, augmentation, caption draws")
    validation: Validation = Field(
        default="full",
        description="what chooses the best epoch: nothing (the last epoch), as many val images per class as shots, "
        "or the whole val split; scores of different protocols are never ranked together",
    )
    suffix: str | None = Field(default=None, max_length=64)
    metadata: dict[str, str] = {}


class FineTuningJob(JobResource):
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str
    dataset_id: str
    caption_job_id: str | None
    exclude_flags: list[Flag] = []
    method: MethodSpec
    shots: int | None
    shot_seed: int
    seed: int
    validation: Validation
    suffix: str | None
    metadata: dict[str, str]
    fine_tuned_model: str | None = Field(default=None, description="the classifier's id, once the job succeeded")
    evaluation_id: str | None = Field(default=None, description="the job that scores it on the test split")
    result: dict[str, Any] | None = None


class FineTuningCheckpoint(Resource):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    kind: Literal["resume", "best"]
    step: int
    epoch: int
    storage_key: str
    metrics: dict[str, Any]
    created_at: UnixTime


class Method(Resource):
    object: Literal["fine_tuning.method"] = "fine_tuning.method"
    name: str
    summary: str
    needs_captions: bool
    trains: bool
    hyperparameters: dict[str, Any] = Field(description="JSON schema with defaults and ranges")


class Classifier(Resource):
    object: Literal["classifier"] = "classifier"
    id: str
    job_id: str
    dataset_id: str
    model: str
    method: str
    hyperparameters: dict[str, Any]
    shots: int | None
    shot_seed: int
    seed: int
    protocol: str
    caption_job_id: str | None
    captioner: str | None
    suffix: str | None
    data_fingerprint: str
    storage_key: str
    details: dict[str, Any]
    created_at: UnixTime
