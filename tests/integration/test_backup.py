"""`captune backup` and `captune restore` between two state directories, each with servers of its own."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from captune.cli import main
from services.embedded.backup import DUMP, MANIFEST, STORE, backup, restore
from services.embedded.servers import Server, start_postgres, start_valkey
from shared.config import CoreSettings
from shared.core import Core
from shared.db.migrate import migrate
from shared.db.models import Checkpoint, Classifier, Dataset, Image, Job
from shared.errors import Conflict, InvalidInput, NotFound, Unavailable
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.reconciler import recover_lapsed, requeue_forgotten
from shared.jobs.worker import Runner
from shared.store.check import check
from shared.store.collector import Retention, collect
from shared.web.api import create_api
from shared.web.auth import create_key
from tests.integration.conftest import ROUTERS
from tests.integration.factories import (
    LONG_AGO,
    add_caption,
    add_checkpoint,
    add_classifier,
    add_dataset,
    add_job,
    archive,
    caption_request,
    image_row,
    png,
    read_job,
    types_of,
)
from tests.integration.support import client


def quiet(_: str) -> None:
    pass


def core_of(state_dir: Path, postgres: Server, redis_url: str = "unix:///nonexistent") -> Core:
    settings = CoreSettings(database_url=postgres.url, redis_url=redis_url, storage_url=f"file://{state_dir}/store")
    return Core.from_settings(settings, pool_size=5)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory whose PostgreSQL runs, as under `captune up`."""
    state_dir = tmp_path_factory.mktemp("one") / "state"
    postgres = start_postgres(state_dir)
    core = core_of(state_dir, postgres)
    migrate(core.db)
    core.close()
    yield state_dir
    postgres.stop()


@pytest.fixture
def core(one: Path) -> Iterator[Core]:
    url = f"postgresql+psycopg://captune@/postgres?host={one / 'postgres'}"
    core = Core.from_settings(
        CoreSettings(database_url=url, redis_url="unix:///nonexistent", storage_url=f"file://{one}/store"), pool_size=5
    )
    yield core
    core.close()


def fill(core: Core) -> dict[str, str]:
    """A data set, captions, a scored classifier; jobs that wait and one that is at work."""
    dataset = add_dataset(core, images=3)
    captioned = add_job(core, "caption", request=caption_request(dataset), dataset_id=dataset, status="succeeded")
    with core.transaction() as session:
        images = session.scalars(select(Image).where(Image.dataset_id == dataset)).all()
    for image in images:
        add_caption(core, image, captioned, f"a soft coat “{image.path}” ☂")
    classifier = add_classifier(core, dataset, {"top1": 0.75, "macro_f1": 0.5}, correct=[True, False, True])
    add_classifier(core, dataset, {"top1": 0.25})
    key = f"classifiers/{classifier}/0"
    core.store.put_bytes(f"{key}/weights", b"w" * 1000)
    waiting = new_id("ds")
    core.store.put_bytes(f"uploads/{waiting}", archive())
    fields: dict[str, Any] = {"name": "more", "domain": "pets", "split_seed": 0}
    with core.transaction() as session:
        session.get_one(Classifier, classifier).storage_key = key
        for row in session.scalars(select(Classifier).where(Classifier.id != classifier)):
            row.storage_key = key
        ledger.create(session, id=waiting, kind="ingest", owner="anna", request=fields, dataset_id=waiting)
        fields |= {"val_fraction": 0.1, "test_fraction": 0.2, "archive_sha256": "0", "archive_bytes": 1}
        session.add(Dataset(id=waiting, owner="anna", archive_key=f"uploads/{waiting}", **fields))
        _, secret = create_key(session, owner="anna", name="test", scopes=("read", "write"))
        for evaluation in session.scalars(select(Job).where(Job.kind == "evaluate")):
            core.store.put_bytes(evaluation.id, b"predictions")
    tuning = add_job(core, "fine_tune", status="running", attempt=1, lease_until=LONG_AGO, dataset_id=dataset)
    add_checkpoint(core, tuning, 1, "resume", f"training/{tuning}-1-1")
    core.store.put_bytes(f"training/{tuning}-1-1/state", b"s" * 1000)
    return {"dataset": dataset, "captioned": captioned, "waiting": waiting, "tuning": tuning, "secret": secret}


def churn(core: Core, tuning: str, stop: threading.Event) -> int:
    """What jobs do meanwhile: a training state takes the place of the one before, data sets come and go."""
    step = 1
    while not stop.is_set():
        step += 1
        key = f"training/{tuning}-1-{step}"
        core.store.put_bytes(f"{key}/state", b"s" * 1000)
        with core.transaction() as session:
            ledger.drop_saved_states(session, tuning)
            row = {"job_id": tuning, "kind": "resume", "step": step, "epoch": 1, "storage_key": key, "metrics": {}}
            session.add(Checkpoint(id=new_id("ckpt"), **row))
        dataset = add_dataset(core, owner="ben")
        core.store.put_bytes(f"uploads/{dataset}", b"zip")
        with core.transaction() as session:
            session.add(image_row(core, dataset, "ben", step % 50))
        with core.transaction() as session:
            session.delete(session.get_one(Dataset, dataset))
            session.info["obsolete"] = [f"uploads/{dataset}"]
        try:
            collect(core, Retention(unreferenced=-1))
        except Conflict as busy:
            if busy.code != "backup":
                raise
    return step


def answers(core: Core, made: dict[str, str]) -> list[Any]:
    """What a user sees, with a key that was made before the backup."""
    http = client(create_api("Captune", core, ROUTERS), made["secret"])
    paths = [
        f"/v1/leaderboard?dataset_id={made['dataset']}",
        f"/v1/datasets/{made['dataset']}/captions?limit=100",
        f"/v1/datasets/{made['dataset']}/images?limit=100",
        f"/v1/caption_jobs/{made['captioned']}",
        f"/v1/caption_jobs/{made['captioned']}/events",
    ]
    found = [http.get(path) for path in paths]
    assert [answer.status_code for answer in found] == [200] * len(paths), [answer.text for answer in found]
    assert found[0].json()["rows"]
    assert len(found[1].json()["data"]) == 6
    return [answer.json() for answer in found]


def test_a_backup_made_while_jobs_run_is_restored_elsewhere_and_goes_on(
    one: Path, core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("DATABASE_URL", "STORAGE_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    made = fill(core)
    before = answers(core, made)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn, core, made["tuning"], stop)
        stop.wait(0.5)
        with pytest.raises(SystemExit) as done:
            main(["backup", str(tmp_path / "backup"), "--state-dir", str(one)])
        stop.set()
        assert churning.result() > 3
    assert done.value.code == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "backup" / MANIFEST).read_text())
    assert manifest["rows"]["captions"] == 6
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700

    two = tmp_path / "two"
    with pytest.raises(SystemExit) as done:
        main(["restore", str(tmp_path / "backup"), "--state-dir", str(two)])
    assert done.value.code == 0, capsys.readouterr().err
    assert "all there and whole" in capsys.readouterr().out
    postgres, valkey = start_postgres(two), start_valkey(two)
    restored = core_of(two, postgres, valkey.url)
    restored.settings.requeue_after_seconds = 0
    try:
        assert answers(restored, made) == before
        assert list(check(restored)) == []
        assert recover_lapsed(restored) == 1  # who worked on it is not here
        assert requeue_forgotten(restored) >= 1
        assert restored.queue.waiting("ingest") == {made["waiting"]}
        assert restored.queue.waiting("fine_tune") == {made["tuning"]}
        Runner(restored, "ingest", "test").run(made["waiting"])
        assert read_job(restored, made["waiting"]).status == "succeeded"
        assert types_of(restored, made["waiting"])[0] == "job.created"
        with restored.transaction() as session:
            state = session.scalars(select(Checkpoint).where(Checkpoint.job_id == made["tuning"])).one()
        with restored.store.local_folder(state.storage_key) as folder:
            assert (folder / "state").read_bytes() == b"s" * 1000
    finally:
        restored.close()
        valkey.stop()
        postgres.stop()


def test_what_is_damaged_is_found_by_restoring_it(one: Path, core: Core, tmp_path: Path) -> None:
    dataset = add_dataset(core)
    with core.transaction() as session:
        images = [image_row(core, dataset, "anna", 100 + i) for i in range(2)]
        session.add_all(images)
    backup(one, tmp_path / "backup", quiet)
    lost, changed = (core.store.blob_key(image.sha256) for image in images)
    (tmp_path / "backup" / STORE / lost).unlink()
    (tmp_path / "backup" / STORE / changed).write_bytes(png(7))
    manifest = json.loads((tmp_path / "backup" / MANIFEST).read_text())
    manifest["rows"]["images"] += 1
    (tmp_path / "backup" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Unavailable) as damaged:
        restore(tmp_path / "backup", tmp_path / "two", quiet)
    rows = manifest["rows"]["images"]
    for words in (f"missing: {lost}", f"damaged: {changed}", f"images: {rows - 1} rows, not {rows}"):
        assert words in damaged.value.message


def test_neither_writes_over_what_is_there(one: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(Conflict, match="is not empty"):
        backup(one, full, quiet)
    backup(one, tmp_path / "backup", quiet)
    with pytest.raises(Conflict, match="is not empty"):
        restore(tmp_path / "backup", full, quiet)
    with pytest.raises(Conflict, match="is not empty"):
        restore(tmp_path / "backup", one, quiet)
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_half_a_backup_is_none(one: Path, tmp_path: Path) -> None:
    backup(one, tmp_path / "backup", quiet)
    (tmp_path / "backup" / MANIFEST).unlink()
    with pytest.raises(InvalidInput, match="was not finished"):
        restore(tmp_path / "backup", tmp_path / "two", quiet)
    with pytest.raises(InvalidInput, match="is no backup"):
        restore(tmp_path, tmp_path / "two", quiet)
    with pytest.raises(NotFound, match="no Captune data"):
        backup(tmp_path / "nothing", tmp_path / "another", quiet)
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / "another").exists()


def test_a_dump_that_is_cut_off_restores_nothing(one: Path, tmp_path: Path) -> None:
    backup(one, tmp_path / "backup", quiet)
    dump = tmp_path / "backup" / DUMP
    dump.write_bytes(dump.read_bytes()[: dump.stat().st_size // 2])
    with pytest.raises(Unavailable, match="pg_restore failed"):
        restore(tmp_path / "backup", tmp_path / "two", quiet)
    shutil.rmtree(tmp_path / "two")


def test_collect_works_on_a_running_stack(
    one: Path, core: Core, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTUNE_KEEP_UNREFERENCED_SECONDS", "3600")
    core.store.put_bytes("notes.txt", b"?")
    with pytest.raises(SystemExit) as done:
        main(["collect", "--dry-run", "--state-dir", str(one)])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "would go" in printed
    assert "unknown, left alone: notes.txt" in printed


def test_a_backup_that_deletions_may_have_reached_is_not_finished(one: Path, core: Core, tmp_path: Path) -> None:
    """The connection that held them back is lost: as when PostgreSQL is restarted."""

    def lose(what: str) -> None:
        if what == "copying the store":
            with core.transaction() as session:
                session.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                        " AND backend_type = 'client backend'"
                    )
                )

    with pytest.raises(Conflict, match="begin the copy again"):
        backup(one, tmp_path / "backup", lose)
    assert (tmp_path / "backup" / DUMP).exists()
    with pytest.raises(InvalidInput, match="was not finished"):
        restore(tmp_path / "backup", tmp_path / "two", quiet)


def test_a_backup_with_a_link_in_it_is_refused(one: Path, tmp_path: Path) -> None:
    backup(one, tmp_path / "backup", quiet)
    (tmp_path / "backup" / STORE / "blobs").mkdir(parents=True, exist_ok=True)
    (tmp_path / "backup" / STORE / "blobs" / "host").symlink_to("/etc/hostname")
    with pytest.raises(InvalidInput, match="is a link") as refused:
        restore(tmp_path / "backup", tmp_path / "two", quiet)
    assert refused.value.code == "backup_altered"
    assert not (tmp_path / "two").exists()
