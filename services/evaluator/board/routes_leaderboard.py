"""REST: the leaderboard, and two of its rows against each other."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from services.evaluator.board.board_cache import Rendered, RenderedCache, etag, matches
from services.evaluator.board.comparison import Comparer
from services.evaluator.board.formats import to_csv, to_latex, to_markdown
from services.evaluator.board.leaderboard import Board, check, header
from services.evaluator.board.leaderboard import Header as BoardHeader
from services.evaluator.board.leaderboard_query import Asked
from shared.core import Core
from shared.schemas import common
from shared.schemas import evaluations as schema
from shared.web.api import CoreDep
from shared.web.auth import Principal, Reader

router = APIRouter(prefix="/v1", tags=["evaluator"])

RENDERING = 1  # raised by whatever shows the same rows in another way: part of the ETag
MEDIA_TYPES = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "markdown": "text/markdown; charset=utf-8",
    "latex": "application/x-latex; charset=utf-8",
}
FORMATS = {"csv": to_csv, "markdown": to_markdown, "latex": to_latex}
IfNoneMatch = Annotated[str | None, Header(description="an ETag: 304 while nothing has changed")]

# What this process read before. Nothing in it is of a request or a database: ids, versions and owners are the keys.
_rendered, _board, _comparer = RenderedCache(), Board(), Comparer()


class Filters(BaseModel):
    """A parameter that is not one of these is an error, not silence."""

    model_config = ConfigDict(extra="forbid")

    dataset_id: str = Field(max_length=100)
    metric: str = Field(default="top1", max_length=50)
    split: common.Split = "test"
    head: schema.Head = "own"
    shots: Annotated[int, Field(ge=1, lt=2**31)] | Literal["full"] | None = Field(
        default=None, description="a number, `full`, or all"
    )
    model: str | None = Field(default=None, max_length=500)
    method: str | None = Field(default=None, max_length=100)
    captioner: str | None = Field(default=None, max_length=500)
    protocol: Literal["none", "few_shot", "full", "zero_shot"] | None = None
    tag: str | None = Field(default=None, max_length=64)
    group_id: str | None = Field(default=None, max_length=100)
    order: Literal["best", "asc", "desc"] = Field(default="best", description="of the metric, within a protocol")
    limit: int = Field(default=100, ge=1, le=1000)
    after: str | None = Field(default=None, max_length=200, description="the last row's id of the page before")
    format: Literal["json", "csv", "markdown", "latex"] = "json"


class Pair(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dataset_id: str = Field(max_length=100)
    a: str = Field(max_length=200, description="a row's id")
    b: str = Field(max_length=200, description="another's")
    split: common.Split = "test"
    head: schema.Head = "own"


@router.get(
    "/leaderboard",
    response_model=schema.Leaderboard,
    summary="Every setting on a data set, ranked: mean and standard error over seeds",
    responses={
        200: {"content": {"text/csv": {}, "text/markdown": {}, "application/x-latex": {}}},
        304: {"description": "what If-None-Match names still holds"},
    },
)
def read_leaderboard(
    core: CoreDep,
    who: Reader,
    request: Request,
    filters: Annotated[Filters, Query()],
    if_none_match: IfNoneMatch = None,
) -> Any:
    """Ranks are within a validation protocol. Filters leave pinned rows in. Where there are more rows, `Link` names the
    next page, in every format."""
    asked = Asked(**filters.model_dump(exclude={"format"}))
    check(asked)

    def render(session: Session, head: BoardHeader) -> tuple[str, str | None]:
        board = _board.read(session, who, asked, head)
        format = FORMATS.get(filters.format)
        body = board.model_dump_json() if format is None else format(board)
        return body, board.last_id if board.has_more else None

    parts = {"board": asdict(asked), "format": filters.format}
    answer, next_id = _answer(core, who, asked.dataset_id, parts, if_none_match, render, MEDIA_TYPES[filters.format])
    if next_id is not None:
        url = request.url.include_query_params(after=next_id)
        answer.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return answer


@router.get(
    "/leaderboard/compare",
    response_model=schema.Comparison,
    summary="Two rows on the images both were scored on",
    responses={304: {"description": "what If-None-Match names still holds"}},
)
def compare_rows(core: CoreDep, who: Reader, pair: Annotated[Pair, Query()], if_none_match: IfNoneMatch = None) -> Any:
    """Difference in accuracy with its 95 % interval and p-value, by a bootstrap over images and seeds. Refused where
    the rows were scored on different states of the data set, or no predictions were kept."""

    def render(session: Session, head: BoardHeader) -> tuple[str, str | None]:
        found = _comparer.compare(session, who, pair.dataset_id, head, pair.split, pair.head, pair.a, pair.b)
        return found.model_dump_json(), None

    return _answer(core, who, pair.dataset_id, {"pair": pair.model_dump()}, if_none_match, render)[0]


def _answer(
    core: Core,
    who: Principal,
    dataset_id: str,
    asked: dict[str, Any],
    if_none_match: str | None,
    render: Callable[[Session, BoardHeader], tuple[str, str | None]],
    media_type: str = MEDIA_TYPES["json"],
) -> tuple[Response, str | None]:
    """304 where one tiny query tells that nothing has changed, else what `render` makes, now or before: a body and,
    where there are more rows, the id of its last one."""
    owner = None if "admin" in who.scopes else who.owner

    def tag_of(head: BoardHeader) -> str:
        return etag(RENDERING, asdict(head), owner, asked)

    def make() -> Rendered:
        with core.db.snapshot() as session:  # tag and body of one moment
            head = header(session, who, dataset_id)
            body, next_id = render(session, head)
        return Rendered(tag_of(head), body.encode(), next_id)

    with core.db.autocommit() as connection:  # one round trip, as pollers ask for little else
        tag = tag_of(header(connection, who, dataset_id))
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
    if matches(if_none_match, tag):
        return Response(status_code=304, headers=headers), None
    found = _rendered.get(tag, make)
    return Response(found.body, media_type=media_type, headers=headers | {"ETag": found.etag}), found.next_id
