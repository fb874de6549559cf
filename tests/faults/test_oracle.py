"""Each rule of the oracle is broken once, in a database, a store, a queue and a journal where otherwise all is well."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import text

from shared.core import Core
from shared.db.models import FINAL, Base, Evaluation, IdempotencyKey
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.jobs import ledger
from tests.faults import oracle
from tests.faults.bench import Bench
from tests.faults.journal import Journal
from tests.integration.factories import (
    add_caption,
    add_checkpoint,
    add_classifier,
    add_dataset,
    add_group,
    add_job,
    change_job,
)

DIGESTS = {"head.safetensors": hashlib.sha256(b"the head").hexdigest()}
SCORES = {"top1": 0.5, "nll": 1.25}


@dataclass
class Good:
    """A schedule's traces with nothing wrong. Ids of its jobs."""

    core: Core
    journal: Journal
    dataset: str
    captions: str
    run: str
    classifier: str
    evaluation: str
    group: str
    unique: list[str] = field(default_factory=list)  # tables that lost their constraint

    def sql(self, statement: str) -> None:
        with self.core.db.transaction() as session:
            session.execute(text(statement))

    @property
    def head(self) -> Path:
        return Path(self.core.store.root) / "classifiers" / self.run / "1" / "head.safetensors"

    def findings(self) -> list[str]:
        def load(folder: Path) -> None:
            if not (folder / "head.safetensors").exists():
                raise InvalidInput("no head")

        evidence = oracle.Evidence(
            core=self.core, journal=self.journal, undisturbed={"mmft": DIGESTS}, max_failures=3, load=load
        )
        return oracle.verdict(evidence, (*oracle.RULES, oracle.store_has_no_orphans))


def _life(core: Core, job_id: str, status: str = "succeeded") -> None:
    """Claimed, and ended."""
    with core.db.transaction() as session:
        job = session.get_one(oracle.Job, job_id)
        job.status = "queued"
        session.flush()
        claimed = ledger.claim(session, job_id, job.kind, "a worker", 30)
        assert claimed is not None
        ledger.finish(claimed, session, status, result=job.result)


def _asked(good: Good, kind: str, id: str, **expect: object) -> None:
    key = new_id("key")
    good.journal.add("sent", key=key, kind=kind, expect=expect, body={"dataset_id": good.dataset})
    good.journal.add("acknowledged", key=key, id=id, status=202)
    with good.core.db.transaction() as session:
        session.add(IdempotencyKey(owner="anna", key=key, request_hash="", resource_id=id))


def _empty(core: Core) -> None:
    with core.db.transaction() as session:
        for table in reversed(Base.metadata.sorted_tables):  # quicker than TRUNCATE where there is little
            session.execute(table.delete())


@pytest.fixture
def good(started_bench: Bench) -> Iterator[Good]:
    core = started_bench.core
    _empty(core)
    core.queue.redis.flushall()
    shutil.rmtree(core.store.root, ignore_errors=True)
    report = {"refused_total": 1}
    dataset = add_dataset(core, images=1, report=report, counts={"train": {"cat": 1, "dog": 1}})
    core.store.put_bytes(f"uploads/{dataset}", b"an archive")
    change_job(core, dataset, result={"images": 2, "refused": 1})
    with core.db.transaction() as session:
        images = {i.path: i for i in session.query(oracle.Image).filter_by(dataset_id=dataset)}
    request = {"dataset_id": dataset, "split": "train", "characteristics": ["visual"], "samples_per_prompt": 1}
    captions = add_job(core, request=request, dataset_id=dataset, result={"captions": 2, "failed": 0})
    for image in images.values():
        add_caption(core, image, captions)
    classifier = add_classifier(core, dataset, SCORES)
    with core.db.transaction() as session:
        made = session.get_one(oracle.Classifier, classifier)
        scored = session.query(Evaluation).one()
        run, evaluation = str(made.job_id), scored.id
        made.storage_key, scored.predictions_key = f"classifiers/{run}/1", f"predictions/{evaluation}.parquet"
        key = made.storage_key, scored.predictions_key
    core.store.put_bytes(f"{key[0]}/head.safetensors", b"the head")
    core.store.put_bytes(key[1], b"logits")
    add_checkpoint(core, run, kind="best", key=key[0])
    change_job(core, run, result={"classifier_id": classifier, "evaluation_id": evaluation})
    request = {"classifier_id": classifier, "split": "test", "head": "own"}
    change_job(core, evaluation, request=request, result={"classifier_id": classifier, "scores": SCORES})
    group = add_group(core, dataset)
    good = Good(core, Journal(), dataset, captions, run, classifier, evaluation, group)
    member = add_job(core, "fine_tune", dataset_id=dataset, group_id=group)
    for id in (captions, run, evaluation):
        _life(core, id)
    _life(core, member, "cancelled")
    with core.db.transaction() as session:  # ingested as any other; its row is made by hand
        ledger.add_event(session, dataset, "job.created", "")
    _life(core, dataset)
    core.queue.redis.flushall()
    sent = {path: image.sha256 for path, image in images.items()}
    _asked(good, "ingest", dataset, images=sent, refused=1)
    _asked(good, "caption", captions)
    _asked(good, "fine_tune", run, run="mmft")
    _asked(good, "group", group, members=1)
    good.journal.add("seen", id=captions, state="succeeded")
    good.journal.add("stream", id=captions, seqs=[1, 2, 3], done="succeeded")
    yield good
    _empty(core)
    for table in good.unique:
        name, columns = f"uq_{table}_{'_'.join(UNIQUE[table])}", ", ".join(UNIQUE[table])
        good.sql(f"ALTER TABLE {table} ADD CONSTRAINT {name} UNIQUE ({columns})")


def test_where_all_is_well_nothing_is_found(good: Good) -> None:
    assert good.findings() == []


def _lose(good: Good, job: str) -> None:
    good.sql(f"DELETE FROM jobs WHERE id = '{job}'")


def _job(good: Good, **columns: object) -> None:
    change_job(good.core, good.captions, **columns)


def _event(good: Good, type: str, level: str = "info") -> None:
    with good.core.db.transaction() as session:
        ledger.add_event(session, good.captions, type, "", level=level)


UNIQUE = {"captions": ("image_id", "key"), "evaluations": ("classifier_id", "dataset_id", "split", "head")}


def _twice(good: Good, table: str, **changes: str) -> None:
    """A row again, under another id: what a constraint forbids, which the fixture puts back."""
    good.sql(f"ALTER TABLE {table} DROP CONSTRAINT uq_{table}_{'_'.join(UNIQUE[table])}")
    good.unique.append(table)
    good.sql(
        f"CREATE TEMP TABLE again ON COMMIT DROP AS SELECT * FROM {table} LIMIT 1; "
        f"UPDATE again SET {', '.join(f'{name} = {value!r}' for name, value in changes.items())}; "
        f"INSERT INTO {table} SELECT * FROM again"
    )


def _deleted(good: Good) -> None:
    good.journal.add("deleting", id=good.dataset)
    good.journal.add("deleted", id=good.dataset, status=204)


def _repeat(good: Good, id: str) -> None:
    key = next(iter(good.journal.submissions()))
    good.journal.add("acknowledged", key=key, id=id, status=202)


def _file(good: Good, key: str, data: bytes | None) -> None:
    path = Path(good.core.store.root) / key
    if data is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _blob(good: Good) -> str:
    with good.core.db.transaction() as session:
        return good.core.store.blob_key(session.query(oracle.Image.sha256).order_by(oracle.Image.id).limit(1).scalar())


BREAK: list[tuple[Callable[[oracle.Evidence], object], str, Callable[[Good], object]]] = [
    (oracle.acknowledged_jobs_exist, "is gone", lambda g: _lose(g, g.captions)),
    (oracle.acknowledged_jobs_exist, "is gone", lambda g: g.sql(f"DELETE FROM run_groups WHERE id = '{g.group}'")),
    (oracle.acknowledged_jobs_exist, "is gone", lambda g: g.sql("DELETE FROM datasets")),
    (oracle.one_final_state, "is running", lambda g: _job(g, status="running")),
    (oracle.one_final_state, "is paused", lambda g: _job(g, status="paused")),
    (oracle.one_final_state, "final ones", lambda g: _event(g, "job.failed", "error")),
    (oracle.one_final_state, "events end with", lambda g: _event(g, "training.epoch")),
    (oracle.one_final_state, "finished_at None", lambda g: _job(g, finished_at=None)),
    (oracle.final_states_stay, "was seen", lambda g: g.journal.add("seen", id=g.captions, state="cancelled")),
    (oracle.events_have_no_gap, "event numbers", lambda g: g.sql("DELETE FROM job_events WHERE seq = 2")),
    (oracle.events_have_no_gap, "counter", lambda g: _job(g, event_seq=9)),
    (oracle.streams_had_every_event_once, "gave the events", lambda g: _stream(g, [1, 3], "succeeded")),
    (oracle.streams_had_every_event_once, "gave the events", lambda g: _stream(g, [1, 2, 2, 3], "succeeded")),
    (oracle.streams_had_every_event_once, "2 of 3 events", lambda g: _stream(g, [1, 2], "succeeded")),
    (oracle.streams_had_every_event_once, "never came to its end", lambda g: _stream(g, [1, 2], None)),
    (oracle.attempts_are_bounded, "started 1 times", lambda g: _job(g, attempt=2)),
    (oracle.attempts_are_bounded, "failures in a row", lambda g: _job(g, failures=4)),
    (oracle.failures_have_a_cause, "failed after 1 failures", lambda g: _job(g, status="failed", failures=1)),
    (oracle.failures_have_a_cause, "has an error", lambda g: _job(g, error={"code": "x"})),
    (
        oracle.failures_have_a_cause,
        "was to be expected",
        lambda g: _asked(g, "caption", g.captions, fails=["no_images"]),
    ),
    (oracle.requests_made_one_resource, "was acknowledged as", lambda g: _repeat(g, g.captions)),
    (oracle.requests_made_one_resource, "the database has None", lambda g: g.sql("DELETE FROM idempotency_keys")),
    (oracle.requests_made_one_resource, "nobody asked for", lambda g: _life(g.core, add_job(g.core), "cancelled")),
    (oracle.requests_made_one_resource, "has 2 runs", lambda g: _member(g)),
    (oracle.cancelled_has_no_result, "has a result", lambda g: _job(g, status="cancelled")),
    (oracle.cancelled_has_no_result, "has a result", lambda g: change_job(g.core, g.run, status="failed", result=None)),
    (oracle.cancelled_has_no_result, "request pending", lambda g: _job(g, pause_requested=True)),
    (oracle.images_are_what_was_sent, "1 images of 2", lambda g: g.sql("DELETE FROM images WHERE class_name = 'cat'")),
    (oracle.images_are_what_was_sent, "2 images of 2", lambda g: g.sql("UPDATE images SET path = path || 'x'")),
    (oracle.images_are_what_was_sent, "files refused", lambda g: g.sql("UPDATE datasets SET report = '{}'")),
    (oracle.images_are_what_was_sent, "its counts", lambda g: g.sql("UPDATE datasets SET counts = '{}'")),
    (oracle.captions_are_complete_and_once, "1 captions of 2", lambda g: _one_caption_less(g)),
    (oracle.captions_are_complete_and_once, "or twice", lambda g: _one_caption_twice(g)),
    (oracle.captions_are_complete_and_once, "says", lambda g: _job(g, result={"captions": 1, "failed": 1})),
    (oracle.captions_are_complete_and_once, "with the key", lambda g: _twice(g, "captions", id="txt_again")),
    (oracle.runs_made_one_classifier_and_its_scores, "classifiers []", lambda g: g.sql("DELETE FROM classifiers")),
    (oracle.runs_made_one_classifier_and_its_scores, "evaluation does not", lambda g: _run(g, evaluation_id="no")),
    (oracle.runs_made_one_classifier_and_its_scores, "checkpoints", lambda g: add_checkpoint(g.core, g.run)),
    (oracle.scores_stand_once, "2 evaluations of", lambda g: _twice(g, "evaluations", id=g.run)),
    (oracle.scores_stand_once, "no evaluation of", lambda g: g.sql("DELETE FROM evaluations")),
    (
        oracle.scores_stand_once,
        "its result says",
        lambda g: g.sql("UPDATE scores SET value = 0.1 WHERE metric = 'top1'"),
    ),
    (oracle.weights_are_those_of_an_undisturbed_run, "differ", lambda g: g.head.write_bytes(b"another head")),
    (oracle.weights_are_those_of_an_undisturbed_run, "cannot be loaded", lambda g: g.head.unlink()),
    (oracle.deleted_leaves_nothing, "2 rows in images", _deleted),
    (oracle.queue_holds_nothing, "waiting", lambda g: g.core.queue.enqueue("caption", g.captions)),
    (oracle.store_has_what_is_referenced, "has lost blobs", lambda g: _file(g, _blob(g), None)),
    (
        oracle.store_has_what_is_referenced,
        "has lost predictions",
        lambda g: shutil.rmtree(Path(g.core.store.root, "predictions")),
    ),
    (oracle.store_has_what_is_referenced, "other bytes", lambda g: _file(g, _blob(g), b"torn")),
    (oracle.store_has_no_orphans, "1 files", lambda g: _file(g, "training/ft_x-1-3/state.pt", b"left")),
    (
        oracle.answers_were_no_server_errors,
        "answered 500",
        lambda g: g.journal.add("server_error", path="GET /", status=500, body=""),
    ),
]


def _stream(good: Good, seqs: list[int], done: str | None) -> None:
    good.journal.add("stream", id=good.captions, seqs=seqs, done=done)


def _member(good: Good) -> None:
    _life(good.core, add_job(good.core, "fine_tune", dataset_id=good.dataset, group_id=good.group), "cancelled")


def _run(good: Good, **result: object) -> None:
    change_job(good.core, good.run, result={"classifier_id": good.classifier, **result})


def _one_caption_less(good: Good) -> None:
    good.sql("DELETE FROM captions WHERE id = (SELECT min(id) FROM captions)")


def _one_caption_twice(good: Good) -> None:
    with good.core.db.transaction() as session:
        first, other = session.query(oracle.Image).order_by(oracle.Image.id).all()
    good.sql(f"UPDATE captions SET image_id = '{first.id}', key = 'other' WHERE image_id = '{other.id}'")


@pytest.mark.parametrize(("rule", "words", "damage"), BREAK, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_broken_is_found(
    good: Good, rule: Callable[[oracle.Evidence], object], words: str, damage: Callable[[Good], object]
) -> None:
    damage(good)
    found = [finding for finding in good.findings() if finding.startswith(f"{rule.__name__}:")]
    assert any(words in finding for finding in found), good.findings()


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _, _ in BREAK} == {*oracle.RULES, oracle.store_has_no_orphans}


def test_the_journal_reads_what_it_wrote(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add("sent", key="k", kind="caption", expect={}, body={})
    journal.add("acknowledged", key="k", id="cap_1", status=202)
    read = Journal.read(tmp_path / "journal.jsonl")  # while it is still open
    assert read.entries == journal.entries
    assert read.acknowledged()["cap_1"].key == "k"
    assert set(FINAL) == {"succeeded", "failed", "cancelled"}
