"""REST: groups of runs, submitted together to be compared. `POST /v1/fine_tuning/groups` multiplies lists out."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.trainer import methods
from services.trainer.methods import Method
from services.trainer.routes import soup_request
from services.trainer.routes.rendering import render
from services.trainer.routes.submission import (
    check_captions,
    check_validation,
    create_run,
    ensure_baselines,
    identity,
    normalised,
)
from shared.datasets.lookup import usable_dataset
from shared.db.models import FINAL, Job, RunGroup
from shared.errors import InvalidInput, NotFound
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.routes import SubmissionDep
from shared.schemas import common
from shared.schemas import fine_tuning as schema
from shared.web.api import After, CoreDep, Limit, accepted
from shared.web.auth import Principal, Reader, Writer
from shared.web.paging import page

MAX_RUNS = 1000  # of a group
PATH = "/v1/fine_tuning/groups"

T = TypeVar("T")

router = APIRouter(prefix=PATH, tags=["trainer"])


@router.post("", status_code=202, response_model=schema.Group, summary="Fine-tune in every combination of lists")
def create_group(body: schema.GroupRequest, submission: SubmissionDep) -> Any:
    def create(session: Session) -> str:
        group_id = new_id("grp")
        dataset = usable_dataset(session, submission.who, body.dataset_id, lock=True)
        session.add(RunGroup(id=group_id, owner=dataset.owner, dataset_id=dataset.id, name=body.name.strip()))
        session.flush()
        _add_runs(session, submission.who, group_id, body.dataset_id, body)
        return group_id

    return submission.accept_as(RunGroup, PATH, body.model_dump_json(), create, _render_one)


@router.post(
    "/{id}/runs", status_code=202, response_model=schema.Group, summary="Add those combinations that it has not yet"
)
def extend_group(id: str, body: schema.GroupRuns, submission: SubmissionDep) -> Any:
    """A combination whose run failed or was cancelled is run once more."""

    def create(session: Session) -> str:
        group = _group(session, submission.who, id, lock=True)
        _add_runs(session, submission.who, group.id, group.dataset_id, body)
        return group.id

    return submission.accept_as(RunGroup, PATH, body.model_dump_json(), create, _render_one)


def _add_runs(session: Session, who: Principal, group_id: str, dataset_id: str, body: schema.GroupRuns) -> None:
    dataset = usable_dataset(session, who, dataset_id, lock=True)
    there = list(
        session.execute(select(Job.request, Job.status).where(Job.group_id == group_id, Job.kind == "fine_tune"))
    )
    standing = {identity(request) for request, status in there if status not in ("failed", "cancelled")}
    new = {}
    for run in _expand(session, who, dataset_id, body):
        check_validation(dataset, run)
        if (key := identity(run.model_dump(mode="json"))) not in standing:
            new[key] = run
    if len(there) + len(new) > MAX_RUNS:
        raise _too_large(len(there) + len(new))
    for run in new.values():
        create_run(session, dataset, run, group_id)
    for model in dict.fromkeys(body.models):
        ensure_baselines(session, dataset, model)


def _expand(
    session: Session, who: Principal, dataset_id: str, body: schema.GroupRuns
) -> Iterable[schema.FineTuningRequest]:
    """Every run that the lists name, each once. Counted before it is made: lists of a few hundred entries multiply to
    billions."""
    chosen = _methods(body.methods)
    models, captions, shots = _distinct(body.models), _distinct(body.caption_job_ids), _distinct(body.shots)
    for caption_job_id in captions or (None,):
        check_captions(session, who, dataset_id, caption_job_id, [method for _, method in chosen], "caption_job_ids")
    seeds = _seeds(body)

    def captions_for(method: Method) -> Sequence[str | None]:
        return captions if method.needs_captions else (None,)

    def draws(method: Method, count: int | None) -> int:
        """Pairs of seeds that make a difference."""
        if method.kind == "fine_tune":
            return len(seeds) if count is not None else len({seed for seed, _ in seeds})
        return len({shot_seed for _, shot_seed in seeds}) if count is not None else 1

    def sizes(method: Method) -> Sequence[int | None]:
        return shots if method.kind != "zero_shot" or method.needs_captions else (None,)

    total = len(models) * sum(
        len(captions_for(method)) * sum(draws(method, count) for count in sizes(method)) for _, method in chosen
    )
    if total > MAX_RUNS:
        raise _too_large(total)
    made: dict[str, schema.FineTuningRequest] = {}
    for (spec, method), model in product(chosen, models):
        for caption_job_id, count, (seed, shot_seed) in product(captions_for(method), sizes(method), seeds):
            run = schema.FineTuningRequest(
                model=model,
                dataset_id=dataset_id,
                caption_job_id=caption_job_id,
                exclude_flags=body.exclude_flags,
                method=spec,
                shots=count,
                shot_seed=shot_seed,
                seed=seed,
                validation=body.validation,
                checkpoints=body.checkpoints,
                suffix=body.suffix,
                tags=body.tags,
            )
            run = normalised(run, method)
            made.setdefault(identity(run.model_dump(mode="json")), run)
    assert len(made) == total
    return made.values()


def _methods(specs: Sequence[schema.MethodSpec]) -> list[tuple[schema.MethodSpec, Method]]:
    """Each once, by whatever preset its hyperparameters came about. Raises InvalidInput, naming which of them."""
    found: dict[tuple[str, str], tuple[schema.MethodSpec, Method]] = {}
    for i, spec in enumerate(specs):
        try:
            method = methods.build(spec.type, spec.hyperparameters, spec.preset)
        except InvalidInput as error:
            error.param = f"methods.{i}.{(error.param or 'method').removeprefix('method.')}"
            raise
        found.setdefault((spec.type, method.hyperparameters.model_dump_json()), (spec, method))
    return list(found.values())


def _seeds(body: schema.GroupRuns) -> list[tuple[int, int]]:
    """(seed, shot seed): one with the other, or where shot seeds are given, each with each."""
    if body.shot_seeds is None:
        return [(seed, seed) for seed in _distinct(body.seeds)]
    if len(body.seeds) * len(body.shot_seeds) > 10**6:  # refused by the count, which need not be exact
        raise _too_large(len(body.seeds) * len(body.shot_seeds))
    return list(product(_distinct(body.seeds), _distinct(body.shot_seeds)))


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _too_large(runs: int) -> InvalidInput:
    return InvalidInput(
        f"the group would have {runs:,} runs; at most {MAX_RUNS:,} are allowed: shorten a list, or make several groups",
        code="group_too_large",
        param="body",
    )


@router.get("", response_model=common.Page[schema.Group], summary="List, newest first")
def list_groups(
    core: CoreDep,
    who: Reader,
    after: After = None,
    limit: Limit = 20,
    dataset_id: Annotated[str | None, Query(max_length=100)] = None,
) -> Any:
    query = select(RunGroup).where(who.sees(RunGroup.owner))
    if dataset_id is not None:
        query = query.where(RunGroup.dataset_id == dataset_id)
    with core.db.snapshot() as session:
        rows, more = page(session, query, RunGroup.id, after, limit)
        data = _render(session, rows)
    return common.Page.of(data, more)


@router.get("/{id}", response_model=schema.Group, summary="One group, and how its runs stand")
def show_group(id: str, core: CoreDep, who: Reader) -> Any:
    with core.db.snapshot() as session:
        return _render_one(session, _group(session, who, id))


@router.post("/{id}/cancel", status_code=202, response_model=schema.Group, summary="End every run that is not final")
def cancel_group(id: str, core: CoreDep, who: Writer, response: Response) -> Any:
    """What is trained already is still scored."""
    with core.transaction() as session:
        group = _group(session, who, id)
        waiting = select(Job).where(Job.group_id == id, Job.kind == "fine_tune", Job.status.not_in(FINAL))
        for job in session.scalars(waiting.order_by(Job.id).with_for_update()):
            ledger.request_cancel(session, job)
        session.flush()
        accepted(response, f"{PATH}/{id}")
        return _render_one(session, group)


@router.post(
    "/{id}/soup",
    status_code=202,
    response_model=schema.FineTuningJob,
    summary="Average the group's fine-tunes, greedily by their validation (arXiv 2203.05482)",
)
def make_soup(id: str, body: schema.SoupRequest, submission: SubmissionDep) -> Any:
    def create(session: Session) -> str:
        group = _group(session, submission.who, id, lock=True)
        dataset = usable_dataset(session, submission.who, group.dataset_id, lock=True)
        return create_run(session, dataset, soup_request.resolve(session, group, dataset, body), group.id).id

    return submission.accept_as(Job, "/v1/fine_tuning/jobs", body.model_dump_json(), create, render)


def _group(session: Session, who: Principal, id: str, *, lock: bool = False) -> RunGroup:
    query = select(RunGroup).where(RunGroup.id == id, who.sees(RunGroup.owner))
    # Not FOR UPDATE: a worker that queues a run's evaluation holds the run and asks for the group's key.
    row = session.scalar(query.with_for_update(key_share=True) if lock else query)
    if row is None:
        raise NotFound(f"there is no group '{id}' among yours; GET {PATH} lists them", param="id")
    return row


def _render_one(session: Session, row: RunGroup) -> schema.Group:
    return _render(session, [row])[0]


def _render(session: Session, rows: Sequence[RunGroup]) -> list[schema.Group]:
    """A run's evaluation carries the run's group, so one count tells how a group stands."""
    session.flush()
    counted = session.execute(
        select(Job.group_id, Job.kind, Job.status, func.count())
        .where(Job.group_id.in_([row.id for row in rows]))
        .group_by(Job.group_id, Job.kind, Job.status)
    ).all()
    found: list[schema.Group] = []
    for row in rows:
        mine = [(kind, status, n) for group_id, kind, status, n in counted if group_id == row.id]
        counts = {status: n for kind, status, n in sorted(mine) if kind == "fine_tune"}
        found.append(
            schema.Group(
                id=row.id,
                name=row.name,
                dataset_id=row.dataset_id,
                status="finished" if all(status in FINAL for _, status, _ in mine) else "running",
                runs=sum(counts.values()),
                counts=counts,
                scored=sum(n for kind, status, n in mine if kind == "evaluate" and status == "succeeded"),
                leaderboard=f"/v1/leaderboard?{urlencode({'dataset_id': row.dataset_id, 'group_id': row.id})}",
                created_at=row.created_at,
            )
        )
    return found
