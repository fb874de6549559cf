"""Speed of an ingest, and its memory against the number of files: it must not grow.

    python benchmarks/ingest.py [--cases jpeg-64,png-64,jpeg-224,png-224,jpeg-1024] [--images 5000] [--repeat 1]
    python benchmarks/ingest.py --cases jpeg-64 --images 1000,100000,1000000
    python benchmarks/ingest.py --against ../captune-before --repeat 3

Each archive is a zip of different pictures (noise, smoothed) in a hundred classes, without splits. A real ingest worker
takes it from the store to the finished data set, in a process of its own for each run, with PostgreSQL, Valkey and the
store on this machine. Prints images per second (claim to final state) and the worker's peak resident memory (VmHWM);
`--against`: the same with another checkout's worker, one run after the other, and the ratio of the medians. A table,
then one JSON line."""

import argparse
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from PIL import Image, ImageFilter

from captune.tables import table
from services.embedded.servers import start_postgres, start_valkey
from shared.config import CoreSettings
from shared.core import Core
from shared.db.migrate import migrate
from shared.db.models import FINAL, Dataset, Job
from shared.ids import new_id
from shared.jobs import ledger

HERE = Path(__file__).resolve().parents[1]
CLASSES, BASES = 100, 50


def picture(side: int, format: str) -> bytes:
    noise = Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).filter(ImageFilter.GaussianBlur(3))
    out = io.BytesIO()
    noise.save(out, format.upper(), **({"quality": 85} if format == "jpeg" else {}))
    return out.getvalue()


def marked(data: bytes, number: int) -> bytes:
    """The same pixels in a file with bytes, and so a hash, of its own: a comment is put in."""
    comment = b"%016d" % number
    if data.startswith(b"\xff\xd8"):
        return data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + data[2:]
    chunk = b"tEXtComment\0" + comment
    end = len(data) - 12
    return data[:end] + struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk)) + data[end:]


def write_archive(path: Path, case: str, images: int) -> None:
    format, side = case.split("-")
    bases = [picture(int(side), format) for _ in range(BASES)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(images):
            name = f"class_{number % CLASSES:03d}/image_{number:07d}.{format}"
            archive.writestr(name, marked(bases[number % BASES], number))


class Machine:
    """The servers, and one worker at a time."""

    def __init__(self, folder: Path, stop: ExitStack) -> None:
        postgres, valkey = start_postgres(folder), start_valkey(folder)
        stop.callback(postgres.stop)
        stop.callback(valkey.stop)
        self.store = folder / "store"
        for number in range(256):
            (self.store / "blobs" / f"{number:02x}").mkdir(parents=True)
        self.urls = {"DATABASE_URL": postgres.url, "REDIS_URL": valkey.url, "STORAGE_URL": f"file://{self.store}"}
        self.core = Core.from_settings(CoreSettings.model_validate(self.urls))
        stop.callback(self.core.close)
        migrate(self.core.db)

    def ingest(self, archive: Path, images: int, checkout: Path) -> tuple[float, float]:
        """Images per second, peak MiB."""
        id = new_id("ds")
        environment = os.environ | self.urls | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "shared.jobs.worker", "ingest"]
        with archive.open("rb") as file:
            self.core.store.put_file(f"uploads/{id}", file)
        worker = subprocess.Popen(command, cwd=checkout, env=environment)
        try:
            time.sleep(3)  # its imports
            self._submit(id, archive)
            job = self._finished(id)
            assert job.status == "succeeded", job.error
            assert job.result is not None
            assert job.result["images"] == images
            assert job.started_at is not None
            assert job.finished_at is not None
            return images / (job.finished_at - job.started_at).total_seconds(), peak(worker.pid)
        finally:
            worker.kill()
            worker.wait()
            with self.core.transaction() as session:
                session.delete(session.get_one(Dataset, id))
            for left in self.store.rglob("*"):  # its folders stay: a store is made once
                if left.is_file():
                    left.unlink()

    def _submit(self, id: str, archive: Path) -> None:
        with self.core.transaction() as session:
            ledger.create(session, id=id, kind="ingest", owner="bench", request={}, dataset_id=id)
            columns = {"name": "bench", "domain": "noise", "archive_key": f"uploads/{id}", "archive_sha256": "0" * 64}
            draw = {"split_seed": 0, "val_fraction": 0.1, "test_fraction": 0.2}
            size = archive.stat().st_size
            session.add(Dataset(id=id, owner="bench", archive_bytes=size, **columns, **draw))

    def _finished(self, id: str) -> Job:
        while True:
            with self.core.transaction() as session:
                job = session.get_one(Job, id)
            if job.status in FINAL:
                return job
            time.sleep(0.5)


def peak(pid: int) -> float:
    """MiB"""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def runs(cases: list[str], sizes: list[int], checkouts: list[Path], repeat: int) -> Iterator[tuple[object, ...]]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder, ExitStack() as stop:
        machine = Machine(Path(folder), stop)
        archive = Path(folder) / "archive.zip"
        for case in cases:
            for images in sizes:
                write_archive(archive, case, images)
                kilobytes = round(archive.stat().st_size / images / 1000, 1)
                taken = [[machine.ingest(archive, images, each) for each in checkouts] for _ in range(repeat)]
                rates = [median(rate for rate, _ in column) for column in zip(*taken, strict=True)]
                peaks = [max(mib for _, mib in column) for column in zip(*taken, strict=True)]
                yield case, kilobytes, images, *map(round, rates), *map(round, peaks), round(rates[0] / rates[-1], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="jpeg-64,png-64,jpeg-224,png-224,jpeg-1024", help="format-side, in pixels")
    parser.add_argument("--images", default="5000", help="per archive, several by comma (default: 5000)")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    checkouts = [HERE] if options.against is None else [HERE, options.against.resolve()]
    names = ["case", "kilobytes", "images"]
    for what in ("images_per_second", "worker_peak_mib"):
        names += [what, f"{what}_against"][: len(checkouts)]
    names.append("ratio")
    rows = list(runs(options.cases.split(","), [int(n) for n in options.images.split(",")], checkouts, options.repeat))
    print(table(names, rows))
    print(json.dumps({"ingest": [dict(zip(names, row, strict=True)) for row in rows]}))


if __name__ == "__main__":
    main()
