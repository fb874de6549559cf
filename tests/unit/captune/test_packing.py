"""A folder becomes the same archive every time."""

import os
import zipfile
from pathlib import Path

import pytest

from captune.packing import archive

FILES = {"b/2.png": b"two", "a/1.png": b"one", "a/ü 猫.png": b"cat", "a.txt": b"note"}


def folder(at: Path, order: list[str]) -> Path:
    for name in order:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(FILES[name])
    return at


def packed(source: Path) -> bytes:
    with archive(source) as file:
        data: bytes = file.read()
    return data


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", sorted(FILES))
    second = folder(tmp_path / "second", sorted(FILES, reverse=True))
    for path in second.rglob("*"):
        os.utime(path, (1, 1_000_000_000))
        path.chmod(0o700)
    assert packed(first) == packed(second)
    (second / "a/1.png").write_bytes(b"uno")
    assert packed(first) != packed(second)


def test_every_file_is_in_it_under_its_relative_name(tmp_path: Path) -> None:
    with archive(folder(tmp_path / "data", list(FILES))) as file, zipfile.ZipFile(file) as found:
        assert {name: found.read(name) for name in found.namelist()} == FILES


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data.tar.gz"
    path.write_bytes(b"whatever it is")
    assert packed(path) == b"whatever it is"


def test_nothing_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor an archive"):
        packed(tmp_path / "missing")
