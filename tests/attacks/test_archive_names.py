"""Names in archives that would lead somewhere if a file were written under them. None is; but a name becomes an image's
identity, is shown and exported, so those that lead out are refused one by one and the rest goes on."""

import tarfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shared.datasets.layout import plan
from shared.datasets.paths import MAX_LENGTH, safe_path
from shared.datasets.report import Report
from shared.errors import InvalidInput
from tests.attacks.archives import GOOD, Zipped, member, outcome, tarred, zipped

OUT = {
    "parent": "../evil.jpg",
    "parent in the middle": "a/../../evil.jpg",
    "parent at the end": "a/..",
    "parent alone": "..",
    "dotted detour": "./.././evil.jpg",
    "absolute": "/etc/passwd",
    "absolute twice": "//etc/passwd",
    "drive letter": "C:/Windows/evil.jpg",
    "drive letter, relative": "c:evil.jpg",
    "UNC": "\\\\server\\share\\evil.jpg",
    "backslash parent": "..\\..\\evil.jpg",
    "backslash in the middle": "a\\b.jpg",
    "%2e": "%2e%2e/evil.jpg",
    "%2E%2F": "a/%2E%2E%2Fevil.jpg",
    "%5c": "a%5c..%5cevil.jpg",
    "%252e": "%252e%252e/evil.jpg",
    "%00": "evil%00.jpg",
    "new line": "cat/a\nb.jpg",
    "escape sequence": "cat/\x1b]0;evil\x07.jpg",
    "C1 control": "cat/\x9b2J.jpg",
    "full-width dots": "\uff0e\uff0e/evil.jpg",
    "one-dot leaders": "\u2024\u2024/evil.jpg",
    "two-dot leader": "\u2025/evil.jpg",
    "full-width slashes": "a\uff0f..\uff0fevil.jpg",
    "division slashes": "a\u2215..\u2215evil.jpg",
    "fraction slash": "..\u2044evil.jpg",
    "full-width backslash": "..\uff3cevil.jpg",
    "too long": "x" * (MAX_LENGTH + 1),
    "very long": "a/" * 30_000 + "evil.jpg",
}
# Odd, but they lead nowhere: names are never opened.
IN = {
    "device": "CON",
    "device with a suffix": "cat/NUL.jpg",
    "stream": "cat/a.jpg:hidden",
    "trailing dot and space": "cat./a .jpg",
    "tilde": "~/a.jpg",
    "shell": "cat/$(reboot);`id`|x.jpg",
    "option": "--checkpoint=1/-rf.jpg",
    "dots": "cat.../a..b.jpg",
    "ellipsis": "cat/\u2026.jpg",
    "full-width slash in a name": "\u72ac\uff0f\u732b/1.jpg",
    "right to left": "cat/\u202egpj.exe",
    "deep": "/".join("d" * 500),
    "percent": "100%/50%2.jpg",
}


def packed(kind: str, name: str) -> bytes:
    if kind == "zip":
        return zipped(Zipped(name.encode()), Zipped(GOOD[0].encode(), GOOD[1]))
    form = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[kind]
    return tarred(member(name), member(*GOOD), form=form)


@pytest.mark.parametrize("kind", ["zip", "gnu", "pax"])
@pytest.mark.parametrize("name", OUT.values(), ids=OUT)
def test_a_name_that_leads_out_is_refused_and_the_rest_is_read(tmp_path: Path, kind: str, name: str) -> None:
    found = outcome(tmp_path, packed(kind, name))
    assert (found.files, found.refused, found.broken) == (dict([GOOD]), {"unsafe_path": 1}, None)


@pytest.mark.parametrize("kind", ["zip", "gnu", "pax"])
@pytest.mark.parametrize("name", IN.values(), ids=IN)
def test_a_name_that_is_only_odd_is_a_name(tmp_path: Path, kind: str, name: str) -> None:
    found = outcome(tmp_path, packed(kind, name))
    expected = {unicodedata.normalize("NFC", name): b"evil"} | dict([GOOD])
    assert (found.files, found.refused, found.broken) == (expected, {}, None)


RAW = {  # bytes that a decoder may take for dots, slashes or an end
    "NUL": b"cat/a.jpg\0../../evil",
    "overlong dot": b"\xc0\xae\xc0\xae/evil.jpg",
    "overlong slash": b"..\xc0\xafevil.jpg",
    "overlong in three bytes": b"\xe0\x80\xae\xe0\x80\xae/evil.jpg",
    "half a surrogate": b"cat/\xed\xa0\x80.jpg",
    "cut off": b"cat/\xf0\x9f\x98",
    "UTF-7": b"+AC4ALg-/evil.jpg",
    "empty": b"",
    "slash alone": b"/",
}


@pytest.mark.parametrize("flags", [0x800, 0], ids=["said to be UTF-8", "code page 437"])
@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_bytes_that_are_no_utf8_never_become_dots_or_slashes(tmp_path: Path, raw: bytes, flags: int) -> None:
    for data in (zipped(Zipped(raw, flags=flags), Zipped(b"cat/good.jpg", b"good")), raw_tar(raw)):
        found = outcome(tmp_path, data)
        assert found.broken in (None, "corrupt_archive")
        assert all(stays_inside(path) for path in found.files)
        assert found.broken or found.files["cat/good.jpg"] == b"good"


def raw_tar(name: bytes) -> bytes:
    """The name stands in the header as it is; a tar's ends at a NUL."""
    return tarred(member(name.decode("utf-8", "surrogateescape")), member(*GOOD))


def stays_inside(path: str) -> bool:
    parts = path.split("/")
    return (
        not {"", ".", ".."} & set(parts)
        and "\\" not in path
        and path == unicodedata.normalize("NFC", path)
        and not any(unicodedata.category(c) in {"Cc", "Cs"} for c in path)
    )


def test_names_that_differ_in_their_form_only_are_one(tmp_path: Path) -> None:
    found = outcome(tmp_path, zipped(Zipped("cat/\u00e9.jpg".encode(), b"1"), Zipped("cat/e\u0301.jpg".encode(), b"2")))
    assert (found.files, found.refused) == ({"cat/\u00e9.jpg": b"1"}, {"duplicate_path": 1})


def test_names_that_differ_in_case_only_are_two_files_but_not_two_classes(tmp_path: Path) -> None:
    found = outcome(tmp_path, zipped(Zipped(b"cat/A.jpg", b"1"), Zipped(b"cat/a.jpg", b"2")))
    assert found.files == {"cat/A.jpg": b"1", "cat/a.jpg": b"2"}
    with pytest.raises(InvalidInput) as refused:
        plan(["Cat/1.jpg", "cat/1.jpg", "dog/1.jpg"], {}, (), Report())
    assert refused.value.code == "class_names_collide"


odd = st.sampled_from(
    ["..", ".", "/", "\\", "%2e", "%2F", "%25", "\uff0e", "\uff0f", "\u2025", "\u2215", "\0", "a", "C:", "e\u0301"]
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(odd | st.text(max_size=3), max_size=8).map("".join))
@example("a/%252e%252e/b")
def test_any_text_is_refused_or_made_a_path_that_stays_inside_and_stays_itself(name: str) -> None:
    try:
        path = safe_path(name)
    except InvalidInput:
        return
    assert stays_inside(path)
    assert safe_path(path) == path
