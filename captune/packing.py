"""Folders as archives and back, and files in requests of a bounded size."""

import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def archive(source: Path) -> Iterator[Any]:
    """An open archive file: `source` itself where it is one, else a zip of the folder in a temporary file. The same
    folder gives the same bytes, so the server's copy can be recognised by its SHA-256."""
    if source.is_file():
        with source.open("rb") as file:
            yield file
        return
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is neither a folder nor an archive")
    with tempfile.TemporaryFile(prefix="captune-") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:  # images are compressed already
            for path in sorted(p for p in source.rglob("*") if p.is_file()):
                entry = zipfile.ZipInfo(path.relative_to(source).as_posix())  # a fixed date, 1980-01-01
                with path.open("rb") as image, target.open(entry, "w") as out:
                    while part := image.read(1 << 20):
                        out.write(part)
        file.seek(0)
        yield file


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` once the block ends well. Raises FileExistsError."""
    if path.exists():
        raise FileExistsError(f"{path} is there already; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        made = Path(temporary) / "files"
        made.mkdir()
        yield made
        made.rename(path)


def unpack(file: Path) -> None:
    """A zip's files, beside it, in its place. Raises ValueError for a name that leads out of the folder."""
    with zipfile.ZipFile(file) as source:
        for entry in source.infolist():
            if not entry.filename or "/" in entry.filename or "\\" in entry.filename or entry.filename.startswith("."):
                raise ValueError(f"the server's archive holds the strange name {entry.filename!r}; it was not unpacked")
            with source.open(entry) as packed, (file.parent / entry.filename).open("xb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    file.unlink()


def batched(files: Iterable[Path], most: int = 32, most_bytes: int = 32 * 2**20) -> Iterator[list[Path]]:
    """Runs of at most `most` files and `most_bytes` (one file at least)."""
    batch: list[Path] = []
    size = 0
    for file in files:
        own = file.stat().st_size
        if batch and (len(batch) == most or size + own > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += own
    if batch:
        yield batch
