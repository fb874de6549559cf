"""What is run on each input. Anything raised here is a finding."""

import tempfile
from pathlib import Path

from shared.datasets import metadata
from shared.datasets.archive import open_archive
from shared.datasets.images import decode, inspect
from shared.datasets.layout import plan
from shared.datasets.limits import MIB, BadArchive, Limits
from shared.errors import InvalidInput

_LIMITS = Limits(max_entries=200, max_member_bytes=MIB, max_total_bytes=8 * MIB)
_MAX_PIXELS = 250_000
_FOLDER = Path(tempfile.mkdtemp(prefix="captune-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def archives(data: bytes) -> None:
    path = _FOLDER / "upload"
    path.write_bytes(data)
    try:
        opened = open_archive(path, _LIMITS, keep=metadata.is_metadata)
        names = list(opened.names())
        assert all(not name.startswith("/") and ".." not in name.split("/") and "\\" not in name for name in names), (
            names
        )
        passed, unpacked = [], 0
        for member in opened.members():
            passed.append(member.path)
            try:
                content = member.read()
            except BadArchive:
                raise
            except InvalidInput:
                continue
            assert len(content) <= _LIMITS.max_member_bytes
            unpacked += len(content)
        assert passed == names, "the second pass sees another archive"
        assert unpacked <= _LIMITS.max_total_bytes
        found = plan(names, opened.kept, opened.directories, opened.report)
        assert {item.source for item in found.items} <= set(names)
    except InvalidInput:
        return


def pictures(data: bytes) -> None:
    try:
        info = inspect(data, _MAX_PIXELS)
    except InvalidInput:
        return
    image = decode(data, _MAX_PIXELS)  # an InvalidInput is a finding: what was let in must be usable later
    assert image.mode == "RGB"
    assert image.size == (info.width, info.height)


TARGETS = {"archives": archives, "pictures": pictures}
