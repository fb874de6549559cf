import bz2
import gzip
import io
import lzma
import os
import random
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.datasets.archive import Archive, open_archive
from shared.datasets.limits import MIB, BadArchive, Limits
from shared.errors import InvalidInput

FILES = {"cat/1.jpg": b"one" * 500, "cat/2 with space.jpg": b"two", "dög/ä.png": os.urandom(3000), "dog/empty": b""}
Packer = Callable[[dict[str, bytes]], bytes]


def packed_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def packed_tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


PACKERS: dict[str, Packer] = {
    "zip": packed_zip,
    "tar": packed_tar,
    "tar.gz": lambda files: gzip.compress(packed_tar(files)),
    "tar.bz2": lambda files: bz2.compress(packed_tar(files)),
    "tar.xz": lambda files: lzma.compress(packed_tar(files)),
}


def opened(tmp_path: Path, data: bytes, limits: Limits | None = None) -> Archive:
    path = tmp_path / "upload"  # no extension: content decides
    path.write_bytes(data)
    return open_archive(path, limits)


def contents(archive: Archive) -> dict[str, bytes]:
    return {member.path: member.read() for member in archive.members()}


def codes(archive: Archive) -> dict[str, int]:
    archive.names()
    return dict(archive.report.refused)


def broken(tmp_path: Path, data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(BadArchive) as caught:
        contents(opened(tmp_path, data, limits))
    return caught.value.code


@pytest.mark.parametrize("kind", PACKERS)
def test_every_kind_is_recognised_by_content_and_read(tmp_path: Path, kind: str) -> None:
    archive = opened(tmp_path, PACKERS[kind](FILES))
    assert archive.kind == kind
    assert archive.names() == list(FILES)
    assert contents(archive) == FILES
    assert contents(archive) == FILES
    assert archive.report.as_dict()["refused_total"] == 0


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_dialects_with_long_names(tmp_path: Path, form: int) -> None:
    files = {"a" * 90 + "/" + "b" * 90 + ".jpg": b"x", "short.jpg": b"y"}
    if form != tarfile.USTAR_FORMAT:
        files |= {"c" * 300 + "/1.jpg": b"z"}
    assert contents(opened(tmp_path, packed_tar(files, form))) == files


def test_members_can_be_skipped_without_reading(tmp_path: Path) -> None:
    for pack in PACKERS.values():
        archive = opened(tmp_path, pack(FILES))
        assert [m.read() for m in archive.members() if m.path.startswith("dög")] == [FILES["dög/ä.png"]]


def test_names_are_composed_and_cleaned(tmp_path: Path) -> None:
    archive = opened(tmp_path, packed_tar({"./cafe\u0301//1.jpg": b"x"}))
    assert archive.names() == ["caf\u00e9/1.jpg"]
    assert [member.path for member in archive.members()] == ["caf\u00e9/1.jpg"]


def test_zip_names_without_the_utf8_flag(tmp_path: Path) -> None:
    plain = packed_zip({"XXX/1.jpg": b"x"})
    assert opened(tmp_path, plain.replace(b"XXX", "aé".encode())).names() == ["aé/1.jpg"]
    assert opened(tmp_path, plain.replace(b"XXX", b"a\x82b")).names() == ["aéb/1.jpg"]


UNSAFE = [
    "../evil.jpg",
    "a/../../evil.jpg",
    "/etc/passwd",
    "C:/evil.jpg",
    "c:evil.jpg",
    "a\\..\\evil.jpg",
    "%2e%2e/evil.jpg",
    "a/%2E%2E%2fevil.jpg",
    "%252e%252e/evil.jpg",
    "a%5cevil.jpg",
    "a\nb.jpg",
    "x" * 1100,
]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused_one_by_one(tmp_path: Path, kind: str, name: str) -> None:
    before = set(tmp_path.rglob("*"))
    archive = opened(tmp_path, PACKERS[kind]({name: b"evil", "cat/1.jpg": b"good"}))
    assert contents(archive) == {"cat/1.jpg": b"good"}
    assert codes(archive) == {"unsafe_path": 1}
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "upload"}


def test_nul_in_a_name(tmp_path: Path) -> None:
    data = packed_zip({"cat/1.jpgX.exe": b"x"}).replace(b"1.jpgX.exe", b"1.jpg\0.exe")
    assert codes(opened(tmp_path, data)) == {"unsafe_path": 1}


def test_percent_signs_are_fine_in_names(tmp_path: Path) -> None:
    files = {"100%/50%.jpg": b"x", "a%20b/%41.jpg": b"y"}
    assert contents(opened(tmp_path, packed_zip(files))) == files


def test_links_and_devices_in_tar(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    kinds = {tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "link", tarfile.CHRTYPE: "dev", tarfile.FIFOTYPE: "dev"}
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"cat/{number}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        good = tarfile.TarInfo("cat/good.jpg")
        good.size = 4
        archive.addfile(good, io.BytesIO(b"good"))
    result = opened(tmp_path, buffer.getvalue())
    assert contents(result) == {"cat/good.jpg": b"good"}
    assert codes(result) == {"link": 2, "special_file": 2}


def test_links_devices_and_folders_in_zip(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, mode in (("link.jpg", 0o120777), ("device.jpg", 0o020666), ("good.jpg", 0o100644), ("d/", 0o040755)):
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, mode << 16
            archive.writestr(info, b"" if name == "d/" else b"/etc/passwd")
    result = opened(tmp_path, buffer.getvalue())
    assert contents(result) == {"good.jpg": b"/etc/passwd"}
    assert codes(result) == {"link": 1, "special_file": 1}
    assert list(result.folders) == ["d"]


def test_encrypted_and_exotic_zip_entries(tmp_path: Path) -> None:
    data = bytearray(packed_zip({"a.jpg": b"x", "b.jpg": b"y"}))
    second = data.rindex(b"PK\x01\x02")
    data[second + 8] |= 1
    archive = opened(tmp_path, bytes(data))
    assert contents(archive) == {"a.jpg": b"x"}
    assert codes(archive) == {"encrypted": 1}
    assert codes(opened(tmp_path, packed_zip({"a.jpg": b"x" * 99}, zipfile.ZIP_LZMA))) == {"unsupported_compression": 1}


def test_sparse_tar_members_are_refused(tmp_path: Path) -> None:
    data = bytearray(packed_tar({"big.jpg": b"x", "cat/1.jpg": b"y"}))
    data[156:157] = b"S"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    archive = opened(tmp_path, bytes(data))
    assert contents(archive) == {"cat/1.jpg": b"y"}
    assert codes(archive) == {"unsupported_compression": 1}


def test_litter_is_skipped_and_counted(tmp_path: Path) -> None:
    litter = ["__MACOSX/cat/._1.jpg", ".DS_Store", "cat/.hidden", "cat/Thumbs.db", "dog/desktop.ini", ".git/config"]
    for kind in ("zip", "tar"):
        archive = opened(tmp_path, PACKERS[kind](dict.fromkeys([*litter, "cat/1.jpg"], b"x")))
        assert archive.names() == ["cat/1.jpg"]
        assert archive.report.skipped == len(litter)
        assert codes(archive) == {}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_second_of_two_equal_paths_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("a/1.jpg", b"first")
        zipped.writestr("a//1.jpg", b"second")
        zipped.writestr("A/1.jpg", b"other")
    archive = opened(tmp_path, buffer.getvalue())
    assert contents(archive) == {"a/1.jpg": b"first", "A/1.jpg": b"other"}
    assert codes(archive) == {"duplicate_path": 1}


def test_metadata_is_held_from_the_first_pass(tmp_path: Path) -> None:
    for pack in PACKERS.values():
        path = tmp_path / "upload"
        path.write_bytes(pack({"cat/1.jpg": b"x", "metadata.csv": b"file_name,label"}))
        archive = open_archive(path, keep=lambda name: name.endswith(".csv"))
        archive.names()
        assert archive.kept == {"metadata.csv": b"file_name,label"}
        small = open_archive(path, Limits(max_member_bytes=5), keep=lambda name: name.endswith(".csv"))
        with pytest.raises(BadArchive) as caught:
            small.names()
        assert caught.value.code == "metadata_too_large"


@pytest.mark.parametrize("kind", PACKERS)
def test_a_file_over_the_limit_is_refused_and_the_rest_read(tmp_path: Path, kind: str) -> None:
    archive = opened(tmp_path, PACKERS[kind]({"big": b"x" * 1001, "fits": b"y" * 1000}), Limits(max_member_bytes=1000))
    members = archive.members()
    with pytest.raises(InvalidInput) as caught:
        next(members).read()
    assert caught.value.code == "file_too_large"
    assert not isinstance(caught.value, BadArchive)
    assert next(members).read() == b"y" * 1000


def test_a_zip_header_that_claims_less_than_there_is(tmp_path: Path) -> None:
    data = bytearray(packed_zip({"big": b"x" * 5_000_000}))
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<L", 10)
    for limits in (None, Limits(max_member_bytes=1000)):
        archive = opened(tmp_path, bytes(data), limits)
        tracemalloc.start()
        with pytest.raises(InvalidInput) as caught:
            contents(archive)
        assert tracemalloc.get_traced_memory()[1] < MIB
        tracemalloc.stop()
        assert caught.value.code == "corrupt_file"


def test_a_flipped_bit_costs_one_zip_entry(tmp_path: Path) -> None:
    data = packed_zip({"a": b"hello world", "b": b"fine"}, zipfile.ZIP_STORED).replace(b"hello", b"jello")
    members = opened(tmp_path, data).members()
    with pytest.raises(InvalidInput) as caught:
        next(members).read()
    assert caught.value.code == "corrupt_file"
    assert next(members).read() == b"fine"


def test_total_entries_and_ratio_are_limited(tmp_path: Path) -> None:
    many = {f"c/{i}.jpg": b"" for i in range(11)}
    flat = dict.fromkeys(("c/1.bmp", "c/2.bmp"), b"\0" * 33 * MIB)
    for pack in PACKERS.values():
        assert broken(tmp_path, pack(many), Limits(max_entries=10)) == "too_many_entries"
        assert broken(tmp_path, pack(FILES), Limits(max_total_bytes=4000)) == "archive_too_large"
    for kind in ("zip", "tar.gz", "tar.xz"):
        assert broken(tmp_path, PACKERS[kind](flat)) == "archive_bomb"


def test_overlapping_zip_entries_are_a_bomb(tmp_path: Path) -> None:
    """Every directory record points at the same compressed data. zipfile refuses those whose name differs from that
    before the data, or that overlap, one by one; they still count."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = b"\0" * 10 * MIB
    deflated = body.compress(raw) + body.flush()
    crc = zlib.crc32(raw)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(deflated), len(raw), 1, 0) + b"a"
    directory = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(deflated), len(raw), 6, *[0] * 6)
        + b"%06d" % number
        for number in range(1000)
    )
    start = len(local) + len(deflated)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1000, 1000, len(directory), start, 0)
    refusals = []
    for member in opened(tmp_path, local + deflated + directory + end).members():
        with pytest.raises(InvalidInput) as caught:
            member.read()
        refusals.append(caught.value.code)
        if isinstance(caught.value, BadArchive):
            break
    assert refusals == ["corrupt_file"] * 6 + ["archive_bomb"]


def test_extended_tar_header_bomb(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    header = info.tobuf(tarfile.USTAR_FORMAT)
    data = gzip.compress(header + b"\0" * 20 * MIB)
    tracemalloc.start()
    assert broken(tmp_path, data) == "corrupt_archive"
    assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    tracemalloc.stop()


def extended(kind: bytes, content: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % 512)


def test_extended_tar_headers_are_cheap(tmp_path: Path) -> None:
    tar = packed_tar({"1.jpg": b"x"}, tarfile.GNU_FORMAT)
    path = extended(tarfile.XHDTYPE, b"14 path=a.jpg\n")
    assert contents(opened(tmp_path, path * 3 + tar)) == {"a.jpg": b"x"}
    assert broken(tmp_path, path * 100 + tar) == "corrupt_archive"
    assert broken(tmp_path, extended(tarfile.XHDTYPE, b"1" * MIB) + tar) == "corrupt_archive"  # not after an hour
    negative = extended(tarfile.XHDTYPE, b"14 size=-1024\n")
    assert broken(tmp_path, negative + tar) == "corrupt_archive"


def test_global_tar_headers_do_not_pile_up(tmp_path: Path) -> None:
    tar = packed_tar({"1.jpg": b"x"}, tarfile.GNU_FORMAT)[:1024]
    parts = (extended(tarfile.XGLTYPE, b"60014 k%05d=" % number + b"v" * 60_000 + b"\n") + tar for number in range(50))
    path = tmp_path / "upload"
    path.write_bytes(b"".join(parts) + b"\0" * 1024)
    tracemalloc.start()
    assert len(contents(open_archive(path))) == 1
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_xz_that_asks_for_gigabytes(tmp_path: Path) -> None:
    data = bytearray(lzma.compress(packed_tar(FILES)))
    end = 12 + (data[12] + 1) * 4
    data[data.index(b"\x21\x01", 12) + 2] = 40  # the dictionary: 4 GiB
    data[end - 4 : end] = struct.pack("<L", zlib.crc32(data[12 : end - 4]))
    with pytest.raises(BadArchive):
        contents(opened(tmp_path, bytes(data)))


def test_a_zip_directory_of_gigabytes(tmp_path: Path) -> None:
    path, size = tmp_path / "upload", 1 << 30
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(size + 4)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 4, 0))
    tracemalloc.start()
    with pytest.raises(BadArchive) as caught:
        open_archive(path).names()
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()
    assert caught.value.code == "too_many_entries"


def test_archives_inside_are_only_files(tmp_path: Path) -> None:
    inner = packed_zip({"../evil.jpg": b"x"})
    assert contents(opened(tmp_path, packed_zip({"cat/inner.zip": inner}))) == {"cat/inner.zip": inner}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.8])
def test_a_cut_off_archive_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    data = PACKERS[kind]({f"cat/{i}.jpg": random.Random(i).randbytes(3000) for i in range(20)})
    assert broken(tmp_path, data[: int(len(data) * part)]) == "truncated_archive"


def test_a_tar_cut_exactly_between_two_files_is_refused(tmp_path: Path) -> None:
    assert broken(tmp_path, packed_tar(FILES)[:2560]) == "truncated_archive"


def test_damaged_compressed_tar_is_refused(tmp_path: Path) -> None:
    for kind in ("tar.gz", "tar.bz2", "tar.xz"):
        data = bytearray(PACKERS[kind]({f"{i}.jpg": random.Random(i).randbytes(30_000) for i in range(35)}))
        data[-1000:-900] = b"\x55" * 100
        assert broken(tmp_path, bytes(data)) in {"corrupt_archive", "truncated_archive"}


def test_concatenated_and_padded_xz(tmp_path: Path) -> None:
    tar = packed_tar(FILES)
    data = lzma.compress(tar[:700]) + b"\0" * 8 + lzma.compress(tar[700:]) + b"\0" * 4
    assert contents(opened(tmp_path, data)) == FILES


@pytest.mark.parametrize(
    ("data", "code", "word"),
    [
        (b"", "empty_file", "empty"),
        (b"Rar!\x1a\x07\x00" + b"x" * 600, "unsupported_archive", "RAR"),
        (b"7z\xbc\xaf\x27\x1c" + b"x" * 600, "unsupported_archive", "7z"),
        (b"\xff\xd8\xff\xe0" + b"x" * 600, "unsupported_archive", "zip, tar"),
        (gzip.compress(b"only text, " * 100, mtime=0), "unsupported_archive", "zip, tar"),
        (gzip.compress(b"short", mtime=0), "truncated_archive", "no tar"),
    ],
)
def test_other_uploads_are_refused(tmp_path: Path, data: bytes, code: str, word: str) -> None:
    with pytest.raises(BadArchive, match=word) as caught:
        opened(tmp_path, data)
    assert caught.value.code == code


def test_empty_archives_have_no_names(tmp_path: Path) -> None:
    assert opened(tmp_path, packed_zip({})).names() == []
    assert opened(tmp_path, packed_tar({})).names() == []


def test_big_entries_use_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    noise = os.urandom(MIB)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for number in range(30):
            info = tarfile.TarInfo(f"c/{number}.jpg")
            info.size = MIB
            tar.addfile(info, io.BytesIO(noise))
    tracemalloc.start()
    assert sum(len(member.read()) for member in open_archive(path).members()) == 30 * MIB
    assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    tracemalloc.stop()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.from_regex(r"[a-zäß0-9 _%-]{1,12}/[a-z]{1,5}\.jpg", fullmatch=True), st.binary(max_size=2000), max_size=8
    ),
    st.sampled_from(sorted(PACKERS)),
)
def test_whatever_is_packed_comes_out(tmp_path: Path, files: dict[str, bytes], kind: str) -> None:
    archive = opened(tmp_path, PACKERS[kind](files))
    result = contents(archive)
    refused = {refusal.path for refusal in archive.report.refusals}
    assert result == {name: data for name, data in files.items() if name not in refused}
    assert set(codes(archive)) <= {"unsafe_path"}  # such as "%00" or "%2e"


SAMPLES = [pack(FILES) for pack in PACKERS.values()] + [packed_tar({"n" * 150: b"x"}, tarfile.GNU_FORMAT)]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.sampled_from([1.0, 1.0, 0.97, 0.5]),
)
def test_damaged_archives_only_raise_invalid_input(
    tmp_path: Path, data: bytes, edits: list[tuple[float, int]], part: float
) -> None:
    changed = bytearray(data)
    for where, value in edits:
        changed[int(where * len(changed))] = value
    try:
        for member in opened(tmp_path, bytes(changed[: int(part * len(changed))])).members():
            try:
                member.read()
            except BadArchive:
                raise
            except InvalidInput:
                continue
    except BadArchive:
        pass
