"""What a caption job costs beside its model: a null engine in the process, everything else as it is.

    python benchmarks/caption_ledger.py [--images 20000]

A real PostgreSQL and Valkey, the real job through the real runner, three characteristics. The image rows share a few
blobs in the store and differ in their hashes, so that every caption is asked for. Runs a job over a tenth of the images
and one over all of them, then the second once more: what exists already is only taken over. Of each: the rate of
captioning (read, prompt, inspect, commit), the seconds of the pass over all captions that finds duplicates, and this
process's peak resident memory after either. Memory must not grow with the images while captioning; the pass keeps
something of each caption. A table, then one JSON line. The target is 3,000 captions/s."""

import argparse
import json
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

from sqlalchemy import text

from captune.tables import table
from services.captioner.captioning import job as caption_job
from services.captioner.captioning.remote import Reply
from services.captioner.quality.passes import mark_duplicates
from services.captioner.settings import CaptionWorkerSettings
from services.embedded.servers import start_postgres, start_valkey
from shared.config import CoreSettings
from shared.core import Core
from shared.db.migrate import migrate
from shared.db.models import Dataset, Job
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs import worker as job_worker
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish, Runner
from shared.schemas.captions import CaptionJobRequest
from shared.store.disk import DiskStore
from shared.store.storage import Store

CLASSES, BLOBS, TARGET = 100, 8, 3000
SETTINGS = CaptionWorkerSettings(captioner_url="null", service_token="null")
TEXT = """soft round bright striped pointed woven grey amber small heavy narrow glossy folded spotted curved long thin
pale dark rough smooth broad short fine thick sharp deep warm cool light dense loose neat plain rich clear ears tail fur
eyes legs nose back side neck head paws wings beak feathers coat chest grass stone water wood sand snow leaves sky wall
with and near under over beside between"""
WORDS = TEXT.split()


class NullCaptioner:
    """Answers at once; no two answers alike."""

    def __init__(self, _: CaptionWorkerSettings) -> None:
        self._random = Random(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def model(self, name: str) -> dict[str, Any]:
        return {"engine": "null", "revision": "null-1", "precision": "none", "ready": True}

    async def caption(self, model: str, revision: str, picture: bytes, prompt: str, **options: Any) -> Reply:
        return Reply(f"The animal has a {' '.join(self._random.choices(WORDS, k=40))}.", "stop", 300, 60, 0.1)


class FewBlobs(DiskStore):
    """Every digest leads to one of a few objects."""

    def read_blob(self, digest: str) -> bytes:
        return super().read_blob(f"{int(digest[-2:], 16) % BLOBS:064x}")


@dataclass
class Clock:
    """Seconds and peak MiB of the last job's two stages."""

    began: float = 0.0
    captioning: float = 0.0
    captioning_peak: float = 0.0
    finding: float = 0.0


clock = Clock()


def task(claim: Claim) -> Finish:
    clock.began = time.monotonic()
    return caption_job.caption(claim, SETTINGS, NullCaptioner)


def timed_pass(claim: Claim, job_id: str) -> dict[str, int]:
    began = time.monotonic()
    clock.captioning, clock.captioning_peak = began - clock.began, peak()
    found = mark_duplicates(claim, job_id)
    clock.finding = time.monotonic() - began
    return found


def add_dataset(core: Core, images: int) -> str:
    id = new_id("ds")
    names = [f"class {number:03d}" for number in range(CLASSES)]
    with core.transaction() as session:
        session.add(Job(id=id, kind="ingest", owner="bench", dataset_id=id, status="succeeded", request={}))
        session.flush()
        session.add(
            Dataset(
                id=id,
                owner="bench",
                name="bench",
                domain="animals",
                archive_key=id,
                archive_sha256="",
                archive_bytes=0,
                split_seed=0,
                val_fraction=0,
                test_fraction=0,
                classes=[{"name": name, "display_name": name} for name in names],
            )
        )
        session.flush()
        session.execute(
            text("""
                INSERT INTO images
                    (id, owner, dataset_id, path, class_name, split, sha256, media_type, width, height, bytes)
                SELECT 'img_' || :dataset || to_char(n, 'FM00000000'), 'bench', :dataset, n || '.jpg',
                    'class ' || to_char(n % :classes, 'FM000'), 'train', encode(sha256((:dataset || n)::bytea), 'hex'),
                    'image/jpeg', 480, 360, 100000
                FROM generate_series(1, :images) AS n
            """),
            {"dataset": id, "classes": CLASSES, "images": images},
        )
    with core.db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    return id


def run(core: Core, dataset_id: str) -> dict[str, Any]:
    """The result of one job."""
    request = CaptionJobRequest(dataset_id=dataset_id, engine="null", domain="animals").model_dump()
    job_id = new_id("cap")
    with core.transaction() as session:
        ledger.create(session, id=job_id, kind="caption", owner="bench", request=request, dataset_id=dataset_id)
    Runner(core, "caption", "bench").run(job_id)
    with core.transaction() as session:
        job = session.get_one(Job, job_id)
        assert job.status == "succeeded", job.error
        assert job.result is not None
        return job.result


def peak() -> float:
    """MiB"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="of the larger job (default: 20000)")
    images = parser.parse_args().images
    job_worker.TASKS["caption"] = f"{__name__}:task"
    setattr(caption_job, "mark_duplicates", timed_pass)  # noqa: B010
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres, valkey = start_postgres(folder), start_valkey(folder)
        stack.callback(postgres.stop)
        stack.callback(valkey.stop)
        settings = CoreSettings(
            database_url=postgres.url,
            redis_url=valkey.url,
            storage_url=f"file://{folder}/store",
        )
        core = Core.from_settings(settings)
        stack.callback(core.close)
        core.store = FewBlobs(core.store.root)
        migrate(core.db)
        for number in range(BLOBS):
            core.store.put_bytes(Store.blob_key(f"{number:064x}"), b"\xff" * 100_000)
        small, large = add_dataset(core, max(1, images // 10)), add_dataset(core, images)
        for name, dataset_id in (("a tenth", small), ("all", large), ("all again", large)):
            result = run(core, dataset_id)
            rate = round(result["captions"] / clock.captioning)
            stages = (round(clock.captioning, 2), rate, round(clock.captioning_peak), round(clock.finding, 1))
            rows.append((name, result["images"], result["captions"], result["written"], *stages, round(peak())))
    names = ["job", "images", "captions", "written", "seconds", "captions_per_second", "peak_mib"]
    names += ["duplicates_seconds", "whole_peak_mib"]
    print(table(names, rows))
    print(json.dumps({"caption_ledger": [dict(zip(names, row, strict=True)) for row in rows], "target": TARGET}))


if __name__ == "__main__":
    main()
