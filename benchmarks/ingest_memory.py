"""Memory and speed of ingesting a large archive through the embedded stack: it must not grow with the archive.

    python benchmarks/ingest_memory.py [--gigabytes 0.25,0.5]

Each archive is a zip of distinct 200 kB JPEGs in ten classes. Prints the peak resident memory (VmHWM, MiB) of the API
and of the ingest worker after each archive, smallest first, then one JSON line."""

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from pathlib import Path

from PIL import Image

from captune.client import Client
from captune.tables import table
from services.embedded.stack import Stack

CLASSES, SIDE = 10, 400


def write_archive(path: Path, size: int) -> int:
    """Pictures that differ in a JPEG comment, so that each has bytes and a hash of its own. Returns how many."""
    out = io.BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), os.urandom(3 * SIDE * SIDE)).save(out, "JPEG", quality=90)
    picture = out.getvalue()
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        while path.stat().st_size < size:
            comment = os.urandom(16)
            marked = picture[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + picture[2:]
            archive.writestr(f"class_{count % CLASSES}/{count:07d}.jpg", marked)
            count += 1
    return count


def peak(pid: int) -> float:
    """MiB"""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", default="0.25,0.5", help="sizes of the archives (default: 0.25,0.5)")
    sizes = sorted(float(part) for part in parser.parse_args().gigabytes.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive.zip"
        with Stack(Path(folder) / "state", port=0) as stack, Client(stack.url, stack.api_key) as client:
            pids = stack.supervisor.pids()
            for gigabytes in sizes:
                count = write_archive(path, int(gigabytes * 1e9))
                began = time.monotonic()
                job = client.push(path, name="large", domain="noise")
                uploaded = time.monotonic() - began
                dataset = client.wait(job)
                seconds = time.monotonic() - began - uploaded
                assert dataset.status == "succeeded", dataset.error
                api, worker = peak(pids["api"]), peak(pids["worker-ingest"])
                rows.append((gigabytes, count, round(uploaded, 1), round(count / seconds), round(api), round(worker)))
                client.delete_dataset(dataset.id)
                path.unlink()
            assert stack.supervisor.pids() == pids, "a process was started again: its peak is not the run's"
    names = ("gigabytes", "images", "upload_seconds", "images_per_second", "api_peak_mib", "worker_peak_mib")
    print(table(names, rows))
    print(json.dumps({"ingest_memory": [dict(zip(names, row, strict=True)) for row in rows]}))


if __name__ == "__main__":
    main()
