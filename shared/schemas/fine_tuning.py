from typing import Annotated, Any, Literal

from pydantic import Field

from shared.schemas.captions import EXCLUDED_BY_DEFAULT, Flag
from shared.schemas.common import JobResource, Request, Resource, UnixTime

Validation = Literal["none", "few_shot", "full"]


Tags = Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=20)]


class MethodSpec(Request):
    type: str = Field(default="mmft", description="a method that `GET /v1/fine_tuning/methods` lists")
    preset: Literal["default", "paper"] = Field(
        default="default",
        description="what hyperparameters that are not given are: ours, or those that MMFT's paper has for the method",
    )
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
    checkpoints: Literal["best", "best_and_last"] = Field(
        default="best", description="which weights are kept: the best epoch's, or those of the last one too"
    )
    suffix: str | None = Field(default=None, max_length=64, description="part of the setting: tells rows apart")
    tags: Tags = Field(default=[], description="to find runs by; no part of the setting")
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
    checkpoints: Literal["best", "best_and_last"] = "best"
    suffix: str | None
    tags: list[str] = []
    metadata: dict[str, str]
    group_id: str | None = Field(default=None, description="the group that it was submitted with")
    fine_tuned_model: str | None = Field(default=None, description="the classifier's id, once the job succeeded")
    evaluation_id: str | None = Field(default=None, description="the job that scores it on the test split")
    result: dict[str, Any] | None = None


class FineTuningCheckpoint(Resource):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    kind: Literal["resume", "best", "last"]
    step: int
    epoch: int
    storage_key: str
    metrics: dict[str, Any]
    created_at: UnixTime


class Method(Resource):
    object: Literal["fine_tuning.method"] = "fine_tuning.method"
    name: str
    summary: str
    source: str = Field(description="the paper")
    kind: Literal["zero_shot", "frozen", "fine_tune"] = Field(
        description="nothing is trained; a head on frozen features; the model itself"
    )
    needs_captions: bool
    trains: bool
    presets: dict[str, dict[str, Any]] = Field(
        description="hyperparameters that a preset sets otherwise than the schema"
    )
    hyperparameters: dict[str, Any] = Field(description="JSON schema with defaults, ranges and units")


class Classifier(Resource):
    object: Literal["classifier"] = "classifier"
    id: str
    job_id: str | None = Field(description="none where it was uploaded")
    group_id: str | None = None
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
    setting: str = Field(description="the same for runs that differ in nothing but their seeds")
    tags: list[str] = []
    pinned: bool = False
    data_fingerprint: str
    storage_key: str
    details: dict[str, Any]
    created_at: UnixTime


class ClassifierEdit(Request):
    tags: Tags | None = None
    pinned: bool | None = Field(default=None, description="shown on the leaderboard whatever the filter")


class GroupRuns(Request):
    """Every combination of these lists is a run. What a method does not use makes no difference to it: methods without
    captions run once for all `caption_job_ids`, methods on frozen features once for all seeds with one shot seed, and
    zero-shot ones without captions once for all shots and seeds."""

    models: list[str] = Field(default=["starter"], min_length=1, max_length=100)
    methods: list[MethodSpec] = Field(default=[MethodSpec()], min_length=1, max_length=100)
    caption_job_ids: list[str] = Field(default=[], max_length=100)
    shots: list[Annotated[int, Field(ge=1, lt=2**31)] | None] = Field(
        default=[None], min_length=1, max_length=100, description="training images per class; null: all"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(default=[0, 1, 2], min_length=1, max_length=1000)
    shot_seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        default=None, min_length=1, max_length=1000, description="where not given, each run's shot seed is its seed"
    )
    exclude_flags: list[Flag] = list(EXCLUDED_BY_DEFAULT)
    validation: Validation = "full"
    checkpoints: Literal["best", "best_and_last"] = "best"
    suffix: str | None = Field(default=None, max_length=64)
    tags: Tags = []


class GroupRequest(GroupRuns):
    name: str = Field(default="", max_length=200)
    dataset_id: str


class SoupRequest(Request):
    """Which of the group's fine-tunes are averaged: those of one model, on the same training images, chosen by the same
    protocol. What is not given is what all of them have in common."""

    model: str | None = Field(default=None, max_length=500)
    method: str | None = Field(default=None, max_length=100, description="where not given, of any method")
    shots: Annotated[int, Field(ge=1, lt=2**31)] | Literal["all"] | None = None
    shot_seed: int | None = Field(default=None, ge=0, lt=2**31)
    validation: Literal["few_shot", "full"] | None = None
    suffix: str | None = Field(default=None, max_length=64)
    tags: Tags = []


class Group(Resource):
    object: Literal["fine_tuning.group"] = "fine_tuning.group"
    id: str
    name: str
    dataset_id: str
    status: Literal["running", "finished"] = Field(description="finished: every run and its evaluation is final")
    runs: int
    counts: dict[str, int] = Field(description="runs by status")
    scored: int = Field(description="runs whose evaluation succeeded")
    leaderboard: str = Field(description="where its comparison is")
    created_at: UnixTime
