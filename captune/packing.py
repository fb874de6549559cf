"""A folder of images as one archive to upload."""

import tempfile
import zipfile
from collections.abc import Iterator
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
