"""Arbitrary bytes and text through every parser of what users write: nothing but InvalidInput comes out, and what is
understood keeps its promises. (Splits, templates, layouts and captions have more of these beside their own tests.)"""

import csv
import io
import json
import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from services.captioner.prompts import FIELDS, check_template, render
from services.captioner.transfer.parse import Entry, guess, read
from shared.datasets import metadata
from shared.datasets.classes import class_name
from shared.datasets.layout import plan
from shared.datasets.report import Report
from shared.datasets.splits import Labelled
from shared.errors import InvalidInput
from shared.schemas.captions import Template
from tests.attacks.archives import Zipped, outcome, tarred, zipped
from tests.on_lists import assign

quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)
COLUMNS = st.permutations(["file_name", "label", "caption", "split"])


# -- archives ----------------------------------------------------------------------------------------------------------

numbers = st.none() | st.sampled_from([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1)
entries = st.builds(
    Zipped,
    name=st.binary(max_size=12) | st.sampled_from([b"../x", b"/x", b"a/b.jpg", b"metadata.csv"]),
    data=st.binary(max_size=60),
    flags=st.sampled_from([0, 1, 8, 0x41, 0x800, 0x808]),
    method=st.sampled_from([0, 8, 8, 8, 9, 99]),
    size=numbers,
    packed=numbers,
    crc=st.none() | st.just(0),
    offset=numbers,
    mode=st.sampled_from([0, 0o100644, 0o120777, 0o040755, 0o020666]),
    extra=st.sampled_from([b"", b"\1\0\x08\0" + b"\xff" * 8, b"\1\0\xff\xff", b"\1\0", b"\x75\x70\5\0\1abcd"]),
    local_name=st.none() | st.binary(max_size=5),
    local_method=st.none() | st.sampled_from([0, 8, 99]),
)


@quick
@given(st.lists(entries, max_size=4), st.binary(max_size=30), st.none() | st.integers(0, 65535))
def test_any_zip_directory_is_read_alike_twice_or_refused(
    tmp_path: Path, made: list[Zipped], comment: bytes, count: int | None
) -> None:
    """`outcome` allows nothing but InvalidInput, and wants both passes to agree."""
    data = zipped(*made, comment=comment, count=count)
    found = outcome(tmp_path, data)
    assert sum(map(len, found.files.values())) <= sum(len(each.data) for each in made) + len(data) * 4


@quick
@given(
    st.lists(st.tuples(text, st.sampled_from(list(b"0123456LKSxgVM7")), st.binary(max_size=40), text), max_size=5),
    st.binary(max_size=600),
)
def test_any_tar_is_read_alike_twice_or_refused(
    tmp_path: Path, made: list[tuple[str, int, bytes, str]], tail: bytes
) -> None:
    members = []
    for name, kind, data, link in made:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = bytes([kind]), link
        members.append((info, data))
    outcome(tmp_path, tarred(*members, form=tarfile.PAX_FORMAT) + tail)


@quick
@given(
    st.sampled_from([b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b""]),
    st.binary(max_size=1200),
)
def test_any_bytes_are_an_archive_or_refused(tmp_path: Path, magic: bytes, tail: bytes) -> None:
    assert outcome(tmp_path, magic + tail).files.keys() == set() or magic == b""


# -- tables ------------------------------------------------------------------------------------------------------------


@quick
@given(st.binary(max_size=400) | text.map(str.encode), st.sampled_from(["csv", "jsonl"]))
@example(b"\xff\xfe", "csv")
@example(b'{"file_name": 1e999, "label": NaN}', "jsonl")
@example(b"file_name,label\n" + b'"' * 200_000, "csv")
def test_any_table_is_rows_or_invalid_input(content: bytes, suffix: str) -> None:
    for head in (b"", b"file_name,label\n", b'{"file_name": "a", "label": "b"}\n'):
        with suppress(InvalidInput):
            for row in metadata.parse(f"metadata.{suffix}", head + content):
                joined = row.file_name + row.label + row.caption + row.split
                assert "\0" not in joined
                joined.encode()  # no lone surrogate


@quick
@given(
    st.lists(st.fixed_dictionaries({"file_name": words, "label": words, "caption": text, "split": text}), max_size=6),
    COLUMNS,
)
def test_tables_come_back_as_they_were_written(rows: list[dict[str, str]], columns: list[str]) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(rows)
    rows = [{key: value.strip() for key, value in row.items()} for row in rows]
    lines = "".join(json.dumps({key: row[key] for key in columns}) + "\n" for row in rows)
    if not any("\0" in value for row in rows for value in row.values()):
        for name, content in (("metadata.csv", out.getvalue()), ("metadata.jsonl", lines)):
            found = [
                {"file_name": r.file_name, "label": r.label, "caption": r.caption, "split": r.split}
                for r in metadata.parse(name, content.encode())
            ]
            assert found == rows, name


@quick
@given(
    st.binary(max_size=600),
    st.sampled_from(["json", "jsonl", "csv"]),
    st.sampled_from([b"", b"[", b"{", b"file_name,caption\n", b'{"a.jpg": [']),
)
@example(b"[" * 100_000, "json", b"")
@example(b'{"a":' * 100_000, "jsonl", b"")
@example(b"9" * 6000 + b"]", "json", b"[")
@example(b'{"path": "\\ud800", "text": "\\udfff"}]', "json", b"[")
def test_any_captions_file_is_entries_or_invalid_input(
    tmp_path: Path, content: bytes, format: str, head: bytes
) -> None:
    path = tmp_path / "captions"
    path.write_bytes(head + content)
    with suppress(InvalidInput), path.open("rb") as file:
        guess(file, "captions")
    with suppress(InvalidInput):
        for found in read(path, format):  # type: ignore[arg-type]
            if isinstance(found, Entry):
                (found.name + found.text + found.characteristic).encode()
                assert found.text.strip()
                assert "\0" not in found.name + found.text


# -- names, templates, splits ------------------------------------------------------------------------------------------


@quick
@given(st.text(max_size=250))
def test_any_class_name_is_a_name_or_invalid_input(raw: str) -> None:
    with suppress(InvalidInput):
        name = class_name(raw)
        assert name == name.strip()
        assert 0 < len(name) <= 200
        assert class_name(name) == name
        name.encode()


@quick
@given(
    st.text("{}[]().!:%$0123456789_abcdefgilmnopqrstuvwxyz \n", min_size=1, max_size=200),
    *[st.text(max_size=20)] * 2,
)
@example("{0.__class__.__mro__}", "a", "b")
@example("{class_name.__init__.__globals__}", "a", "b")
@example("{class_name!r:>1000000000}", "a", "b")
@example("%(class_name)1000000000s ${domain} {{7*7}}", "a", "b")
def test_a_template_is_text_with_four_names_in_it(template: str, name: str, domain: str) -> None:
    """No attribute, no conversion, no width, no second look at what was filled in."""
    given = Template(name="mine", template=template)
    with suppress(InvalidInput):
        check_template(given)
    expected = template
    values = {"class_name": name, "domain": domain, "words": "9", "characteristic": "mine"}
    marks = {field: chr(0xE000 + n) for n, field in enumerate(FIELDS)}
    for field in FIELDS:
        expected = expected.replace("{" + field + "}", marks[field])
    expected = "".join(
        values[FIELDS[ord(c) - 0xE000]] if 0xE000 <= ord(c) < 0xE000 + len(FIELDS) else c for c in expected
    )
    assert render(given, class_name=name, domain=domain, words=9) == expected


@quick
@given(
    st.lists(
        st.tuples(words, st.sampled_from("abc"), st.sampled_from([None, "train", "val", "test"])),
        max_size=40,
        unique_by=lambda item: item[0],
    ),
    st.integers(0, 2**31),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_splits_are_a_partition_stratified_and_deterministic(
    made: list[tuple[str, str, str | None]], seed: int, val: float, test: float
) -> None:
    items = [Labelled(path, label, split) for path, label, split in made]  # type: ignore[arg-type]
    drawn = assign(items, seed, val, test)
    assert len(drawn) == len(items)
    assert drawn == assign(items, seed, val, test)
    again = dict(zip(reversed([item.path for item in items]), assign(items[::-1], seed, val, test), strict=True))
    assert [again[item.path] for item in items] == drawn
    for held, fraction in (("val", val), ("test", test)):
        if any(item.split == held for item in items):
            continue
        for label in "abc":
            pool = sum(item.class_name == label and item.split in (None, "train") for item in items)
            count = Counter((i.class_name, s) for i, s in zip(items, drawn, strict=True))[label, held]
            assert count <= max(1, round(fraction * pool + 0.5))
            assert pool == 0 or count < pool


@quick
@given(st.lists(words, max_size=8, unique=True), st.binary(max_size=200), text)
def test_any_layout_is_a_plan_or_invalid_input(names: list[str], table: bytes, label: str) -> None:
    rows = "".join(json.dumps({"file_name": name, "label": label}) + "\n" for name in [*names, "../../etc/passwd"])
    for tables in ({}, {"metadata.csv": table}, {"a/metadata.jsonl": rows.encode()}):
        report = Report()
        with suppress(InvalidInput):
            found = plan([*names, *tables], tables, (), report)
            assert {item.source for item in found.items} <= set(names)
        json.dumps(report.as_dict()).encode()
