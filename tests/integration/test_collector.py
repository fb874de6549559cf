import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import delete, func, select, update

from services.captioner import ingest
from shared.core import Core
from shared.db.models import Classifier, Dataset, Evaluation, IdempotencyKey, Image, Job, JobEvent
from shared.errors import Conflict, Unavailable
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.worker import Runner
from shared.store.check import check
from shared.store.collector import Collected, Retention, collect
from shared.store.disk import DiskStore
from shared.store.opening import open_store
from shared.store.references import COLLECTING, keep, may_delete, nothing_deleted
from shared.store.storage import Store
from tests.integration.factories import (
    LONG_AGO,
    add_checkpoint,
    add_classifier,
    add_dataset,
    add_job,
    archive,
    change_job,
    events_of,
    image_row,
    png,
    read_job,
    types_of,
)
from tests.integration.support import Api, wait_for

AT_ONCE = Retention(unreferenced=-1)  # everything is old enough
DAY = 86_400.0


@pytest.fixture
def here(core: Core, tmp_path: Path) -> Core:
    """The empty database with an empty store of its own."""
    return Core(core.settings, core.db, core.queue, DiskStore(tmp_path / "store"))


@pytest.fixture(params=["file", "s3"])
def anywhere(request: pytest.FixtureRequest, here: Core) -> Core:
    """On a disk, and on an object store."""
    if request.param == "file":
        return here
    return Core(here.settings, here.db, here.queue, open_store(request.getfixturevalue("s3").url()))


def removed(found: Collected) -> dict[str, int]:
    return {kind: each.number for kind, each in found.removed.items() if each.number}


def put_folder(store: Store, key: str, tmp_path: Path) -> None:
    source = tmp_path / f"source-{uuid4().hex}"
    source.mkdir()
    (source / "weights").write_bytes(b"w" * 1000)
    (source / "config").write_bytes(b"c" * 10)
    store.put_folder(key, source)


def test_what_no_row_names_goes_and_what_a_row_names_stays(anywhere: Core, tmp_path: Path) -> None:
    core, store = anywhere, anywhere.store
    dataset = add_dataset(core, images=2)
    store.put_bytes(f"uploads/{dataset}", b"archive")
    running = add_job(core, "fine_tune", status="running", attempt=3)
    imported = add_job(core, "caption", status="paused", request={"upload_key": "uploads/cap_paused"})
    store.put_bytes("uploads/cap_paused", b"captions")
    classifier = add_classifier(core, dataset, {"top1": 0.5})
    with core.transaction() as session:
        row = session.get_one(Classifier, classifier)
        row.storage_key = f"classifiers/{row.job_id}/1"
        evaluation = session.scalars(select(Evaluation)).one()
        evaluation.predictions_key = f"predictions/{evaluation.id}-1.parquet"
        session.flush()
        needed = [row.storage_key, evaluation.predictions_key]
        tuned = str(row.job_id)
    add_checkpoint(core, tuned, 9, "last", f"classifiers/{tuned}/1-last")
    add_checkpoint(core, running, 5, "resume", f"training/{running}-2-5")
    needed += [f"classifiers/{tuned}/1-last", f"training/{running}-2-5"]
    # Written by the attempt that runs, and not named yet.
    needed += [f"training/{running}-3-7", f"classifiers/{running}/3", f"predictions/{running}-3.parquet"]
    for key in needed:
        put_folder(store, key, tmp_path) if not key.endswith("parquet") else store.put_bytes(key, b"p")
    needed += [f"uploads/{dataset}", "uploads/cap_paused"]

    orphan = store.put_blob(b"nobody's")
    done = add_job(core, "caption", status="succeeded", request={"upload_key": "uploads/cap_done"})
    lost = [store.blob_key(orphan), "uploads/ds_gone", "uploads/cap_done", f"health/{uuid4().hex}"]
    lost += [f"predictions/{running}-2.parquet", f"classifiers/{done}/1/config", f"classifiers/{running}/2/config"]
    lost += [f"training/{running}-1-7/state", "training/ft_deleted-1-1/state"]
    for key in lost:
        store.put_bytes(key, b"x" * 10)
    expected = {"blobs": 1, "uploads": 2, "health": 1, "predictions": 1, "classifiers": 2, "training": 2}

    would = collect(core, AT_ONCE, dry_run=True)
    assert removed(would) == expected
    assert not store.missing(lost), "a dry run removes nothing"
    found = collect(core, AT_ONCE)
    assert removed(found) == expected
    assert found.removed == would.removed
    assert found.removed["uploads"].bytes == 20
    assert store.missing(lost) == lost
    assert not store.missing(needed)
    assert list(check(core)) == []
    assert removed(collect(core, AT_ONCE)) == {}
    assert read_job(core, imported).status == "paused"


def test_the_young_and_the_unknown_are_left_alone(here: Core) -> None:
    store, root = here.store, Path(here.store.root)
    old, young = store.blob_key(store.put_blob(b"old")), store.blob_key(store.put_blob(b"young"))
    again = store.blob_key(store.put_blob(b"again"))
    writing, left = root / "blobs/ab/x.part", root / "training/ft_1-1-1.0.part"
    writing.parent.mkdir(exist_ok=True)
    writing.write_bytes(b"half")
    left.mkdir(parents=True)
    (left / "state").write_bytes(b"half")
    for name in ("notes.txt", "uploads/README", "classifiers/x/y", "exports/job/1"):
        store.put_bytes(name, b"?")
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    for key in (young, again):
        os.utime(root / key)
    os.utime(root / again, (1e9, 1e9))
    assert store.put_blob(b"again") == again.rpartition("/")[2]  # stored once more: young again
    assert removed(collect(here, Retention(), dry_run=True)) == {"blobs": 1, "unfinished writes": 2}
    found = collect(here, Retention())
    assert removed(found) == {"blobs": 1, "unfinished writes": 2}
    assert store.missing([old, young, again]) == [old]
    assert not writing.exists()
    assert not left.exists()
    assert sorted(found.unknown) == ["classifiers/x/y", "exports", "notes.txt", "uploads/README"]
    assert not store.missing(["notes.txt", "uploads/README", "classifiers/x/y", "exports/job/1"])
    assert "unknown, left alone: notes.txt" in found.table()
    assert [line.split()[-2:] for line in found.table().splitlines() if line.startswith("blobs")] == [["1", "3"]]


def test_an_archive_is_kept_until_its_ingestion_is_long_over(here: Core) -> None:
    ended, fresh, waiting = (add_dataset(here) for _ in range(3))
    change_job(here, ended, finished_at=LONG_AGO)
    change_job(here, waiting, status="queued", finished_at=None)
    with here.transaction() as session:
        session.execute(update(Job).where(Job.id == fresh).values(finished_at=func.now()))
    for id in (ended, fresh, waiting):
        here.store.put_bytes(f"uploads/{id}", b"zip")
    assert removed(collect(here, Retention(unreferenced=-1, archives=None))) == {}
    assert removed(collect(here, AT_ONCE)) == {"uploads": 1}
    assert here.store.missing([f"uploads/{id}" for id in (ended, fresh, waiting)]) == [f"uploads/{ended}"]


def test_events_of_a_job_go_all_or_not_at_all(here: Core) -> None:
    ended = [add_job(here, status="succeeded", finished_at=LONG_AGO) for _ in range(3)]
    recent = add_job(here, status="failed")
    live = add_job(here, status="paused", finished_at=LONG_AGO)
    with here.transaction() as session:
        session.execute(update(Job).where(Job.id == recent).values(finished_at=func.now() - timedelta(days=89)))
        for id in (*ended, live, recent):
            for i in range(3):
                ledger.add_event(session, id, "note", f"event {i}")
        session.execute(update(JobEvent).values(created_at=LONG_AGO))  # how old an event is does not matter
    found = collect(here, Retention())
    assert removed(found) == {"events": 12}
    assert found.removed["events"].bytes > 12 * 30
    assert [len(events_of(here, id)) for id in (*ended, recent, live)] == [0, 0, 0, 4, 4]
    assert types_of(here, recent)[0] == "job.created"
    assert all(read_job(here, id).status == "succeeded" for id in ended), "the job stays"


def test_idempotency_keys_expire(here: Core) -> None:
    with here.transaction() as session:
        for i in range(3):
            row = IdempotencyKey(owner="anna", key=f"k{i}", request_hash="h", resource_id="ds_1")
            if i:
                row.created_at = LONG_AGO
            session.add(row)
    assert removed(collect(here, Retention(), dry_run=True)) == {"idempotency keys": 2}
    assert removed(collect(here, Retention())) == {"idempotency keys": 2}
    with here.transaction() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["k0"]


def test_no_committed_row_ever_names_a_blob_that_is_gone(here: Core) -> None:
    """Writers store the same few blobs and name them, then forget them; collectors take whatever is not named."""
    dataset = add_dataset(here)
    bodies = [png(i) for i in range(4)]
    stop, gone, collected = threading.Event(), [], []

    def write(seed: int) -> tuple[int, int]:
        rng, rounds, again = random.Random(seed), 0, 0
        while not stop.is_set():
            rounds += 1
            row = {"id": new_id("img"), "owner": "anna", "dataset_id": dataset, "path": f"{seed}/{rounds}"}
            row |= {
                "class_name": "cat",
                "split": "train",
                "media_type": "image/png",
                "width": 1,
                "height": 1,
                "bytes": 1,
            }
            try:
                row["sha256"] = here.store.put_blob(rng.choice(bodies))
                key = here.store.blob_key(row["sha256"])
                stop.wait(rng.random() * 0.02)
                with here.transaction() as session:
                    session.add(Image(**row))
                    session.flush()
                    keep(session, here.store, [key])
                    stop.wait(rng.random() * 0.005)
            except Unavailable:
                again += 1
                continue
            stop.wait(rng.random() * 0.01)
            if here.store.missing([key]):
                gone.append(key)
            with here.transaction() as session:
                session.execute(delete(Image).where(Image.id == row["id"]))
        return rounds, again

    def take() -> None:
        while not stop.is_set():
            collected.append(collect(here, AT_ONCE).removed["blobs"].number)

    with ThreadPoolExecutor(5) as pool:
        writers = [pool.submit(write, seed) for seed in range(4)]
        collector = pool.submit(take)
        stop.wait(3.0)
        stop.set()
        counts = [each.result() for each in writers]
        collector.result()
    assert gone == []
    assert sum(collected) > 10
    assert sum(rounds for rounds, _ in counts) > 40
    assert sum(again for _, again in counts) > 0, "the race never happened"


def test_a_picture_collected_before_its_row_is_written_is_stored_again(
    here: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = new_id("ds")
    here.store.put_bytes(f"uploads/{id}", archive())
    fields = {"name": "pets", "domain": "pets", "split_seed": 0, "val_fraction": 0.1, "test_fraction": 0.2}
    with here.transaction() as session:
        ledger.create(session, id=id, kind="ingest", owner="anna", request=fields, dataset_id=id)
        fields |= {"archive_key": f"uploads/{id}", "archive_sha256": "0", "archive_bytes": 1}
        session.add(Dataset(id=id, owner="anna", **fields))
    taken: list[dict[str, int]] = []

    def too_late(*arguments: Any) -> None:
        if not taken:  # a day has passed
            taken.append(removed(collect(here, AT_ONCE)))
        keep(*arguments)

    monkeypatch.setattr(ingest, "keep", too_late)
    Runner(here, "ingest", "test").run(id)
    assert taken == [{"blobs": 12}]
    assert read_job(here, id).status == "queued"
    assert "trying again stores them again" in events_of(here, id)[-1].message
    change_job(here, id, run_after=None)
    Runner(here, "ingest", "test").run(id)
    assert read_job(here, id).status == "succeeded"
    assert list(check(here)) == []


def test_one_collector_works_at_a_time(here: Core) -> None:
    inside, leave = threading.Event(), threading.Event()

    def stopped() -> bool:
        inside.set()
        leave.wait(20)
        return True

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(collect, here, AT_ONCE, False, stopped)
        inside.wait(20)
        with pytest.raises(Conflict, match="another collector"):
            collect(here, AT_ONCE)
        leave.set()
        assert not first.result().complete
    assert collect(here, AT_ONCE).complete


def test_while_a_backup_is_made_nothing_that_was_named_goes(here: Core) -> None:
    orphan = here.store.blob_key(here.store.put_blob(b"orphan"))
    here.store.put_bytes("uploads/ds_1", b"zip")
    with nothing_deleted(here.db):
        with pytest.raises(Conflict, match="backup"):
            collect(here, AT_ONCE)
        with here.transaction() as session:
            session.info["obsolete"] = ["uploads/ds_1"]
        assert here.store.missing([orphan, "uploads/ds_1"]) == []
    assert removed(collect(here, AT_ONCE)) == {"blobs": 1, "uploads": 1}


def test_a_writer_that_does_not_come_to_an_end_holds_nobody_up_for_long(
    here: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.store.collector.LOCK", "100ms")
    here.store.put_blob(b"orphan")
    with here.transaction() as session:
        session.execute(select(func.pg_advisory_xact_lock_shared(COLLECTING)))
        found = collect(here, AT_ONCE)
    assert (found.postponed, removed(found)) == (1, {})
    assert removed(collect(here, AT_ONCE)) == {"blobs": 1}


def test_one_file_that_cannot_be_removed_does_not_stop_the_rest(here: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = here.store.blob_key(here.store.put_blob(b"stuck"))
    here.store.put_blob(b"orphan")
    remove = here.store.delete

    def refuse(*keys: str) -> None:
        if stuck in keys:
            raise PermissionError(1, "Operation not permitted")
        remove(*keys)

    monkeypatch.setattr(here.store, "delete", refuse)
    found = collect(here, AT_ONCE)
    assert (found.postponed, removed(found)) == (1, {"blobs": 1})


def test_data_held_aside_by_a_running_evaluation_cannot_be_deleted(api: Api, core: Core) -> None:
    scored, aside = add_dataset(core), add_dataset(core)
    job = add_job(core, "evaluate", dataset_id=scored, request={"held_aside_dataset_id": aside}, status="running")
    answer = api.anna.delete(f"/v1/datasets/{aside}")
    assert (answer.status_code, answer.json()["code"]) == (409, "in_use")
    change_job(core, job, status="succeeded")
    assert api.anna.delete(f"/v1/datasets/{aside}").status_code == 204


def test_check_names_what_is_missing_and_what_is_damaged(here: Core) -> None:
    dataset = add_dataset(here)
    with here.transaction() as session:
        images = [image_row(here, dataset, "anna", i) for i in range(3)]
        session.add_all(images)
    keys = [here.store.blob_key(image.sha256) for image in images]
    assert list(check(here)) == []
    here.store.delete(keys[0])
    here.store.put_bytes(keys[1], b"something else")
    assert sorted(check(here)) == [f"damaged: {keys[1]}", f"missing: {keys[0]}"]


@pytest.fixture
def program(here: Core, spawn: Callable[..., subprocess.Popen[bytes]]) -> Callable[..., subprocess.Popen[bytes]]:
    return lambda *words: spawn("shared.store.collector", *words, STORAGE_URL=f"file://{here.store.root}")


def test_the_program_runs_daily_and_stops_when_told(
    here: Core, program: Callable[..., subprocess.Popen[bytes]]
) -> None:
    old = here.store.blob_key(here.store.put_blob(b"old"))
    young = here.store.blob_key(here.store.put_blob(b"young"))
    os.utime(Path(here.store.root) / old, (1e9, 1e9))
    process = program()
    wait_for(lambda: here.store.missing([old]))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert here.store.missing([old, young]) == [old]


def test_the_program_holds_deletions_back_for_a_backup_by_hand(
    here: Core, program: Callable[..., subprocess.Popen[bytes]]
) -> None:
    here.store.put_blob(b"orphan")

    def held() -> bool:
        with here.db.transaction() as session:
            return not may_delete(session)

    process = program("hold")
    wait_for(held)
    with pytest.raises(Conflict, match="backup"):
        collect(here, AT_ONCE)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert removed(collect(here, AT_ONCE)) == {"blobs": 1}
