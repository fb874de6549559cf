from typing import Any, Literal

from pydantic import Field

from shared.schemas.common import JobResource, Request, Resource, Split


class EvaluationRequest(Request):
    classifier_id: str
    split: Split = "test"


class Evaluation(JobResource):
    object: Literal["evaluation"] = "evaluation"
    dataset_id: str
    classifier_id: str
    split: Split
    scores: dict[str, float] | None = None
    result: dict[str, Any] | None = None


class LeaderboardRow(Resource):
    """One setting: its runs differ in nothing but their seeds."""

    rank: int = Field(description="within the same validation protocol; zero-shot rows are ranked in every one")
    protocol: str
    method: str
    model: str
    captioner: str | None
    captions: dict[str, Any] | None = Field(description="how the captions were asked for")
    shots: int | None
    hyperparameters: dict[str, Any]
    suffix: str | None
    n: int = Field(description="runs that differ in a seed; a repeated run counts once")
    mean: float
    stderr: float | None = Field(description="standard error of the mean over seeds (ddof = 1); none for one run")
    few_seeds: bool = Field(description="fewer than 3 runs of a method with a seed: the interval means little")
    metrics: dict[str, float] = Field(description="mean of every metric")
    train_seconds: float | None
    classifier_ids: list[str]


class Leaderboard(Resource):
    object: Literal["leaderboard"] = "leaderboard"
    dataset_id: str
    dataset_name: str
    data_fingerprint: str
    split: Split
    metric: str
    higher_is_better: bool
    rows: list[LeaderboardRow]
