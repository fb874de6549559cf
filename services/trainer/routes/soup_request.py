"""Which runs of a group a soup is made of: everything that can be refused is refused before the job is made."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.trainer.methods import METHODS
from shared.db.models import FINAL, Classifier, Dataset, Job, RunGroup
from shared.errors import Conflict, InvalidInput
from shared.schemas import fine_tuning as schema

METHOD = "soup"  # of the job and its classifier; no method that a user could name, since it is made of other runs
LISTED = 5  # entries in a message

T = TypeVar("T")


def resolve(session: Session, group: RunGroup, dataset: Dataset, body: schema.SoupRequest) -> schema.FineTuningRequest:
    """A request of method `soup`, its `classifier_ids` best first by val top-1. Raises InvalidInput where the choice is
    open or empty, Conflict while a run of it is not final."""
    fine_tunes = [name for name, method in METHODS.items() if method.kind == "fine_tune"]
    query = select(Job).where(Job.group_id == group.id, Job.kind == "fine_tune")
    runs = [
        job
        for job in session.scalars(query.order_by(Job.id))
        if job.request["method"]["type"] in fine_tunes and job.status not in ("failed", "cancelled")
    ]
    runs, model = _of("model", body.model, [(job, job.request["model"]) for job in runs])
    if body.method is not None:
        runs, _ = _of("method", body.method, [(job, job.request["method"]["type"]) for job in runs])
    runs, shots = _of("shots", body.shots, [(job, job.request["shots"] or "all") for job in runs])
    runs, shot_seed = _of("shot_seed", body.shot_seed, [(job, job.request["shot_seed"]) for job in runs])
    runs, validation = _of("validation", body.validation, [(job, job.request["validation"]) for job in runs])
    if validation == "none":
        raise InvalidInput(
            "a soup chooses its members on validation images, and these runs have validation 'none'; extend the group "
            "with runs of 'full' or 'few_shot'",
            code="soup_without_validation",
            param="validation",
        )
    if waiting := [job.id for job in runs if job.status not in FINAL]:
        raise Conflict(
            f"{len(waiting)} runs that would be members are not final ({_listed(waiting)}); wait for them, or cancel "
            "them",
            code="members_running",
        )
    members = _members(session, runs, str(dataset.fingerprint))
    of_job = {job.id: job for job in runs}
    caption_jobs = {of_job[str(member.job_id)].request["caption_job_id"] for member in members}
    return schema.FineTuningRequest(
        model=model,
        dataset_id=dataset.id,
        caption_job_id=caption_jobs.pop() if len(caption_jobs) == 1 else None,
        exclude_flags=of_job[str(members[0].job_id)].request["exclude_flags"],
        method=schema.MethodSpec(
            type=METHOD,
            hyperparameters={
                "group_id": group.id,
                "method": body.method,
                "classifier_ids": [member.id for member in members],
            },
        ),
        shots=None if shots == "all" else shots,
        shot_seed=shot_seed,
        seed=shot_seed,  # as of every run that draws nothing but its images
        validation=validation,
        suffix=body.suffix,
        tags=body.tags,
    )


def _members(session: Session, runs: Sequence[Job], fingerprint: str) -> list[Classifier]:
    """Best first; a tie keeps the earlier. Those made before the data set's classes were renamed are no part of it."""
    query = select(Classifier).where(Classifier.job_id.in_([job.id for job in runs]))
    found = [row for row in session.scalars(query) if row.data_fingerprint == fingerprint]
    found = [row for row in found if row.details.get("val_top1") is not None]
    if len(found) < 2:
        raise InvalidInput(
            f"a soup needs at least two fine-tunes that have succeeded on the data set as it is now; there are "
            f"{len(found)}. Extend the group with more seeds, methods or hyperparameters",
            code="too_few_members",
        )
    return sorted(found, key=lambda row: (-row.details["val_top1"], row.id))


def _of(name: str, given: T | None, runs: Sequence[tuple[Job, T]]) -> tuple[list[Job], Any]:
    """The runs with the value given, or with the only one that there is; and that value."""
    values = list(dict.fromkeys(value for _, value in runs))
    if given is None and len(values) == 1:
        given = values[0]
    if given is None and values:
        raise InvalidInput(
            f"the group's fine-tunes differ in '{name}' ({_listed(values)}): say which of them are averaged",
            code="soup_ambiguous",
            param=name,
        )
    if given not in values:
        raise InvalidInput(
            f"the group has no fine-tunes with {name} '{given}'; it has: {_listed(values) or 'none'}"
            if values
            else "the group has no fine-tunes to average: methods on frozen features have no weights of their own",
            code="too_few_members",
            param=name,
        )
    return [job for job, value in runs if value == given], given


def _listed(values: Iterable[object]) -> str:
    found = [str(value) for value in values]
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more
