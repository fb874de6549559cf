"""Captions from files: every format, every bad entry on its own, matched without guessing; and out again."""

import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.captioner.transfer.export import WRITERS, Exported, as_json
from services.captioner.transfer.json_elements import MAX_ELEMENT, elements
from services.captioner.transfer.parse import MAX_CAPTION, MAX_LINE, Entry, Refused, check, guess, read
from shared.datasets.limits import BadArchive
from shared.errors import InvalidInput
from shared.schemas.captions import TransferFormat

Read = Callable[[TransferFormat, bytes | str], list[Entry | Refused]]


@pytest.fixture
def parsed(tmp_path: Path) -> Read:
    def run(format: TransferFormat, content: bytes | str) -> list[Entry | Refused]:
        path = tmp_path / "upload"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read(path, format))

    return run


def triples(found: Iterable[Entry | Refused]) -> list[tuple[str, str, str]]:
    return [(e.name, e.text, e.characteristic) for e in found if isinstance(e, Entry)]


def codes(found: Iterable[Entry | Refused]) -> list[tuple[str, str]]:
    return [(r.where, r.code) for r in found if isinstance(r, Refused)]


def zipped(files: dict[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return out.getvalue()


# -- what each format may look like ------------------------------------------------------------------------------------


def test_json_keyed_by_image(parsed: Read) -> None:
    content = {
        "cat/1.png": "a soft coat",
        "cat/2.png": ["one", "two"],
        "cat/3.png": [{"caption": "round", "characteristic": "shape"}, {"text": "plain"}, "bare"],
        "cat/4.png": {"caption": "alone", "characteristic": "color"},
    }
    assert triples(parsed("json", json.dumps(content))) == [
        ("cat/1.png", "a soft coat", "imported"),
        ("cat/2.png", "one", "imported"),
        ("cat/2.png", "two", "imported"),
        ("cat/3.png", "round", "shape"),
        ("cat/3.png", "plain", "imported"),
        ("cat/3.png", "bare", "imported"),
        ("cat/4.png", "alone", "color"),
    ]


RECORDS: list[dict[str, Any]] = [
    {"file_name": "1.png", "caption": "one", "label": "cat", "score": 12345678901234567890},
    {"path": "cat/2.png", "captions": ["two", {"caption": "deux", "characteristic": "french"}]},
    {"image": "3.png", "text": "three", "characteristic": "shape"},
    {"image": {"bytes": None}, "file_name": "4.png", "caption": None, "text": "four", "characteristic": None},
]
OF_RECORDS = [
    ("1.png", "one", "imported"),
    ("cat/2.png", "two", "imported"),
    ("cat/2.png", "deux", "french"),
    ("3.png", "three", "shape"),
    ("4.png", "four", "imported"),
]


def test_a_json_list_and_jsonl_hold_the_same_records(parsed: Read) -> None:
    lines = "".join(json.dumps(record) + "\n\n" for record in RECORDS)
    assert triples(parsed("json", json.dumps(RECORDS, indent=2))) == OF_RECORDS
    assert triples(parsed("jsonl", lines)) == OF_RECORDS
    assert triples(parsed("jsonl", lines.rstrip().replace("\n", "\r\n"))) == OF_RECORDS


def test_a_repeated_key_of_a_json_object_loses_nothing(parsed: Read) -> None:
    assert triples(parsed("json", '{"a": "one", "a": "two"}')) == [("a", "one", "imported"), ("a", "two", "imported")]


def test_csv_of_an_image_folder(parsed: Read) -> None:
    content = 'file_name,label,caption\r\n1.png,cat,"soft, ""very"" soft"\r\n\r\n2.png,dog,"two\nlines"\r\n'
    assert triples(parsed("csv", content)) == [
        ("1.png", 'soft, "very" soft', "imported"),
        ("2.png", "two\nlines", "imported"),
    ]
    assert triples(parsed("csv", "Text , PATH,characteristic\nround,cat/1.png,shape\nplain,cat/2.png,\n")) == [
        ("cat/1.png", "round", "shape"),
        ("cat/2.png", "plain", "imported"),
    ]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_sidecars_give_one_caption_per_line(parsed: Read, kind: str) -> None:
    files = {"cat/1.txt": "one\r\n\r\n  two \n", "cat/1.png": "not read", "._x.txt": "litter", "2.TXT": "\ufeffthree"}
    if kind == "zip":
        data = zipped(dict(files))
    else:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as target:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                target.addfile(info, io.BytesIO(text.encode()))
        data = out.getvalue()
    found = parsed("txt", data)
    assert triples(found) == [
        ("cat/1.txt", "one", "imported"),
        ("cat/1.txt", "two", "imported"),
        ("2.TXT", "three", "imported"),
    ]
    assert [e.where for e in found if isinstance(e, Entry)] == [
        "cat/1.txt, line 1",
        "cat/1.txt, line 3",
        "2.TXT, line 1",
    ]
    assert all(e.sidecar for e in found if isinstance(e, Entry))


@pytest.mark.parametrize("format", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_no_content(parsed: Read, format: TransferFormat) -> None:
    text = {"json": '{"1.png": "ü"}', "jsonl": '{"path": "1.png", "text": "ü"}', "csv": "path,text\n1.png,ü\n"}[format]
    for encoding in ("utf-8", "utf-8-sig"):
        assert triples(parsed(format, text.encode(encoding))) == [("1.png", "ü", "imported")]


# -- what cannot be used ----------------------------------------------------------------------------------------------


def test_bad_lines_of_jsonl_are_refused_one_by_one(parsed: Read) -> None:
    lines = [
        b'{"path": "1.png", "caption": "good"}',
        b'{"path": "1.png", "caption": ',
        b"[1]",
        b'{"caption": "no name"}',
        b'{"path": "1.png"}',
        b'{"path": "1.png", "caption": " "}',
        b'{"path": "1.png", "caption": 7}',
        b'{"path": "1.png", "caption": "\xff"}',
        b'{"path": "1.png", "caption": "\\u0000"}',
        b'{"path": "1.png", "caption": "\\ud800"}',
        b'{"path": "1.png", "captions": []}',
        b'{"path": "1.png", "caption": "' + b"x" * (MAX_CAPTION + 1) + b'"}',
        b'{"path": "1.png", "caption": "' + b"x" * MAX_LINE + b'"}',
        b"[" * 100_000,
        b'{"path": "1.png", "caption": "x", "characteristic": "' + b"c" * 41 + b'"}',
        b'{"path": "1.png", "caption": "last"}',
    ]
    found = parsed("jsonl", b"\n".join(lines))
    assert [text for _, text, _ in triples(found)] == ["good", "last"]
    assert codes(found) == [
        ("line 2", "broken_json"),
        ("line 3", "not_a_record"),
        ("line 4", "bad_name"),
        ("line 5", "empty_caption"),
        ("line 6", "empty_caption"),
        ("line 7", "not_text"),
        ("line 8", "not_text"),
        ("line 9", "not_text"),
        ("line 10", "not_text"),
        ("line 11", "empty_caption"),
        ("line 12", "caption_too_long"),
        ("line 13", "line_too_long"),
        ("line 14", "broken_json"),
        ("line 15", "bad_characteristic"),
    ]


def test_bad_lines_of_csv_are_refused_one_by_one(parsed: Read) -> None:
    lines = [b"path,caption", b"1.png,good", b"2.png,a,b", b'3.png,"a"b', b"4.png,", b"5.png,\xe9t\xe9", b"6.png,last"]
    found = parsed("csv", b"\n".join(lines))
    assert [text for _, text, _ in triples(found)] == ["good", "last"]
    assert codes(found) == [
        ("line 3", "wrong_width"),
        ("line 4", "broken_csv"),
        ("line 5", "empty_caption"),
        ("line 6", "not_text"),
    ]


def test_an_unclosed_quote_of_csv_is_told_where_it_began(parsed: Read) -> None:
    assert codes(parsed("csv", 'path,caption\n1.png,ok\n2.png,"open\n3.png,x\n')) == [("line 3", "broken_csv")]
    long = 'path,caption\n1.png,"' + "x\n" * 100_000 + "2.png,after\n"
    assert triples(parsed("csv", long))[-1:] == [("2.png", "after", "imported")], "it swallows a bounded part"


@pytest.mark.parametrize("header", ["file_name;caption", "file_name,label", "caption,label", '"open', ""])
def test_csv_without_its_columns_is_refused_as_a_whole(parsed: Read, header: str) -> None:
    with pytest.raises(InvalidInput, match="first line must name") as refused:
        parsed("csv", f"{header}\na,b\n")
    assert refused.value.code == "missing_column"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"a": "x",\n"b": }', "an entry is no JSON (line 2)"),
        ('{"a": "x"\n"b": "y"}', 'expected , or }, not " (line 2)'),
        ('{"a": "x"', "it ends too early (line 1)"),
        ('["a", ]', "an entry is no JSON (line 1)"),
        ('{"a": "x"}\n{"b": "y"}', "something follows its end; is it JSONL? (line 2)"),
        ('"text"', 'expected { or [, not " (line 1)'),
        ("{1: 2}", "a key in quotes is missing (line 1)"),
        ('{"a": ' + "[" * 100_000, "it is nested too deeply (line 1)"),
        ('["' + "x" * (3 * MAX_ELEMENT), f"an entry is no JSON, or longer than {MAX_ELEMENT:,} characters (line 1)"),
    ],
)
def test_broken_json_is_refused_as_a_whole_with_its_line(parsed: Read, content: str, why: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parsed("json", content)
    assert refused.value.message == f"The file is no valid JSON: {why}."
    assert refused.value.code == "broken_json"


def test_entries_of_json_are_refused_one_by_one(parsed: Read) -> None:
    found = parsed("json", '[{"path": "1", "text": "good"}, 7, "bare", {"path": 1, "text": "x"}]')
    assert codes(found) == [("entry 2", "not_a_record"), ("entry 3", "not_a_record"), ("entry 4", "bad_name")]
    assert codes(parsed("json", b'{"1.png": "\xff", "2.png": null}')) == [
        ("entry 1", "not_text"),
        ("entry 2", "empty_caption"),
    ]


def test_hostile_sidecars_are_refused_one_by_one(parsed: Read) -> None:
    files: dict[str, bytes | str] = {
        "../up.txt": "x",
        "big.txt": "x" * 2_000_000,
        "blank.txt": " \n",
        "latin.txt": b"caf\xe9",
        "good.txt": "good",
    }
    found = parsed("txt", zipped(files))
    assert triples(found) == [("good.txt", "good", "imported")]
    assert {code for _, code in codes(found)} == {"unsafe_path", "file_too_large", "empty_caption", "not_text"}
    with pytest.raises(BadArchive, match="times its size"):
        parsed("txt", zipped({f"{i}.txt": " " * 1_000_000 for i in range(70)}))


def test_an_archive_without_sidecars_is_told(parsed: Read) -> None:
    with pytest.raises(InvalidInput, match=r"holds no \.txt file"):
        parsed("txt", zipped({"1.png": b"x"}))


# -- the format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("captions.json", b'{"1.png": "x"}', "json"),
        ("captions.json", b'[{"path": "1.png"}]', "json"),
        ("captions.json", b'{"path": "1.png", "caption": "x"}\n{"path": "2.png", "caption": "y"}\n', "jsonl"),
        ("captions", b'\xef\xbb\xbf  {"1.png": "x"}', "json"),
        ("metadata.jsonl", b"{", "jsonl"),
        ("METADATA.CSV", b"anything", "csv"),
        ("captions", b'"file_name",label,"caption"\n', "csv"),
        ("sidecars.zip", zipped({"a.txt": "x"}), "txt"),
        ("captions", zipped({"a.txt": "x"}), "txt"),
    ],
)
def test_the_format_is_guessed(name: str, content: bytes, format: str) -> None:
    file = io.BytesIO(content)
    assert guess(file, name) == format
    assert file.tell() == 0


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("1.txt", b"a caption", "unknown_format"),
        ("photo.png", b"\x89PNG\r\n\x1a\n", "unknown_format"),
        ("captions.json", b" \n", "empty_file"),
        ("captions.csv", "path,text".encode("utf-16"), "not_utf8"),
        ("sidecars.zip", b"PK, but no zip", "unsupported_archive"),
        ("x.tgz", b"\x1f\x8bdamaged", "truncated_archive"),
    ],
)
def test_what_has_no_format_is_refused_at_once(name: str, content: bytes, code: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        guess(io.BytesIO(content), name)
    assert refused.value.code == code


def test_a_format_that_is_given_is_checked_too() -> None:
    check(io.BytesIO(b"{"), "json")
    with pytest.raises(BadArchive):
        check(io.BytesIO(b"one caption"), "txt")
    with pytest.raises(InvalidInput, match="empty"):
        check(io.BytesIO(b""), "json")


def test_json_is_read_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("w") as out:
        out.write("[")
        out.writelines(f'{{"path": "cat/{i}.png", "caption": "{"soft " * 40}"}},\n' for i in range(40_000))
        out.write('{"path": "last.png", "caption": "x"}]')
    assert path.stat().st_size > 8_000_000
    tracemalloc.start()
    count = sum(1 for _ in read(path, "json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 40_001
    assert peak < 2_000_000


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.lists(JSON, max_size=6) | st.dictionaries(st.text(max_size=5), JSON, max_size=6), st.sampled_from([None, 1]))
def test_elements_are_what_json_loads_gives(value: Any, indent: int | None) -> None:
    found = list(elements(io.BytesIO(json.dumps(value, indent=indent).encode())))
    expected = list(value.items()) if isinstance(value, dict) else [(None, each) for each in value]
    assert found == expected


@given(st.binary(max_size=200), st.sampled_from(["json", "jsonl", "csv", "txt"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_do_more_than_be_refused(tmp_path: Path, content: bytes, format: TransferFormat) -> None:
    path = tmp_path / "upload"
    path.write_bytes(content)
    try:
        for found in read(path, format):
            found.where.encode()  # may be stored and shown
            if isinstance(found, Entry):
                (found.name + found.text + found.characteristic).encode()
    except InvalidInput:
        pass


# -- out and in again --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60).filter(
    lambda text: bool(text.strip())
)
CAPTIONS = st.lists(st.tuples(TEXT.map(str.strip), st.sampled_from(["visual", "shape"])), min_size=1, max_size=3)


def images(captions: list[list[tuple[str, str]]]) -> Iterator[Exported]:
    for i, each in enumerate(captions):
        rows = [
            {"caption": t, "characteristic": c, "flags": ["duplicate", "empty"], "excluded": c == "shape"}
            for t, c in each
        ]
        yield Exported(f"cat/{i}.png", f"cat/{i}.txt", rows)


@given(st.lists(CAPTIONS, min_size=1, max_size=4), st.sampled_from(["json", "jsonl", "csv", "txt"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_exported_is_imported_as_it_was(
    tmp_path: Path, captions: list[list[tuple[str, str]]], format: TransferFormat
) -> None:
    path = tmp_path / "export"
    path.write_bytes(b"".join(WRITERS[format](images(captions))))
    found = list(read(path, format))
    assert codes(found) == []
    if format == "txt":
        texts = [(i, t.replace("\r", " ").replace("\n", " ")) for i, each in enumerate(captions) for t, _ in each]
        expected = [(f"cat/{i}.txt", text, "imported") for i, text in texts]
    else:
        expected = [(f"cat/{i}.png", t, c) for i, each in enumerate(captions) for t, c in each]
    assert triples(found) == expected
    excluded = [entry.excluded for entry in found if isinstance(entry, Entry)]
    assert excluded == [format != "txt" and c == "shape" for each in captions for _, c in each]
    with path.open("rb") as file:
        assert guess(file, path.name) == format, "nor need its format be told"


@pytest.mark.parametrize(
    ("format", "content", "excluded"),
    [
        ("json", '{"1.png": [{"text": "a", "excluded": true}, {"text": "b", "excluded": null}, "c"]}', [1, 0, 0]),
        ("json", '[{"path": "1.png", "caption": ["a", {"text": "b", "excluded": false}], "excluded": true}]', [1, 0]),
        ("json", '{"1.png": [{"text": "a", "excluded": "true"}, {"text": "b", "excluded": 1}]}', []),
        ("jsonl", '{"path": "1.png", "text": "a", "excluded": true}\n{"path": "1.png", "text": "b"}', [1, 0]),
        ("csv", "path,Excluded,text\n1.png,TRUE,a\n1.png, false ,b\n1.png,,c\n1.png,maybe,d\n", [1, 0, 0]),
    ],
)
def test_what_is_excluded_is_true_or_false(
    parsed: Read, format: TransferFormat, content: str, excluded: list[int]
) -> None:
    found = parsed(format, content)
    assert [entry.excluded for entry in found if isinstance(entry, Entry)] == [bool(each) for each in excluded]
    assert {code for _, code in codes(found)} <= {"bad_excluded"}


def test_of_two_columns_of_one_name_the_first_counts(parsed: Read) -> None:
    assert triples(parsed("csv", "path,text,text,x,x\n1.png,a,b,c,d\n")) == [("1.png", "a", "imported")]


def test_an_export_of_nothing_is_still_of_its_format() -> None:
    assert json.loads(b"".join(WRITERS["json"]([]))) == {}
    assert b"".join(WRITERS["csv"]([])) == b"file_name,caption,characteristic,flags,excluded\r\n"
    assert zipfile.ZipFile(io.BytesIO(b"".join(WRITERS["txt"]([])))).namelist() == []


def test_json_goes_out_image_by_image() -> None:
    endless = (Exported(f"{i}.png", f"{i}.txt", [{"caption": "x"}]) for i in iter(int, 1))
    first = next(as_json(endless))
    assert first.startswith(b'{\n"0.png": [{"caption"')
