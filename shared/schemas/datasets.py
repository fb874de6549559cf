from typing import Any, Literal

from shared.schemas.common import JobResource, Resource


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
