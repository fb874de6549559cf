"""A reading as one tar to upload: `metadata.csv` (file_name, label, split) and the images under their paths. Written
image by image; the same reading gives the same bytes, so the server's copy can be recognised by its SHA-256."""

import csv
import hashlib
import io
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from captune.bench.data import LayoutError, Reading

# What the server takes (shared/datasets/limits.py); a test holds the two together.
MAX_ENTRIES: Final = 1_000_000
MAX_METADATA: Final = 64 * 2**20
BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Packed:
    path: Path
    sha256: str


class Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...


@contextmanager
def packed(reading: Reading, on_image: Callable[[int], None] = lambda done: None) -> Iterator[Packed]:
    """The tar in a temporary file, gone afterwards. Raises LayoutError where it would be refused or find no room."""
    table = metadata(reading)
    _check(reading, table)
    with tempfile.TemporaryDirectory(prefix="captune-") as folder:
        path = Path(folder) / "images.tar"
        with path.open("wb") as file:
            sink = _Hashing(file)
            write(reading, table, sink, on_image)
        yield Packed(path, sink.digest.hexdigest())


def metadata(reading: Reading) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file_name", "label", "split"))
    rows.writerows((entry.path, entry.label, entry.split) for entry in reading.entries)
    return text.getvalue().encode()


def write(reading: Reading, table: bytes, out: Sink, on_image: Callable[[int], None]) -> None:
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        _add(archive, "metadata.csv", table)
        for done, entry in enumerate(reading.entries):
            on_image(done)
            _add(archive, entry.path, entry.content(reading.root))
            archive.members = []  # else it keeps a record of every image


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no owner, no date
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def unpacked_bytes(reading: Reading) -> int:
    """About the size of the tar, from the files' sizes; a packed image counts for its pixels."""
    sizes = (
        3 * 32 * 32 if entry.packed is not None else (reading.root / entry.path).stat().st_size
        for entry in reading.entries
    )
    return sum(size + 2 * BLOCK for size in sizes)


def too_large(reading: Reading, table: bytes) -> str | None:
    """Why the server would refuse it, if it would."""
    if len(reading.entries) >= MAX_ENTRIES:
        what = f"{len(reading.entries):,} images, and an upload may have {MAX_ENTRIES:,}"
    elif len(table) > MAX_METADATA:
        what = f"a list of labels of {len(table) >> 20} MiB, and an upload's may have {MAX_METADATA >> 20}"
    else:
        return None
    return f"{reading.root}: {what}; take part of the train images with --pool N (N per class)"


def _check(reading: Reading, table: bytes) -> None:
    if reason := too_large(reading, table):
        raise LayoutError(reason)
    needed, free = unpacked_bytes(reading), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise LayoutError(
            f"the upload of {reading.root} takes {needed / 2**30:.1f} GiB and {tempfile.gettempdir()} has "
            f"{free / 2**30:.1f}: point TMPDIR to a larger disk"
        )


class _Hashing:
    def __init__(self, out: Sink) -> None:
        self.out, self.digest = out, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.out.write(data)
