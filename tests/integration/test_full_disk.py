"""What a full or failing disk looks like from outside."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from shared.core import Core
from shared.db.models import Dataset, Job
from shared.errors import StorageFull
from shared.jobs.worker import Runner
from shared.store.disk import DiskStore
from tests.integration.factories import archive, change_job, events_of, read_job
from tests.integration.support import Api

Failing = Callable[[str, int], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """`failing("shared.store.disk.os.fsync", errno.ENOSPC)`"""

    def fail(where: str, number: int) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number), "/a/path/of/the/server")

        monkeypatch.setattr(where, refuse)

    return fail


def upload(api: Api) -> Any:
    form = {"name": "pets", "domain": "pets"}
    return api.anna.post("/v1/datasets", data=form, files={"file": ("pets.zip", archive())})


@pytest.mark.parametrize(
    ("where", "number", "status", "code"),
    [
        ("shared.store.disk.os.fsync", errno.ENOSPC, 507, "storage_full"),
        ("shared.store.disk.os.replace", errno.EDQUOT, 507, "storage_full"),
        ("shared.store.disk.os.fsync", errno.EROFS, 503, "storage_failed"),
        ("shared.store.disk.os.replace", errno.EIO, 503, "storage_failed"),
        ("starlette.datastructures.UploadFile.write", errno.ENOSPC, 507, "storage_full"),  # the form, on its way in
        ("services.captioner.routes.datasets.sniff", errno.ENOSPC, 507, "storage_full"),  # anywhere else
    ],
)
def test_an_upload_that_cannot_be_stored_says_why_and_leaves_nothing(
    api: Api, core: Core, failing: Failing, where: str, number: int, status: int, code: str
) -> None:
    failing(where, number)
    answer = upload(api)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert int(answer.headers["Retry-After"]) > 0
    assert "try again" in answer.json()["detail"]
    assert "/a/path" not in answer.text
    with core.transaction() as session:
        assert session.scalar(select(func.count()).select_from(Dataset)) == 0
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_a_job_waits_for_room_and_goes_on(
    api: Api, core: Core, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = upload(api).json()["id"]
    with monkeypatch.context() as full:
        full.setattr("shared.store.disk.sync_all", _full)
        Runner(core, "ingest", "test").run(id)
    job = read_job(core, id)
    assert (job.status, job.failures, job.error) == ("queued", 1, None)
    assert "disk is full" in events_of(core, id)[-1].message
    change_job(core, id, run_after=None)
    Runner(core, "ingest", "test").run(id)
    assert read_job(core, id).status == "succeeded"


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["shutil.copyfile", "shared.store.disk.os.fsync", "shared.store.disk.os.replace"])
def test_a_folder_that_does_not_fit_says_so(tmp_path: Path, failing: Failing, where: str) -> None:
    """`shutil.copytree` gathers its errors as text."""
    store, source = DiskStore(tmp_path / "store"), tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(b"w")
    failing(where, errno.ENOSPC)
    with pytest.raises(StorageFull):
        store.put_folder("classifiers/ft_1/1", source)
    assert list(Path(store.root).glob("classifiers/ft_1/*")) == []
