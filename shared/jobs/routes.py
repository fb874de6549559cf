"""Every kind of job has the same life, so the same routes: read, list, events (JSON or SSE), cancel, pause, resume."""

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from shared.core import Core
from shared.db.models import Base, Job, JobEvent
from shared.errors import CaptuneError, NotFound
from shared.jobs import ledger
from shared.jobs.streams import EventStream, Position
from shared.queue import KINDS
from shared.schemas import common
from shared.web import idempotency
from shared.web.api import After, CoreDep, IdempotencyKey, Limit, accepted
from shared.web.auth import Principal, Reader, Writer
from shared.web.paging import page

R = TypeVar("R", bound=common.JobResource)
S = TypeVar("S", bound=common.Resource)
M = TypeVar("M", bound=Base)
Where = list[ColumnElement[bool]]
MOST_EVENTS = 10**9 - 1  # of one job


def get_job(session: Session, who: Principal, kind: str, job_id: str, *, lock: bool = False) -> Job:
    """The owner's job, else 404: another owner's id says nothing about whether it exists."""
    query = select(Job).where(Job.id == job_id, Job.kind == kind, who.sees(Job.owner))
    job = session.scalar(query.with_for_update() if lock else query)
    if job is None:
        raise NotFound(f"there is no {KINDS[kind]} '{job_id}' among yours; list them to see the ids", param="id")
    return job


class Submission:
    """A POST that makes a job: one transaction, idempotent, answered with 202 and where to look."""

    def __init__(
        self,
        request: Request,
        response: Response,
        core: CoreDep,
        who: Writer,
        idempotency_key: IdempotencyKey = None,
    ) -> None:
        self.core, self.who = core, who
        self._path, self._response, self._key = request.url.path, response, idempotency_key

    def accept(
        self,
        asked: str,
        create: Callable[[Session], str],
        render: Callable[[Session, Job], R],
        stored: str | None = None,
    ) -> R:
        """`asked`: the body as text, what a repeated Idempotency-Key is held to; `create` returns the job's id;
        `stored`: as `accept_as`."""
        return self.accept_as(Job, self._path, asked, create, render, stored)

    def accept_as(
        self,
        of: type[M],
        location: str,
        asked: str,
        create: Callable[[Session], str],
        render: Callable[[Session, M], S],
        stored: str | None = None,
    ) -> S:
        """`create` returns the id of a row of `of`, which is to be found below `location`. `stored`: the key of what
        was put in the store for it, before: no transaction waits for a copy of many GB. It is deleted where the request
        is refused, or is a repeated one; where nobody knows what became of it, it is the collector's."""
        made = False

        def once() -> str:
            nonlocal made
            made = True
            return create(session)

        try:
            with self.core.transaction() as session:
                id = idempotency.once(session, self.who, self._key, f"POST {self._path} {asked}", once, of)
                accepted(self._response, f"{location}/{id}")
                answer = render(session, session.get_one(of, id))
        except CaptuneError:
            self._discard(stored)
            raise
        if not made:
            self._discard(stored)
        return answer

    def _discard(self, stored: str | None) -> None:
        if stored is not None:
            self.core.discard([stored])


SubmissionDep = Annotated[Submission, Depends()]


def no_filters() -> Where:
    return []


def job_routes(
    kind: str,
    prefix: str,
    render: Callable[[Session, Job], R],
    model: type[R],
    filters: Callable[..., Where] = no_filters,
) -> APIRouter:
    """`render` makes the kind's resource from a ledger row. `filters`: a dependency, whose query parameters are further
    filters of the list."""
    router = APIRouter(prefix=prefix)

    @router.get("", response_model=common.Page[model], summary="List, newest first")  # type: ignore[valid-type]
    def list_jobs(
        core: CoreDep,
        who: Reader,
        further: Annotated[Where, Depends(filters)],
        after: After = None,
        limit: Limit = 20,
        dataset_id: Annotated[str | None, Query(max_length=100)] = None,
        status: common.JobStatus | None = None,
    ) -> Any:
        query = select(Job).where(Job.kind == kind, who.sees(Job.owner), *further)
        if dataset_id is not None:
            query = query.where(Job.dataset_id == dataset_id)
        if status is not None:
            query = query.where(Job.status == status)
        with core.db.snapshot() as session:
            rows, more = page(session, query, Job.id, after, limit)
            data = [render(session, row) for row in rows]
        return common.Page.of(data, more)

    @router.get("/{id}", response_model=model, summary="One job")
    def show(id: str, core: CoreDep, who: Reader) -> Any:
        with core.db.snapshot() as session:
            return render(session, get_job(session, who, kind, id))

    @router.get(
        "/{id}/events",
        response_model=common.Page[common.JobEvent],
        summary="What happened, oldest first; as a stream with `Accept: text/event-stream`",
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def events(
        id: str,
        request: Request,
        core: CoreDep,
        who: Reader,
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Limit = 100,
        last_event_id: Annotated[str | None, Header()] = None,
        accept: Annotated[str, Header()] = "",
    ) -> Any:
        if "text/event-stream" in accept:
            await run_in_threadpool(_check, core, who, kind, id)
            start = Position(id, _start(last_event_id, after))
            done = partial(_rendered, core, id, render)
            return EventStream(request.app.state.streams, who.owner, who.key_hash, start, done)
        rows = await run_in_threadpool(_events_after, core, who, kind, id, after, limit + 1)
        data = [common.JobEvent.model_validate(row) for row in rows[:limit]]
        return common.Page(data=data, has_more=len(rows) > limit, last_id=str(data[-1].seq) if data else None)

    def action(name: str, change: Callable[[Session, Job], None], summary: str) -> None:
        @router.post(f"/{{id}}/{name}", response_model=model, status_code=202, name=f"{name}_{kind}", summary=summary)
        def act(id: str, core: CoreDep, who: Writer, response: Response) -> Any:
            with core.transaction() as session:
                job = get_job(session, who, kind, id, lock=True)
                change(session, job)
                session.flush()
                session.refresh(job)
                accepted(response, f"/v1{prefix}/{id}")
                return render(session, job)

    action("cancel", ledger.request_cancel, "End it: at once where it waits, at its next step where it runs")
    action("pause", ledger.request_pause, "Stop after the current step, keeping what is done")
    action("resume", ledger.resume, "Go on with a paused job")
    return router


def _check(core: Core, who: Principal, kind: str, job_id: str) -> None:
    with core.db.snapshot() as session:
        get_job(session, who, kind, job_id)


def _events_after(core: Core, who: Principal, kind: str, job_id: str, seq: int, limit: int) -> list[JobEvent]:
    with core.db.snapshot() as session:
        get_job(session, who, kind, job_id)
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > seq)
        return list(session.scalars(query.order_by(JobEvent.seq).limit(limit)).all())


def _rendered(core: Core, job_id: str, render: Callable[[Session, Job], R]) -> R:
    with core.db.snapshot() as session:
        return render(session, session.get_one(Job, job_id))


def _start(last_event_id: str | None, after: int) -> int:
    """The event that a client had last; a number that no event can have is none of ours."""
    named = last_event_id is not None and re.fullmatch(r"[0-9]{1,9}", last_event_id)
    return int(last_event_id) if named and last_event_id else min(after, MOST_EVENTS)
