"""Small archives that unpack to much. Each is read in a process of its own, whose memory is measured and whose time is
bounded; the real limits but for the number of entries. (test_overlapping_zip_entries_are_a_bomb,
extended tar headers, xz dictionaries and directories of gigabytes: tests/unit/datasets/test_archive.py.)"""

import bz2
import gzip
import json
import lzma
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.datasets.limits import MIB
from tests.attacks.archives import Outcome, Zipped, block, header, outcome, zipped

ROOT = Path(__file__).resolve().parents[2]
READ = """
import json, resource, sys
from pathlib import Path
from shared.datasets.archive import open_archive
from shared.datasets.limits import BadArchive, Limits
from shared.errors import InvalidInput
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code, unpacked, refused = None, 0, {}
try:
    archive = open_archive(Path(sys.argv[1]), Limits(max_entries=100_000))
    archive.names()
    for member in archive.members():
        try:
            unpacked += len(member.read())
        except BadArchive:
            raise
        except InvalidInput as error:
            refused[error.code] = refused.get(error.code, 0) + 1
except BadArchive as error:
    code = error.code
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"code": code, "unpacked": unpacked, "refused": refused, "grew": (after - before) // 1024}))
"""


def deflated(size: int) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(pack.compress(bytes(MIB)) for _ in range(size // MIB)) + pack.flush()


def zip_of_zeros() -> bytes:
    """12 files of 60 MiB in 0.7 MB, 1,000 to 1."""
    raw, size = deflated(60 * MIB), 60 * MIB
    crc = zlib.crc32(bytes(size))
    # Deflated already: written as they are, with the header of what they unpack to.
    stored = [
        Zipped(b"c/%03d.bmp" % n, raw, method=0, local_method=8, size=size, packed=len(raw), crc=crc) for n in range(12)
    ]
    data = bytearray(zipped(*stored))
    at = 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        data[at + 10 : at + 12] = b"\x08\0"
        at += 46
    return bytes(data)


def overlapping() -> bytes:
    """1,000 names for the same 1 MiB of zeros, each as the data's own: they may be refused, or count."""
    raw, size = deflated(MIB), MIB
    first = Zipped(b"c/1.bmp", bytes(MIB))
    return zipped(first, *(Zipped(b"c/1.bmp", raw, offset=0, size=size, packed=len(raw)) for _ in range(1000)))


def packed_in_pieces(pack: Callable[[bytes], bytes], files: int) -> bytes:
    """As one archive of several compressed members, each of which is made once."""
    size = 60 * MIB
    zeros = pack(bytes(10 * MIB)) * 6
    return b"".join(pack(header(f"c/{n}.bmp", tarfile.REGTYPE, size)) + zeros for n in range(files))


def many_entries() -> bytes:
    """100,001 names, no data: only the directory has them."""
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0x21, 0, 0, 0, 7, 0) + b"c/%05d" % 0
    record = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0x21, 0, 0, 0, 9, *[0] * 6)
    directory = b"".join(record + b"c/%07d" % n for n in range(100_001))
    zip64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 100_001, 100_001, len(directory), len(local))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(local) + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(directory), len(local), 0)
    return local + directory + zip64 + locator + end


def one_giant_file() -> bytes:
    """A tar.gz whose only file claims 8 TB and goes on for 300 MB."""
    return gzip.compress(header("c/1.bmp", tarfile.REGTYPE, 2**43)) + gzip.compress(bytes(10 * MIB)) * 30


def empty_members() -> bytes:
    """100,000 gzip members with nothing in them."""
    return gzip.compress(header("c/1.bmp", tarfile.REGTYPE, 4) + block(b"good")) + gzip.compress(b"") * 100_000


BOMBS: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "zip": (zip_of_zeros, {"archive_bomb"}),
    "zip, overlapping": (overlapping, {"archive_bomb", "None"}),
    "zip of many names": (many_entries, {"too_many_entries"}),
    "tar.gz": (lambda: packed_in_pieces(gzip.compress, 4), {"archive_bomb"}),
    "tar.bz2": (lambda: packed_in_pieces(bz2.compress, 4), {"archive_bomb"}),
    "tar.xz": (lambda: packed_in_pieces(lzma.compress, 4), {"archive_bomb"}),
    "tar.gz with one giant file": (one_giant_file, {"archive_bomb"}),
    "gzip of empty members": (empty_members, {"corrupt_archive", "truncated_archive", "None"}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_given_up_in_flat_memory(tmp_path: Path, name: str) -> None:
    make, codes = BOMBS[name]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    ran = subprocess.run(
        [sys.executable, "-c", READ, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    told = json.loads(ran.stdout)
    assert str(told["code"]) in codes, told
    # One file of at most 64 MiB is held at a time, once as it is unpacked and once as it is handed over.
    assert told["grew"] < 150, told
    assert told["unpacked"] <= max(64 * MIB, 200 * path.stat().st_size)


def test_archives_in_archives_are_files(tmp_path: Path) -> None:
    """However deep they are nested, the first layer is all that is opened: what is in it is no picture."""
    layer = zipped(Zipped(b"c/1.bmp", bytes(10 * MIB)))
    for _ in range(5):
        layer = zipped(Zipped(b"c/nested.zip", layer), Zipped(b"c/again.zip", layer))
    found = outcome(tmp_path, layer)
    assert sorted(found.files) == ["c/again.zip", "c/nested.zip"]
    assert max(map(len, found.files.values())) < MIB
    assert found == Outcome(found.files)
