"""REST: captions, searched and reviewed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from sqlalchemy import ColumnElement, Select, func, literal_column, select
from sqlalchemy.orm import Session

from services.captioner.captioning.writing import forget_comparisons
from services.captioner.quality.inspect import Inspected, Inspector
from shared.clip.tokens import token_counter
from shared.core import Core
from shared.datasets.lookup import display_names, get_dataset
from shared.db.models import Caption, CaptionJobItem, Dataset, Image, Job
from shared.errors import InvalidInput, NotFound, PreconditionFailed, PreconditionRequired
from shared.jobs.routes import get_job
from shared.schemas import captions as schema
from shared.schemas import common
from shared.web.api import After, CoreDep, Limit
from shared.web.auth import Principal, Reader, Writer
from shared.web.paging import page

router = APIRouter()

_ENGLISH: ColumnElement[Any] = literal_column("'english'::regconfig")  # to the letter as in ix_captions_search


def render_caption(row: Caption, image: Image, item: CaptionJobItem | None) -> schema.Caption:
    """`item`: the job's whose comparison of the caption with its others is shown."""
    columns: dict[str, Any] = {c.key: getattr(row, c.key) for c in Caption.__table__.columns}
    if item is not None:
        columns["flags"] = [flag for flag in schema.FLAGS if flag in (*row.flags, *item.flags)]
    return schema.Caption(
        **columns, path=image.path, class_name=image.class_name, agreement=item.agreement if item else None
    )


def _items(session: Session, caption_ids: Sequence[str], job_id: str | None = None) -> dict[str, CaptionJobItem]:
    """By caption: the job's, or else that of the newest job that holds it (ids sort by time)."""
    query = select(CaptionJobItem).where(CaptionJobItem.caption_id == func.any(list(caption_ids)))
    if job_id is not None:
        query = query.where(CaptionJobItem.job_id == job_id)
    newest = query.distinct(CaptionJobItem.caption_id).order_by(CaptionJobItem.caption_id, CaptionJobItem.job_id.desc())
    return {item.caption_id: item for item in session.scalars(newest)}


def _flags_of_newest_job() -> ColumnElement[Any]:
    """The flags that `_items` gives a caption of the outer query, null where no job holds it."""
    items = select(CaptionJobItem.flags).where(CaptionJobItem.caption_id == Caption.id).correlate(Caption)
    return items.order_by(CaptionJobItem.job_id.desc()).limit(1).scalar_subquery()


def matches(q: str) -> ColumnElement[bool]:
    """Full text, English: `"soft coat" -grey or brown` as web searches write it."""
    return func.to_tsvector(_ENGLISH, Caption.text).bool_op("@@")(func.websearch_to_tsquery(_ENGLISH, q))


@dataclass
class Filters:
    """All that are given hold at once."""

    caption_job_id: Annotated[str | None, Query(max_length=100)] = None
    image_id: Annotated[str | None, Query(max_length=100)] = None
    class_name: Annotated[str | None, Query(max_length=500)] = None
    characteristic: Annotated[str | None, Query(max_length=100)] = None
    flag: Annotated[schema.Flag | None, Query(description="captions that have this flag")] = None
    flagged: Annotated[Literal["any", "none"] | None, Query(description="with a flag at all, or without")] = None
    excluded: Annotated[bool | None, Query(description="left out by hand, or not")] = None
    edited: Annotated[bool | None, Query(description="whether a human's text replaced the original")] = None
    q: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=500,
            description='words in the text, in any form (English): `"soft coat" -grey or brown`; words that say '
            "nothing, such as `the`, find nothing",
        ),
    ] = None

    def of(self, query: Select[Caption]) -> Select[Caption]:
        of_job: ColumnElement[Any] = _flags_of_newest_job()
        if self.caption_job_id is not None:
            query = query.join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
            query = query.where(CaptionJobItem.job_id == self.caption_job_id)
            of_job = CaptionJobItem.__table__.c.flags
        if self.image_id is not None:
            query = query.where(Caption.image_id == self.image_id)
        if self.class_name is not None:
            query = query.join(Image, Image.id == Caption.image_id).where(Image.class_name == self.class_name)
        if self.characteristic is not None:
            query = query.where(Caption.characteristic == self.characteristic)
        if self.flag is not None:
            query = query.where(Caption.flags.contains([self.flag]) | of_job.contains([self.flag]))
        if self.flagged is not None:
            some = (func.cardinality(Caption.flags) > 0) | (func.coalesce(func.cardinality(of_job), 0) > 0)
            query = query.where(some if self.flagged == "any" else ~some)
        if self.excluded is not None:
            query = query.where(Caption.excluded == self.excluded)
        if self.edited is not None:
            query = query.where(Caption.original_text.is_not(None) == self.edited)
        return query if self.q is None else query.where(matches(self.q))


@router.get("/datasets/{id}/captions", response_model=common.Page[schema.Caption], summary="Captions, searched")
def list_captions(
    id: str,
    core: CoreDep,
    who: Reader,
    filters: Annotated[Filters, Depends()],
    after: After = None,
    limit: Limit = 100,
) -> Any:
    with core.db.snapshot() as session:
        get_dataset(session, who, id)
        if filters.caption_job_id is not None:
            get_job(session, who, "caption", filters.caption_job_id)
        query = filters.of(select(Caption).where(Caption.dataset_id == id))
        rows, more = page(session, query, Caption.id, after, limit, ascending=True)
        ids = {row.image_id for row in rows}
        images = {image.id: image for image in session.scalars(select(Image).where(Image.id.in_(ids)))}
        items = _items(session, [row.id for row in rows], filters.caption_job_id)
    return common.Page.of([render_caption(row, images[row.image_id], items.get(row.id)) for row in rows], more)


@router.get("/captions/{id}", response_model=schema.Caption, summary="One caption; its version is the ETag")
def show_caption(id: str, core: CoreDep, who: Reader, response: Response) -> Any:
    with core.db.snapshot() as session:
        row, image = _caption(session, who, id)
        item = _items(session, [id]).get(id)
    response.headers["ETag"] = _etag(row)
    return render_caption(row, image, item)


@router.patch(
    "/captions/{id}",
    response_model=schema.Caption,
    summary="Edit a caption's text, or leave it out of training",
    responses={
        status: {"model": common.Problem, "content": {"application/problem+json": {}}, "description": why}
        for status, why in ((412, "it was changed since it was read"), (428, "`If-Match` is missing"))
    },
)
def edit_caption(
    id: str,
    body: schema.CaptionEdit,
    core: CoreDep,
    who: Writer,
    response: Response,
    if_match: Annotated[
        str | None, Header(description='the ETag of the caption as read, `"3"`; of two edits at once, one wins')
    ] = None,
) -> Any:
    """A new text is measured and flagged as the model's was, for the CLIP of the caption's newest job; the first text
    is kept as `original_text`. What compares captions with one another (duplicates, agreement) belonged to the old
    text and is dropped, in all jobs that hold the caption. Setting the text back to the original undoes the edit:
    `original_text` and `edited_by` are null again. A change that changes nothing raises no version."""
    text = None if body.text is None else _one_line(body.text)
    if text == "":
        raise InvalidInput(
            "the text is blank; to leave a caption out of training, set 'excluded'", code="empty_text", param="text"
        )
    with core.transaction() as session:
        row, image = _caption(session, who, id)
        _check_version(row, if_match)
        names, request = _context(session, row)
    # Before the row is locked: a tokenizer may have to be loaded first.
    inspected = None if text is None else _inspect(core, text, names, image, request)
    with core.transaction() as session:
        row, image = _caption(session, who, id, lock=True)
        _check_version(row, if_match)
        before = (row.text, row.excluded)
        if inspected is not None and inspected.text != _one_line(row.text):
            _rewrite(row, inspected, who)
            session.flush()
            forget_comparisons(session, [id])
        if body.excluded is not None:
            row.excluded = body.excluded
        if (row.text, row.excluded) != before:
            row.version += 1
        session.flush()
        session.refresh(row)
        item = _items(session, [id]).get(id)
    response.headers["ETag"] = _etag(row)
    return render_caption(row, image, item)


def _one_line(text: str) -> str:
    """A CLIP reads any run of white space as one space, and exports write a caption a line."""
    return " ".join(text.split())


def _rewrite(row: Caption, inspected: Inspected, who: Principal) -> None:
    row.clip_tokens, row.flags = inspected.clip_tokens, list(inspected.flags)
    if row.original_text is not None and inspected.text == _one_line(row.original_text):
        row.text, row.original_text, row.edited_by = row.original_text, None, None
        return
    if row.original_text is None:
        row.original_text = row.text
    row.text, row.edited_by = inspected.text, who.key_name


def _caption(session: Session, who: Principal, id: str, *, lock: bool = False) -> tuple[Caption, Image]:
    query = select(Caption, Image).join(Image, Image.id == Caption.image_id)
    query = query.where(Caption.id == id, who.sees(Caption.owner))
    found = session.execute(query.with_for_update(of=Caption) if lock else query).one_or_none()
    if found is None:
        raise NotFound(
            f"there is no caption '{id}' among yours; GET /v1/datasets/{{id}}/captions lists them", param="id"
        )
    return found[0], found[1]


def _etag(row: Caption) -> str:
    return f'"{row.version}"'


def _check_version(row: Caption, if_match: str | None) -> None:
    """RFC 9110, 13.1.1: strong comparison with any of the tags listed; `*` is any version."""
    if if_match is None:
        raise PreconditionRequired(
            f"say which version this edit was made from: read the caption and send its ETag as 'If-Match: {_etag(row)}'"
            ", so that nobody's change is overwritten unseen",
            param="If-Match",
        )
    tags = {tag.strip() for tag in if_match.split(",")}
    if not tags & {"*", _etag(row)}:
        raise PreconditionFailed(
            f"{row.id} is at version {_etag(row)} and the edit was made from {if_match}: read it again, make the edit "
            f"on the text it has now, and send 'If-Match: {_etag(row)}'",
            param="If-Match",
        )


def _context(session: Session, row: Caption) -> tuple[dict[str, str], dict[str, Any]]:
    """Display names by class, and the request of the newest job that delivered the caption ({} where it is gone)."""
    names = display_names(session.get_one(Dataset, row.dataset_id))
    newest = select(Job.request).join(CaptionJobItem, CaptionJobItem.job_id == Job.id)
    newest = newest.where(CaptionJobItem.caption_id == row.id).order_by(Job.id.desc()).limit(1)
    return names, session.scalar(newest) or {}


def _inspect(core: Core, text: str, names: dict[str, str], image: Image, request: dict[str, Any]) -> Inspected:
    settings = core.settings
    counter = token_counter(request.get("clip_model", "starter"), settings.model_cache, settings.model_roots)
    inspector = Inspector(counter, list(names.values()), language=request.get("language", "en"))
    return inspector.edited(text, names[image.class_name])
