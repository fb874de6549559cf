"""Shapes every resource shares. pydantic only: the client imports these too."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

T = TypeVar("T")

JobStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Split = Literal["train", "val", "test"]
FINAL_STATUSES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


def _unix(value: Any) -> Any:
    return int(value.timestamp()) if isinstance(value, datetime) else value


UnixTime = Annotated[int, BeforeValidator(_unix), Field(description="seconds since 1970-01-01T00:00Z")]


class Request(BaseModel):
    """A request body: unknown fields are an error, not silence; "1" is no number, and 1 is no truth value."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Resource(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Page(Resource, Generic[T]):
    """One page of a list. Go on with `after=<last_id>` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    last_id: str | None

    @classmethod
    def of(cls, data: list[Any], has_more: bool = False) -> Self:
        """A page of resources that have an id."""
        return cls(data=data, has_more=has_more, last_id=data[-1].id if data else None)


class Problem(BaseModel):
    """RFC 9457 `application/problem+json`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="what was wrong, where, and what to do")
    code: str
    param: str | None = None
    errors: list[dict[str, Any]] | None = Field(default=None, description="one entry per field of a refused body")


class JobError(Resource):
    code: str
    message: str
    param: str | None = None


class Progress(Resource):
    model_config = ConfigDict(from_attributes=True, extra="allow")

    stage: str
    done: int
    total: int
    eta_seconds: float | None = Field(default=None, description="for this stage")


class JobResource(Resource):
    """What every kind of job shows of its life."""

    id: str
    status: JobStatus
    created_at: UnixTime
    started_at: UnixTime | None = None
    finished_at: UnixTime | None = None
    attempt: int = 0
    progress: Progress | None = None
    error: JobError | None = None


class JobEvent(Resource):
    object: Literal["job.event"] = "job.event"
    seq: int
    level: Literal["info", "warning", "error"]
    type: str
    message: str
    data: dict[str, Any] | None = None
    created_at: UnixTime
