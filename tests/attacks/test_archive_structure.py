"""Archives that contradict themselves, so that two readers would see two archives: headers and directory differ,
entries overlap, sizes lie, something stands before or behind. Intake sees one thing in both passes, or refuses."""

import bz2
import gzip
import lzma
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from tests.attacks.archives import GOOD, Outcome, Zipped, block, header, member, outcome, tarred, zipped

CAT = Zipped(b"cat/good.jpg", b"good")
KEPT = dict([GOOD])
DAMAGED = {"corrupt_file": 1}


def only_the_good_one(found: Outcome, *codes: str) -> None:
    """The lying entry is refused alone (with one of these codes), or the archive as a whole."""
    if found.broken:
        assert found.broken in {"corrupt_archive", "truncated_archive", "too_many_entries"}
    else:
        assert found.files == KEPT
        assert sum(found.refused.values()) == 1
        assert set(found.refused) <= set(codes)


# -- zip ---------------------------------------------------------------------------------------------------------------

LIES = {
    "another name before the data": Zipped(b"cat/evil.jpg", local_name=b"../evil.jpg"),
    "size under what there is": Zipped(b"cat/evil.jpg", b"evil" * 1000, size=4),
    "size of 4 GiB": Zipped(b"cat/evil.jpg", size=0xFFFFFFFE),
    "packed size past the end": Zipped(b"cat/evil.jpg", packed=0x7FFFFFFF, size=0x7FFFFFFF),
    "checksum": Zipped(b"cat/evil.jpg", crc=1),
    "offset past the end": Zipped(b"cat/evil.jpg", offset=0x7FFFFFFF),
    "offset into data": Zipped(b"cat/evil.jpg", offset=31),
    "offset of the directory": Zipped(b"cat/evil.jpg", offset=90),
    "deflated data said to be stored": Zipped(b"cat/evil.jpg", b"evil" * 100, local_method=0, size=9),
    "unknown method": Zipped(b"cat/evil.jpg", method=77),
    "zip64 that is missing": Zipped(b"cat/evil.jpg", size=0xFFFFFFFF, packed=0xFFFFFFFF),
    "zip64 of 8 EiB": Zipped(b"cat/evil.jpg", size=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**63 - 1)),
    "zip64 of 16 EiB": Zipped(b"cat/evil.jpg", size=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**64 - 1)),
    "zip64 offset": Zipped(b"cat/evil.jpg", offset=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**62)),
    "zip64 cut off": Zipped(b"cat/evil.jpg", size=0xFFFFFFFF, extra=struct.pack("<HHB", 1, 8, 9)),
    "encrypted": Zipped(b"cat/evil.jpg", flags=0x801),
    "link": Zipped(b"cat/evil.jpg", b"/etc/passwd", mode=0o120777),
    "device": Zipped(b"cat/evil.jpg", mode=0o060666),
    "FIFO": Zipped(b"cat/evil.jpg", mode=0o010666),
    "socket": Zipped(b"cat/evil.jpg", mode=0o140666),
}
CODES = ("corrupt_file", "file_too_large", "encrypted", "link", "special_file", "unsupported_compression")


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_zip_entry_that_lies_costs_itself_alone(tmp_path: Path, lie: Zipped) -> None:
    only_the_good_one(outcome(tmp_path, zipped(CAT, lie)), *CODES)


def test_zip_entries_that_share_their_data(tmp_path: Path) -> None:
    """Ten names for the same bytes: those that are not what stands before the data are refused."""
    found = outcome(tmp_path, zipped(CAT, *(Zipped(b"cat/%d.jpg" % n, b"good", offset=0) for n in range(10))))
    assert found == Outcome(KEPT, {"corrupt_file": 10})


def test_a_zip_entry_inside_another(tmp_path: Path) -> None:
    """The second one's header stands in the stored data of the first (as in a quine, or an overlapping bomb). It may be
    read: what is unpacked of both counts (test_archive_bombs.py)."""
    content = b"inner" * 10
    inner = zipped(Zipped(b"cat/inner.jpg", content, method=0))
    start = 30 + len(b"cat/outer.jpg")
    outer = Zipped(b"cat/outer.jpg", inner, method=0)
    found = outcome(tmp_path, zipped(outer, Zipped(b"cat/inner.jpg", content, method=0, offset=start)))
    assert found.files.items() <= {"cat/outer.jpg": inner, "cat/inner.jpg": content}.items()
    assert len(found.files) + sum(found.refused.values()) >= 2 or found.broken


def test_a_size_over_what_there_is_adds_nothing(tmp_path: Path) -> None:
    found = outcome(tmp_path, zipped(CAT, Zipped(b"cat/2.jpg", b"two", size=10_000)))
    assert found in (Outcome(KEPT | {"cat/2.jpg": b"two"}), Outcome(KEPT, DAMAGED))


@pytest.mark.parametrize("count", [0, 1, 3, 0xFFFE])
def test_a_zip_that_counts_its_entries_wrongly(tmp_path: Path, count: int) -> None:
    found = outcome(tmp_path, zipped(CAT, Zipped(b"cat/2.jpg", b"two"), count=count))
    assert found.broken == "corrupt_archive" or found.files == KEPT | {"cat/2.jpg": b"two"}


def test_two_directories_in_one_zip(tmp_path: Path) -> None:
    """Some readers take the first end record, some the last: here it is the last, in both passes."""
    first = zipped(Zipped(b"cat/first.jpg", b"first"))
    found = outcome(tmp_path, zipped(Zipped(b"cat/second.jpg", b"second"), prefix=first))
    assert found.broken or found.files == {"cat/second.jpg": b"second"}
    hidden = zipped(CAT, comment=zipped(Zipped(b"cat/evil.jpg")))
    found = outcome(tmp_path, hidden)
    assert found.broken or len(found.files) == 1


@pytest.mark.parametrize("junk", [b"MZ\x90\0", b"#!/bin/sh\n", b"\xff\xd8\xff\xe0JFIF", b"%PDF-1.7\n", b"GIF89a"])
def test_a_zip_behind_something_else_is_that(tmp_path: Path, junk: bytes) -> None:
    """A program, picture or document with a zip at its end: recognised by its beginning."""
    assert outcome(tmp_path, zipped(CAT, prefix=junk * 200)).broken == "unsupported_archive"


@pytest.mark.parametrize("length", [1, 22, 1000, 70_000])
def test_data_behind_a_zip(tmp_path: Path, length: int) -> None:
    found = outcome(tmp_path, zipped(CAT) + b"\0" * length)
    assert found.broken == "truncated_archive" or found.files == KEPT


@pytest.mark.parametrize(
    "end",
    [
        struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 46, 0xFFFFFFFF, 0),
        struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 0xFFFFFFFF, 0, 0),
        struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 0x7FFFFFFF, 4, 0),
        struct.pack("<4s4H2LH", b"PK\x05\x06", 7, 7, 1, 1, 46, 0, 0),
        struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 46, 0, 999),
        struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2**40, 2**40, 2**62, 2**62)
        + struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0),
        struct.pack("<4sLQL", b"PK\x06\x07", 0, 2**63, 1)
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0),
    ],
    ids=[
        "directory past the end",
        "directory of 4 GiB",
        "directory of 2 GiB",
        "seven disks",
        "long comment",
        "zip64 of 4 EiB",
        "zip64 nowhere",
    ],
)  # fmt: skip
def test_an_end_record_that_lies(tmp_path: Path, end: bytes) -> None:
    found = outcome(tmp_path, b"PK\x03\x04" + b"\0" * 100 + end)
    assert found.broken in {"corrupt_archive", "truncated_archive", "too_many_entries"}


def test_a_directory_entry_whose_lengths_reach_past_the_directory(tmp_path: Path) -> None:
    data = bytearray(zipped(CAT))
    record = data.rindex(b"PK\x01\x02")
    for at in (28, 30, 32):  # name, extra field, comment
        lying = bytearray(data)
        lying[record + at : record + at + 2] = b"\xff\xff"
        found = outcome(tmp_path, bytes(lying))
        assert found.broken in {"corrupt_archive", "truncated_archive"} or found.files == KEPT


# -- tar ---------------------------------------------------------------------------------------------------------------

LINKS = {
    "symbolic": (tarfile.SYMTYPE, "/etc/passwd", "link"),
    "symbolic, relative": (tarfile.SYMTYPE, "../../etc", "link"),
    "hard": (tarfile.LNKTYPE, "/etc/passwd", "link"),
    "hard, to a member": (tarfile.LNKTYPE, "cat/good.jpg", "link"),
    "character device": (tarfile.CHRTYPE, "", "special_file"),
    "block device": (tarfile.BLKTYPE, "", "special_file"),
    "FIFO": (tarfile.FIFOTYPE, "", "special_file"),
    "sparse": (tarfile.GNUTYPE_SPARSE, "", "unsupported_compression"),
    "volume label": (b"V", "", "unsupported_compression"),
    "continued": (b"M", "", "unsupported_compression"),
    "unknown": (b"~", "", "unsupported_compression"),
}


@pytest.mark.parametrize(("kind", "link", "code"), LINKS.values(), ids=LINKS)
def test_what_is_no_plain_file_in_a_tar(tmp_path: Path, kind: bytes, link: str, code: str) -> None:
    found = outcome(tmp_path, tarred(member("cat/evil.jpg", kind=kind, link=link), member(*GOOD)))
    assert found.broken == "corrupt_archive" or found == Outcome(KEPT, {code: 1})


def test_a_file_below_a_link_is_only_a_name(tmp_path: Path) -> None:
    found = outcome(tmp_path, tarred(member("cat", kind=tarfile.SYMTYPE, link="/etc"), member("cat/passwd")))
    assert found == Outcome({"cat/passwd": b"evil"}, {"link": 1})


def pax(**fields: str) -> bytes:
    """An extended header, `length key=value` a line (POSIX.1-2001)."""
    lines = b""
    for key, value in fields.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
        lines += str(length).encode() + rest
    return header("pax", tarfile.XHDTYPE, len(lines)) + block(lines)


ONE = header("cat/evil.jpg", tarfile.REGTYPE, 4) + block(b"evil")
END = header(GOOD[0], tarfile.REGTYPE, 4) + block(GOOD[1]) + b"\0" * 1024


EXTENDED = {
    "path that climbs": pax(path="../../evil.jpg") + ONE,
    "absolute path": pax(path="/etc/passwd") + ONE,
    "path with NUL": pax(path="cat/a\0.jpg") + ONE,
    "empty path": pax(path="") + ONE,
    "size that is larger": pax(size="100000000") + ONE,
    "size that is negative": pax(size="-1") + ONE,
    "size that is no number": pax(size="many") + ONE,
    "size of 30 digits": pax(size="9" * 30) + ONE,
    "sparse of 8 EiB": pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize=str(2**63)) + ONE,
    "link by header": pax(linkpath="/etc/passwd") + header("cat/evil.jpg", tarfile.SYMTYPE, 0),
    "GNU long name that climbs": header("@", tarfile.GNUTYPE_LONGNAME, 15) + block(b"../../evil.jpg\0") + ONE,
    "GNU long name without an end": header("@", tarfile.GNUTYPE_LONGNAME, 2**33) + ONE,
    "GNU long link": header("@", tarfile.GNUTYPE_LONGLINK, 5) + block(b"/etc\0") + header("e", tarfile.LNKTYPE, 0),
    "size in base 256": header("cat/evil.jpg", tarfile.REGTYPE, 2**60) + block(b"evil"),
    "length that lies": header("pax", tarfile.XHDTYPE, 512) + block(b"999999999 path=../x\n") + ONE,
    "length of nothing": header("pax", tarfile.XHDTYPE, 512) + block(b"0 path=../x\n") + ONE,
}  # fmt: skip


@pytest.mark.parametrize("data", EXTENDED.values(), ids=EXTENDED)
def test_extended_headers_that_lie(tmp_path: Path, data: bytes) -> None:
    found = outcome(tmp_path, data + END)
    if found.broken:
        assert found.broken in {"corrupt_archive", "truncated_archive"}
    else:
        assert set(found.files) <= {*KEPT, "cat/evil.jpg"}
        assert found.files.get("cat/good.jpg") == b"good"


def test_a_header_whose_checksum_is_wrong_is_no_end(tmp_path: Path) -> None:
    bad = bytearray(ONE)
    bad[0:4] = b"CAT/"
    assert outcome(tmp_path, ONE + bytes(bad) + END).broken == "corrupt_archive"


def test_a_second_tar_behind_the_end_of_the_first_is_not_read(tmp_path: Path) -> None:
    found = outcome(tmp_path, tarred(member(*GOOD)) + tarred(member("cat/hidden.jpg")))
    assert found.broken == "corrupt_archive" or found.files == KEPT


# -- compressed --------------------------------------------------------------------------------------------------------


def test_the_name_in_a_gzip_header_is_nothing(tmp_path: Path) -> None:
    plain = tarred(member(*GOOD))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(plain) + deflate.flush()
    head = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"../../evil.tar\0"
    data = head + body + struct.pack("<2L", zlib.crc32(plain), len(plain))
    assert outcome(tmp_path, data) == Outcome(KEPT)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_rubbish_behind_compressed_data(tmp_path: Path, pack: type) -> None:
    found = outcome(tmp_path, pack(tarred(member(*GOOD))) + b"rubbish " * 100)  # type: ignore[call-arg]
    assert found.broken in (None, "corrupt_archive", "truncated_archive")
    assert set(found.files) <= set(KEPT)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_compressed_twice_is_not_unpacked_twice(tmp_path: Path, pack: type) -> None:
    data = pack(pack(tarred(member(*GOOD))))  # type: ignore[call-arg]
    assert outcome(tmp_path, data).broken in {"unsupported_archive", "truncated_archive"}


def test_other_compressions_and_archives_are_named_and_refused(tmp_path: Path) -> None:
    for magic in (
        b"\x28\xb5\x2f\xfd",
        b"Rar!\x1a\x07\x01\0",
        b"7z\xbc\xaf\x27\x1c",
        b"\x04\x22\x4d\x18",
        b"LZIP",
        b"!<arch>\n",
        b"MSCF",
    ):
        assert outcome(tmp_path, magic + b"\0" * 2000).broken == "unsupported_archive"
