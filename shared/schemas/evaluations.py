from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shared.schemas.common import JobResource, Request, Resource, Split

Head = Literal["own", "zero_shot"]


class EvaluationRequest(Request):
    """Scores a classifier, or a bare model by its zero-shot prototypes, on a split of a data set."""

    classifier_id: str | None = Field(default=None, description="what fine-tuning made or you uploaded")
    model: str | None = Field(
        default=None, max_length=500, description="or a CLIP: `starter`, an open_clip `arch/pretrained`, a directory"
    )
    dataset_id: str | None = Field(default=None, description="where not given, the one the classifier was trained on")
    split: Split = "test"
    head: Head = Field(
        default="own",
        description="`own`: what was trained, for the classes it was trained on; `zero_shot`: the class names of the "
        "data set through the classifier's text tower",
    )
    corruptions: bool = Field(default=False, description="also score corrupted copies of the images: slow")
    held_aside_dataset_id: str | None = Field(
        default=None, description="also tell what was forgotten: zero-shot accuracy on this data set, before and after"
    )
    caption_job_id: str | None = Field(
        default=None, description="also score retrieval between the split's images and their captions by this job"
    )

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.classifier_id is None) == (self.model is None):
            raise ValueError("give either classifier_id or model")
        if self.model is not None and self.dataset_id is None:
            raise ValueError("a model needs a dataset_id to be scored on")
        return self


class Evaluation(JobResource):
    object: Literal["evaluation"] = "evaluation"
    dataset_id: str
    classifier_id: str | None
    model: str | None = None
    split: Split
    head: Head = "own"
    corruptions: bool = False
    held_aside_dataset_id: str | None = None
    caption_job_id: str | None = None
    scores: dict[str, float] | None = None
    result: dict[str, Any] | None = Field(default=None, description="tables: per class, confusions, temperature, cost")


class LeaderboardRow(Resource):
    """One setting: its runs differ in nothing but their seeds."""

    id: str = Field(description="the setting; `after` takes it")
    rank: int | None = Field(
        description="within the same validation protocol; methods that do not train are ranked in every one. None "
        "where the data changed since"
    )
    protocol: str
    method: str
    model: str
    captioner: str | None
    captions: dict[str, Any] | None = Field(description="how the captions were asked for")
    shots: int | None
    hyperparameters: dict[str, Any]
    suffix: str | None
    tags: list[str]
    pinned: bool
    data_changed: bool = Field(description="scored on what the data set was before; not comparable")
    trained_on: str | None = Field(
        default=None, description="the data set it was trained on, where that is another one or was another then"
    )
    n: int = Field(description="runs that differ in a seed; a repeated run counts once")
    mean: float
    stderr: float | None = Field(description="standard error of the mean over seeds (ddof = 1); none for one run")
    few_seeds: bool = Field(description="fewer than 3 runs of a method with a seed: the interval means little")
    tied_with_best: bool | None = Field(
        description="not distinguishable from the best of its protocol at 95 %; none for the best itself, and where "
        "one run each leaves nothing to tell it by"
    )
    metrics: dict[str, float] = Field(description="mean of every metric")
    train_seconds: float | None
    caption_seconds: float | None
    classifier_ids: list[str]


class Leaderboard(Resource):
    object: Literal["leaderboard"] = "leaderboard"
    dataset_id: str
    dataset_name: str
    data_fingerprint: str
    split: Split
    metric: str
    unit: str
    higher_is_better: bool
    rows: list[LeaderboardRow]
    has_more: bool
    last_id: str | None


class Comparison(Resource):
    """Row a against row b on the images both were scored on, in the seeds both have."""

    object: Literal["comparison"] = "comparison"
    dataset_id: str
    split: Split
    metric: Literal["top1"] = "top1"
    a: str
    b: str
    images: int
    pairs: int = Field(
        description="runs of a and b with the same seeds, or every run with every run where there are none"
    )
    mean_a: float
    mean_b: float
    difference: float = Field(description="a - b")
    low: float = Field(description="2.5 % quantile of the bootstrap over images and seeds")
    high: float = Field(description="97.5 %")
    p_value: float = Field(description="two-sided")
    resamples: int
    only_a: float = Field(description="share of images that a got right and b wrong")
    only_b: float


class Prediction(Resource):
    file: str
    class_name: str = Field(description="the most probable class")
    probability: float
    classes: list[dict[str, Any]] = Field(description="{class_name, display_name, probability}, most probable first")


class Predictions(Resource):
    object: Literal["predictions"] = "predictions"
    classifier_id: str
    data: list[Prediction]
