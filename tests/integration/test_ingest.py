"""The ingest job: what it makes of an archive in one go, it makes in several, and its SQL does what the functions on
lists say."""

import io
import random
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from services.captioner import ingest as module
from services.captioner import placing
from shared.core import Core
from shared.datasets.archive import open_archive
from shared.datasets.checks import fingerprint
from shared.datasets.classes import Split
from shared.datasets.images import inspect
from shared.datasets.limits import Limits
from shared.datasets.splits import Labelled
from shared.db.models import Dataset, Image, Job
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.claim import Claim
from shared.jobs.worker import Runner
from shared.store.disk import DiskStore
from tests.integration.factories import add_dataset, archive, png
from tests.on_lists import assign, check_classes


def submitted(core: Core, content: bytes, **columns: Any) -> str:
    id = new_id("ds")
    core.store.put_file(f"uploads/{id}", io.BytesIO(content))
    values = {"name": "pets", "domain": "pets", "archive_key": f"uploads/{id}", "archive_sha256": "0" * 64}
    draw = {"split_seed": 3, "val_fraction": 0.2, "test_fraction": 0.3}
    with core.transaction() as session:
        ledger.create(session, id=id, kind="ingest", owner="anna", request={}, dataset_id=id)
        session.add(Dataset(id=id, owner="anna", archive_bytes=len(content), **values | draw | columns))
    return id


def run(core: Core, id: str) -> tuple[Job, Dataset]:
    with core.transaction() as session:
        session.execute(update(Job).where(Job.id == id).values(run_after=None))
    Runner(core, "ingest", "test").run(id)
    with core.transaction() as session:
        return session.get_one(Job, id), session.get_one(Dataset, id)


def images(core: Core, id: str) -> list[tuple[str, str, str, str]]:
    query = select(Image.path, Image.class_name, Image.split, Image.sha256).where(Image.dataset_id == id)
    with core.transaction() as session:
        return sorted(tuple(row) for row in session.execute(query))  # type: ignore[misc]


def result(core: Core, id: str) -> Any:
    job, dataset = run(core, id)
    assert job.status == "succeeded", job.error
    return images(core, id), dataset.classes, dataset.counts, dataset.report, dataset.fingerprint


def failing(times: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Works so many times, then never again."""
    calls = iter(range(times))

    def called(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise OSError("the disk went away")
        return function(*arguments)

    return called


@pytest.mark.parametrize("stored", [0, 1, 3])
def test_an_attempt_goes_on_where_the_one_before_broke_off(
    core: Core, monkeypatch: pytest.MonkeyPatch, stored: int
) -> None:
    content = archive(("cat", "dog", "emu"), 8)
    expected = result(core, submitted(core, content))
    monkeypatch.setattr(module, "CHUNK", 5)
    id = submitted(core, content)
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "put_blobs", failing(stored, DiskStore.put_blobs))
        assert run(core, id)[0].status == "queued"
    assert len(images(core, id)) == stored * 5
    looked_at: list[bytes] = []

    def counted(data: bytes) -> Any:
        looked_at.append(data)
        return inspect(data)

    monkeypatch.setattr(module, "inspect", counted)
    assert result(core, id) == expected
    assert len(looked_at) == 24 - stored * 5


def test_a_draw_that_broke_off_begins_anew(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive(("cat", "dog", "emu"), 20)
    expected = result(core, submitted(core, content))
    id = submitted(core, content)
    monkeypatch.setattr(placing, "_WRITTEN", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "check", failing(60 + 3, Claim.check))  # each image, then each commit of the draw
        assert run(core, id)[0].status == "queued"
    drawn = Counter(split for _, _, split, _ in images(core, id))
    assert 0 < 60 - drawn["train"] < 30, "half drawn"
    assert result(core, id) == expected


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archived:
        for name, data in files.items():
            archived.writestr(name, data)
    return out.getvalue()


def test_refusals_are_reported_in_archive_order_and_stop_nothing(core: Core) -> None:
    files = {f"{'cat' if n % 2 else 'dog'}/{n:03d}.png": png(n) if n % 3 else b"broken" for n in range(90)}
    job, dataset = run(core, submitted(core, packed(files)))
    assert job.result == {"images": 60, "refused": 30}
    assert dataset.report is not None
    assert [each["path"] for each in dataset.report["refusals"]] == list(files)[::3]


def test_what_stands_before_the_damage_is_reported(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"cat/{n}.png": b"broken" for n in range(5)} | {"dog/1.png": b"x" * 1000, "dog/2.png": png()}
    monkeypatch.setattr(module, "open_archive", partial(open_archive, limits=Limits(max_total_bytes=500)))
    job, dataset = run(core, submitted(core, packed(files)))
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "archive_too_large"
    assert dataset.report is not None
    assert [each["path"] for each in dataset.report["refusals"]] == list(files)[:5]


@pytest.mark.parametrize("seed", range(12))
def test_placing_does_what_the_functions_on_lists_do(core: Core, seed: int) -> None:
    random_ = random.Random(seed)
    names = random_.sample(["cat", "Dog", "dög", "日本", "a b", "Z"], random_.randint(2, 6))
    explicit: list[Split | None] = random_.choice([[None], [None, "train", "val"], [None, "test"]])
    given = [
        Labelled(
            f"{name}/{n}{random_.choice('aZé日')}.jpg", name, random_.choice(explicit), f"{random_.randrange(60):064x}"
        )
        for name in names
        for n in range(random_.randint(1, 25))
    ] + [Labelled(f"{name}/train.jpg", name, "train", f"{number:064x}") for number, name in enumerate(names)]
    given.sort(key=lambda image: image.path)
    splits = assign(given, seed, 0.2, 0.3)
    final = [Labelled(i.path, i.class_name, split, i.sha256) for i, split in zip(given, splits, strict=True)]

    id = add_dataset(core, status="queued", split_seed=seed, val_fraction=0.2, test_fraction=0.3)
    rest = {"owner": "anna", "dataset_id": id, "media_type": "image/png", "width": 1, "height": 1, "bytes": 1}
    rows = [
        {"path": i.path, "class_name": i.class_name, "split": i.split or "train", "sha256": i.sha256} for i in given
    ]
    random_.shuffle(rows)
    with core.transaction() as session:
        session.execute(insert(Image), [{"id": new_id("img")} | row | rest for row in rows])
        job = ledger.claim(session, id, "ingest", "test", 30)
        dataset = session.get_one(Dataset, id)
    assert job is not None
    placed = placing.place(Claim(core, job, threading.Event()), dataset, [*names, "gone"])

    assert images(core, id) == [(i.path, i.class_name, i.split, i.sha256) for i in final]
    assert placed.notices == check_classes(final, [*names, "gone"])
    assert placed.fingerprint == fingerprint((i.path, i.sha256, i.class_name, i.split or "train") for i in final)
    tally = Counter((i.split, i.class_name) for i in final)
    assert {(s, c): n for s, counts in placed.counts.items() for c, n in counts.items()} == dict(tally)
    assert list(placed.counts) == ["train", "val", "test"]
