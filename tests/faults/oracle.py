"""What must hold once the system has settled, whatever died: each rule reads the journal, the database, the store and
the queue, and says in words what does not hold. tests/faults/test_oracle.py breaks each rule once."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Row, func, select, text

from shared.classifier.folder import load_classifier
from shared.core import Core
from shared.db.models import (
    FINAL,
    Caption,
    CaptionJobItem,
    Checkpoint,
    Classifier,
    Dataset,
    Evaluation,
    IdempotencyKey,
    Image,
    Job,
    JobEvent,
    Score,
)
from shared.errors import CaptuneError
from shared.queue import KINDS
from tests.faults.journal import Journal, Submission

#: Why a job may fail where a model server misbehaved: it refused every caption.
BY_MODEL_SERVER = {"nothing_captioned", "captioner_failed", "engine_failed", "captioner_refused", "unavailable"}
MOST_RETRIES = 40  # lost or failed attempts of one job in one schedule: far more than its faults explain


@dataclass
class Evidence:
    """before: ids of the jobs that were there when the schedule began. undisturbed: digests by run (world.RUNS).
    groups: of the faults that were injected. load: opens a classifier's folder; raises CaptuneError."""

    core: Core
    journal: Journal
    before: set[str] = field(default_factory=set)
    undisturbed: dict[str, dict[str, str]] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    max_failures: int = 5
    load: Callable[[Path], object] = load_classifier

    @property
    def store(self) -> Path:
        return Path(self.core.store.root)

    @cached_property
    def jobs(self) -> dict[str, Job]:
        """Of this schedule, as they are now."""
        with self.core.db.transaction() as session:
            return {job.id: job for job in session.scalars(select(Job)) if job.id not in self.before}

    @cached_property
    def events(self) -> dict[str, list[JobEvent]]:
        found: dict[str, list[JobEvent]] = {id: [] for id in self.jobs}
        with self.core.db.transaction() as session:
            query = select(JobEvent).where(JobEvent.job_id.in_(self.jobs)).order_by(JobEvent.job_id, JobEvent.seq)
            for event in session.scalars(query):
                found[event.job_id].append(event)
        return found

    @cached_property
    def submissions(self) -> dict[str, Submission]:
        """By the id that was acknowledged."""
        return self.journal.acknowledged()

    def rows(self, sql: str, **parameters: Any) -> list[Row[Any]]:
        with self.core.db.transaction() as session:
            return list(session.execute(text(sql), parameters).all())


Findings = Iterator[str]


def acknowledged_jobs_exist(e: Evidence) -> Findings:
    """Nothing that was answered with 202 is missing, unless the user deleted it."""
    gone = e.journal.maybe_deleted()
    datasets = {row.id for row in e.rows("SELECT id FROM datasets")}
    groups = {row.id for row in e.rows("SELECT id FROM run_groups")}
    with e.core.db.transaction() as session:
        jobs = set(session.scalars(select(Job.id)))
    for id, submission in e.submissions.items():
        if submission.kind == "group":
            there = id in groups
        else:
            there = id in jobs and (submission.kind != "ingest" or id in datasets)
        # Its jobs but those that made and scored classifiers go with a data set.
        with_dataset = submission.kind == "caption" and submission.body.get("dataset_id") in gone
        if not there and id not in gone and not with_dataset:
            yield f"{id} was acknowledged and is gone"


def one_final_state(e: Evidence) -> Findings:
    for job in e.jobs.values():
        if job.status not in FINAL:
            yield f"{job.id} is {job.status} (attempt {job.attempt}, failures {job.failures}, due {job.run_after})"
            continue
        last = [event.type.removeprefix("job.") for event in e.events[job.id]][-1:]
        ends = [t for event in e.events[job.id] if (t := event.type.removeprefix("job.")) in FINAL]
        if ends != [job.status] or last != [job.status]:
            yield f"{job.id} is {job.status}; its events end with {last}, final ones: {ends}"
        if job.finished_at is None or job.lease_until is not None:
            yield f"{job.id} is {job.status}, finished_at {job.finished_at}, lease_until {job.lease_until}"


def final_states_stay(e: Evidence) -> Findings:
    for entry in e.journal.of("seen"):
        job = e.jobs.get(entry["id"])
        if job is not None and job.status != entry["state"]:
            yield f"{job.id} was seen {entry['state']} and is {job.status}"


def events_have_no_gap(e: Evidence) -> Findings:
    for job in e.jobs.values():
        seqs = [event.seq for event in e.events[job.id]]
        if seqs != list(range(1, len(seqs) + 1)) or job.event_seq != len(seqs):
            yield f"{job.id}: event numbers {seqs}, counter {job.event_seq}"


def streams_had_every_event_once(e: Evidence) -> Findings:
    for entry in e.journal.of("stream"):
        seqs, id = entry["seqs"], entry["id"]
        if seqs != list(range(1, len(seqs) + 1)):
            yield f"{id}: a stream gave the events {seqs}"
        elif entry["done"] is not None and id in e.jobs and len(seqs) != len(e.events[id]):
            yield f"{id}: a stream ended after {len(seqs)} of {len(e.events[id])} events"
        elif entry["done"] is None and id in e.jobs:
            yield f"{id}: a stream never came to its end (events {seqs})"


def attempts_are_bounded(e: Evidence) -> Findings:
    for job in e.jobs.values():
        types = [event.type for event in e.events[job.id]]
        starts = types.count("job.started")
        again = types.count("job.requeued")
        lost = sum(event.type == "job.requeued" and event.level == "warning" for event in e.events[job.id])
        if starts != job.attempt or starts > again + 1:
            yield f"{job.id}: attempt {job.attempt}, started {starts} times, requeued {again} times"
        if job.failures > e.max_failures or lost > MOST_RETRIES:
            yield f"{job.id}: {job.failures} failures in a row, {lost} in all"


def failures_have_a_cause(e: Evidence) -> Findings:
    for job in e.jobs.values():
        if job.status != "failed":
            if job.error is not None:
                yield f"{job.id} {job.status} and has an error: {job.error}"
            continue
        code = (job.error or {}).get("code")
        submission = e.submissions.get(job.id)
        if submission is not None and code in submission.expect.get("fails", ()):
            continue
        if job.kind == "caption" and "model_server" in e.groups and code in BY_MODEL_SERVER:
            continue
        if job.failures >= e.max_failures:
            continue
        yield f"{job.id} failed after {job.failures} failures: {job.error}"
    for id, submission in e.submissions.items():
        if submission.expect.get("fails") and id in e.jobs and e.jobs[id].status == "succeeded":
            yield f"{id} succeeded, and {submission.expect['fails']} was to be expected"


def requests_made_one_resource(e: Evidence) -> Findings:
    """A key that was acknowledged names one resource, the one that is in the database; and no job is there that nobody
    asked for."""
    with e.core.db.transaction() as session:
        made = {row.key: row.resource_id for row in session.scalars(select(IdempotencyKey))}
    for submission in e.journal.submissions().values():
        told = set(submission.acknowledged)
        if len(told) > 1:
            yield f"the key {submission.key} was acknowledged as {sorted(told)}"
        elif told and told != {made.get(submission.key)}:
            yield f"the key {submission.key} was acknowledged as {told}, the database has {made.get(submission.key)}"
        if submission.refused is not None and submission.key in made and not told:
            yield f"the key {submission.key} was refused ({submission.refused}) and made {made[submission.key]}"
    asked = set(made.values())
    by_runs = {str((job.result or {}).get("evaluation_id")) for job in e.jobs.values() if job.kind == "fine_tune"}
    members: Counter[str] = Counter()
    for job in e.jobs.values():
        if job.kind == "fine_tune" and job.group_id is not None:
            members[job.group_id] += 1
        baseline = (job.request.get("metadata") or {}).get("made_by") == "captune"
        if job.id not in asked | by_runs and job.group_id not in asked and not baseline:
            yield f"nobody asked for {job.id} ({job.kind}, created {job.created_at})"
    for id, submission in e.submissions.items():
        if submission.kind == "group" and members[id] != submission.expect["members"]:
            yield f"the group {id} has {members[id]} runs"


def cancelled_has_no_result(e: Evidence) -> Findings:
    with e.core.db.transaction() as session:
        runs = set(session.scalars(select(Classifier.job_id).where(Classifier.job_id.is_not(None))))
        scored = set(session.scalars(select(Evaluation.id)))
    for job in e.jobs.values():
        if job.status != "succeeded" and (job.id in runs or job.id in scored or job.result is not None):
            yield f"{job.id} {job.status} and has a result"
        if job.cancel_requested or job.pause_requested:
            yield f"{job.id} is {job.status} with a request pending"


def images_are_what_was_sent(e: Evidence) -> Findings:
    with e.core.db.transaction() as session:
        for id, submission in e.submissions.items():
            job = e.jobs.get(id)
            dataset = session.get(Dataset, id)
            if submission.kind != "ingest" or job is None or job.status != "succeeded" or dataset is None:
                continue
            query = select(Image.path, Image.sha256).where(Image.dataset_id == id)
            images = {row.path: row.sha256 for row in session.execute(query)}
            sent = submission.expect.get("images", {})
            report = dataset.report or {}
            if images != sent:
                yield f"{id}: {len(images)} images of {len(sent)} sent; {sorted(images.items() ^ sent.items())[:4]}"
            if report.get("refused_total") != submission.expect.get("refused"):
                yield f"{id}: {report.get('refused_total')} files refused, not {submission.expect.get('refused')}"
            counted = sum(sum(classes.values()) for classes in (dataset.counts or {}).values())
            if (job.result or {}).get("images") != len(images) or counted != len(images):
                yield f"{id}: its result says {job.result}, its counts {counted}, and it has {len(images)} images"


def captions_are_complete_and_once(e: Evidence) -> Findings:
    twice = "SELECT image_id, key, count(*) AS n FROM captions GROUP BY 1, 2 HAVING count(*) > 1"
    for row in e.rows(twice):
        yield f"image {row.image_id} has {row.n} captions with the key {row.key}"
    with e.core.db.transaction() as session:
        for job in e.jobs.values():
            if job.kind != "caption" or job.status != "succeeded":
                continue
            request, result = job.request, job.result or {}
            query = select(Caption.image_id, Caption.characteristic).join(
                CaptionJobItem, CaptionJobItem.caption_id == Caption.id
            )
            found = Counter(
                (row.image_id, row.characteristic)
                for row in session.execute(query.where(CaptionJobItem.job_id == job.id))
            )
            split = (Image.dataset_id == job.dataset_id, Image.split == request["split"])
            images = list(session.scalars(select(Image.id).where(*split)))
            wanted = {(image, c): request["samples_per_prompt"] for image in images for c in request["characteristics"]}
            total, failed = sum(wanted.values()), result.get("failed", 0)
            if result.get("captions") != found.total() or found.total() + failed != total:
                yield f"{job.id}: says {result}; there are {found.total()} captions of {total}"
            if any(count > wanted.get(which, 0) for which, count in found.items()):
                yield f"{job.id}: captions not asked for, or twice: {(found - Counter(wanted)).most_common(3)}"
            if failed and "model_server" not in e.groups:
                yield f"{job.id}: {failed} captions were refused by a model server that was well: {result}"


def runs_made_one_classifier_and_its_scores(e: Evidence) -> Findings:
    with e.core.db.transaction() as session:
        for job in e.jobs.values():
            if job.kind != "fine_tune" or job.status != "succeeded":
                continue
            made = session.scalars(select(Classifier).where(Classifier.job_id == job.id)).all()
            if len(made) != 1 or (job.result or {}).get("classifier_id") != made[0].id:
                yield f"{job.id}: classifiers {[c.id for c in made]}, its result says {job.result}"
                continue
            evaluation = session.get(Job, (job.result or {}).get("evaluation_id", ""))
            if evaluation is None:
                yield f"{job.id}: its evaluation does not exist"
            saved = session.scalars(select(Checkpoint.kind).where(Checkpoint.job_id == job.id)).all()
            kinds = ["best", "last"] if job.request.get("checkpoints") == "best_and_last" else ["best"]
            if sorted(saved) != kinds:
                yield f"{job.id}: checkpoints {sorted(saved)}, not {kinds}"


def scores_stand_once(e: Evidence) -> Findings:
    key = "classifier_id, dataset_id, split, head"
    for row in e.rows(f"SELECT {key}, count(*) AS n FROM evaluations GROUP BY {key} HAVING count(*) > 1"):
        yield f"{row.n} evaluations of {tuple(row)[:4]}"
    for row in e.rows(f"SELECT {key}, metric, count(*) AS n FROM scores GROUP BY {key}, metric HAVING count(*) > 1"):
        yield f"{row.n} scores of {tuple(row)[:5]}"
    with e.core.db.transaction() as session:
        standing = {tuple(getattr(row, c) for c in key.split(", ")): row for row in session.scalars(select(Evaluation))}
        for job in e.jobs.values():
            if job.kind != "evaluate" or job.status != "succeeded":
                continue
            result = job.result or {}
            which = (result.get("classifier_id"), job.dataset_id, job.request["split"], job.request["head"])
            if session.get(Classifier, which[0] or "") is None:
                continue  # deleted by its owner since
            if which not in standing:
                yield f"{job.id} succeeded, and no evaluation of {which} stands"
            elif standing[which].id == job.id:
                query = select(Score.metric, Score.value).where(Score.evaluation_id == job.id)
                scores = {metric: value for metric, value in session.execute(query)}
                if scores != result.get("scores"):
                    yield f"{job.id}: scores {scores}, its result says {result.get('scores')}"


def weights_are_those_of_an_undisturbed_run(e: Evidence) -> Findings:
    with e.core.db.transaction() as session:
        for id, submission in e.submissions.items():
            name, job = submission.expect.get("run"), e.jobs.get(id)
            if name is None or job is None or job.status != "succeeded":
                continue
            made = session.scalar(select(Classifier).where(Classifier.job_id == id))
            folder = e.store / made.storage_key if made is not None else Path("/nonexistent")
            digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
            if digests != e.undisturbed[name]:
                differ = sorted({file for file, _ in digests.items() ^ e.undisturbed[name].items()})
                yield f"{id} ({name}, {job.attempt} attempts): {differ} differ from the undisturbed run's"
            try:
                e.load(folder)
            except CaptuneError as error:
                yield f"{id}: its classifier cannot be loaded: {error}"


def deleted_leaves_nothing(e: Evidence) -> Findings:
    for id in e.journal.deleted():
        for table, column in (("datasets", "id"), ("images", "dataset_id"), ("captions", "dataset_id"), ("jobs", "id")):
            (count,) = e.rows(f"SELECT count(*) FROM {table} WHERE {column} = :id", id=id)[0]
            if count:
                yield f"{id} was deleted and has {count} rows in {table}"
        left = e.rows("SELECT id FROM jobs WHERE dataset_id = :id AND kind IN ('ingest', 'caption')", id=id)
        if left:
            yield f"{id} was deleted and has the jobs {[row.id for row in left]}"


def queue_holds_nothing(e: Evidence) -> Findings:
    redis = e.core.queue.redis
    for kind in KINDS:
        if ids := e.core.queue.waiting(kind):
            yield f"{kind}: Redis still has {sorted(ids)[:5]} waiting"
    if (payloads := sum(1 for key in redis.scan_iter("rq:job:*") if redis.ttl(key) == -1)) > 50:
        yield f"Redis keeps {payloads} payloads that never expire"


def referenced(core: Core) -> set[str]:
    """Every key of the store that a row names."""
    with core.db.transaction() as session:
        keys = {core.store.blob_key(digest) for digest in session.scalars(select(func.distinct(Image.sha256)))}
        for column in (Dataset.archive_key, Classifier.storage_key, Checkpoint.storage_key, Evaluation.predictions_key):
            keys |= set(session.scalars(select(column)))
        uploads = select(Job.request["upload_key"].astext).where(Job.status.not_in(FINAL))
        return keys | {key for key in session.scalars(uploads) if key}


def store_has_what_is_referenced(e: Evidence) -> Findings:
    for key in sorted(referenced(e.core)):
        if not (e.store / key).exists():
            yield f"the store has lost {key}"
    for row in e.rows("SELECT DISTINCT sha256 FROM images"):
        path = e.store / e.core.store.blob_key(row.sha256)
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != row.sha256:
            yield f"the store holds other bytes under {path.name}"


def store_has_no_orphans(e: Evidence) -> Findings:
    """To be asked after the collector has run."""
    keys = referenced(e.core)
    files = [path.relative_to(e.store) for path in e.store.rglob("*") if path.is_file()]
    orphans = [str(p) for p in files if str(p) not in keys and not any(str(up) in keys for up in p.parents)]
    if orphans:
        yield f"{len(orphans)} files that no row names, after the collector: {sorted(orphans)[:5]}"


def answers_were_no_server_errors(e: Evidence) -> Findings:
    for entry in e.journal.of("server_error"):
        yield f"{entry['path']} answered {entry['status']}: {entry['body'][:200]}"


Rule = Callable[[Evidence], Findings]
RULES: tuple[Rule, ...] = (
    acknowledged_jobs_exist,
    one_final_state,
    final_states_stay,
    events_have_no_gap,
    streams_had_every_event_once,
    attempts_are_bounded,
    failures_have_a_cause,
    requests_made_one_resource,
    cancelled_has_no_result,
    images_are_what_was_sent,
    captions_are_complete_and_once,
    runs_made_one_classifier_and_its_scores,
    scores_stand_once,
    weights_are_those_of_an_undisturbed_run,
    deleted_leaves_nothing,
    queue_holds_nothing,
    store_has_what_is_referenced,
    answers_were_no_server_errors,
)


def verdict(evidence: Evidence, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """Findings, each with the rule's name before it; none where all is well."""
    return [f"{rule.__name__}: {finding}" for rule in rules for finding in rule(evidence)]
