"""The archive that is uploaded, read by the server's own code: every image, label and split arrives as it was meant."""

import hashlib
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from captune.bench import READERS, LayoutError, Reading, read, upload
from captune.bench.data import Entry
from captune.bench.upload import metadata, packed, too_large, unpacked_bytes
from shared.datasets import limits
from shared.datasets.archive import open_archive
from shared.datasets.images import inspect
from shared.datasets.layout import plan
from shared.datasets.metadata import is_metadata
from shared.datasets.splits import Labelled
from tests.on_lists import assign, check_classes
from tests.unit.captune.bench.layouts import BUILD, picture


@pytest.mark.parametrize("name", READERS)
def test_the_server_reads_what_was_meant(name: str, tmp_path: Path) -> None:
    BUILD[name](tmp_path)
    reading = read(name, tmp_path, 0)
    with packed(reading) as made:
        archive = open_archive(made.path, keep=is_metadata)
        layout = plan(archive.names(), archive.kept, archive.folders, archive.report)
        contents = {member.path: member.read() for member in archive.members() if not is_metadata(member.path)}
    assert not archive.report.refusals
    assert not archive.report.skipped
    assert [(i.path, i.class_name, i.split, i.source) for i in layout.items] == [
        (e.path, e.label, e.split, e.path) for e in reading.entries
    ]
    assert layout.classes == reading.classes  # label order
    assert contents == {e.path: e.content(reading.root) for e in reading.entries}
    for data in contents.values():
        inspect(data)

    labelled = [
        Labelled(i.path, i.class_name, i.split, hashlib.sha256(contents[i.path]).hexdigest()) for i in layout.items
    ]
    assert assign(labelled, seed=7) == [e.split for e in reading.entries]  # nothing is left for the server to draw
    assert check_classes(labelled, layout.classes) == []


def test_the_same_reading_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    BUILD["oxford_pet"](tmp_path)

    def digest(seed: int) -> str:
        with packed(read("oxford_pet", tmp_path, seed)) as made:
            assert made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()
            return made.sha256

    assert digest(0) == digest(0) != digest(1)


def test_the_archive_is_gone_afterwards_and_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    BUILD["dtd"](tmp_path)
    with packed(read("dtd", tmp_path, 0)) as made, tarfile.open(made.path) as archive:
        for info in archive:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
    assert not made.path.exists()


def test_names_that_a_csv_must_quote(tmp_path: Path) -> None:
    entries = []
    for n, split in enumerate(("train", "val", "test")):
        for label in ('wolf, "grey"', "Ram C/V", "Ærø"):
            path = f'{split}/a, "b" {label.replace("/", " ")} {"long" * 30} {n}.jpg'
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(picture(n))
            entries.append(Entry(path, label, split))
    with packed(Reading(tmp_path, entries)) as made:
        archive = open_archive(made.path, keep=is_metadata)
        layout = plan(archive.names(), archive.kept, archive.folders, archive.report)
    assert [(i.path, i.class_name, i.split) for i in layout.items] == [(e.path, e.label, e.split) for e in entries]


def test_it_is_written_image_by_image(tmp_path: Path) -> None:
    big = 4 * 2**20
    for n in range(10):
        (tmp_path / f"{n}.jpg").write_bytes(bytes(big))
    reading = Reading(tmp_path, [Entry(f"{n}.jpg", "cat", "train") for n in range(10)])
    tracemalloc.start()
    with packed(reading):
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * big


def test_limits_are_the_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert limits.Limits().max_entries == upload.MAX_ENTRIES
    assert limits.Limits().max_member_bytes == upload.MAX_METADATA
    BUILD["dtd"](tmp_path)
    reading = read("dtd", tmp_path, 0)
    assert too_large(reading, metadata(reading)) is None
    monkeypatch.setattr(upload, "MAX_ENTRIES", len(reading.entries) + 1)  # the list of labels is an entry too
    assert too_large(reading, metadata(reading)) is None
    monkeypatch.setattr(upload, "MAX_ENTRIES", len(reading.entries))
    with pytest.raises(LayoutError, match="--pool"), packed(reading):
        pass
    monkeypatch.setattr(upload, "MAX_ENTRIES", 10**6)
    monkeypatch.setattr(upload, "MAX_METADATA", 10)
    with pytest.raises(LayoutError, match="a list of labels"), packed(reading):
        pass


def test_no_room_is_told_before_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    BUILD["dtd"](tmp_path)
    reading = read("dtd", tmp_path, 0)
    with packed(reading) as made:
        assert made.path.stat().st_size <= unpacked_bytes(reading) + 20 * 1024  # the list, and tar's last block
    free = type("Usage", (), {"free": unpacked_bytes(reading) - 1})
    monkeypatch.setattr(upload.shutil, "disk_usage", lambda place: free)
    with pytest.raises(LayoutError, match="TMPDIR"), packed(reading):
        pass
