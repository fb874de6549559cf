from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from shared.schemas.common import JobResource, Request, Resource


class ClassInfo(Resource):
    name: str
    display_name: str


class Dataset(JobResource):
    """A data set and the job that ingests it: `status` is `succeeded` when it can be used."""

    object: Literal["dataset"] = "dataset"
    name: str
    domain: str
    archive_sha256: str
    archive_bytes: int
    split_seed: int
    val_fraction: float
    test_fraction: float
    classes: list[ClassInfo] | None = None
    counts: dict[str, dict[str, int]] | None = None
    report: dict[str, Any] | None = None
    fingerprint: str | None = None


class DatasetEdit(Request):
    """At least one of the two."""

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)] | None = None
    display_names: dict[str, str] | None = Field(
        default=None,
        description="what prompts and prefixes call a class, by its name; classes not given keep their display name",
    )

    @model_validator(mode="after")
    def _something(self) -> "DatasetEdit":
        if self.name is None and self.display_names is None:
            raise ValueError("give 'name', 'display_names' or both")
        return self


class Image(Resource):
    object: Literal["image"] = "image"
    id: str
    dataset_id: str
    path: str
    class_name: str
    split: str
    sha256: str
    media_type: str
    width: int
    height: int
    bytes: int
