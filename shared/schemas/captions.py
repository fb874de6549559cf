from typing import Annotated, Any, Literal

from pydantic import Field

from shared.schemas.common import JobResource, Request, Resource, Split, UnixTime

Characteristic = Literal["visual", "shape", "texture", "color", "context", "spatial", "petals", "symbols"]


class CaptionJobRequest(Request):
    dataset_id: str
    engine: str = Field(default="attributes", description="a caption model that `GET /v1/models` lists")
    characteristics: Annotated[list[Characteristic], Field(min_length=1)] = ["visual", "shape", "texture"]
    words: int = Field(default=50, ge=5, le=150, description="words asked for per caption")
    domain: str | None = Field(default=None, max_length=100, description="the data set's domain where not given")
    split: Split = Field(default="train", description="val and test images need no captions")
    shots: int | None = Field(
        default=None, ge=1, lt=2**31, description="only the few-shot subset a run with these shots uses"
    )
    shot_seed: int = Field(default=0, ge=0, lt=2**31)
    temperature: float = Field(default=0.2, ge=0.0, le=2.0)
    seed: int = Field(default=0, ge=0, lt=2**31)


class CaptionJob(JobResource):
    object: Literal["caption_job"] = "caption_job"
    dataset_id: str
    request: CaptionJobRequest
    result: dict[str, Any] | None = Field(
        default=None, description="images, captions, written, reused, flagged, failed, captioner"
    )


class Caption(Resource):
    object: Literal["caption"] = "caption"
    id: str
    dataset_id: str
    image_id: str
    path: str
    class_name: str
    characteristic: str
    text: str
    flags: list[str]
    provenance: dict[str, Any]
    created_at: UnixTime
