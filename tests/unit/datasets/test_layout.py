import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.datasets import layout
from shared.datasets.layout import Plan, plan
from shared.datasets.report import Report
from shared.errors import InvalidInput


def planned(*names: str, directories: tuple[str, ...] = (), **metadata: str) -> tuple[Plan, Report]:
    """Metadata as keyword: csv= or jsonl= in the root."""
    report = Report()
    content = {f"metadata.{kind}": text.encode() for kind, text in metadata.items()}
    return plan([*names, *content], content, directories, report), report


def labels(result: Plan) -> dict[str, tuple[str, str | None]]:
    return {item.path: (item.class_name, item.split) for item in result.items}


def error(*names: str, **metadata: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        planned(*names, directories=(), **metadata)
    return caught.value.code


def refused(report: Report) -> dict[str, str]:
    return {refusal.path: refusal.code for refusal in report.refusals}


def test_class_folders() -> None:
    result, report = planned("cat/1.jpg", "dog/1.jpg", "README.txt", "cat/more/3.jpg")
    assert result.layout == "class/file"
    assert labels(result) == {"cat/1.jpg": ("cat", None), "dog/1.jpg": ("dog", None)}
    assert refused(report) == {"README.txt": "stray_file", "cat/more/3.jpg": "too_deep"}


def test_split_folders_by_any_name() -> None:
    names = ["Training/cat/1.jpg", "valid/cat/1.jpg", "dev/cat/2.jpg", "testing/cat/1.jpg", "train/dog/1.jpg"]
    result, report = planned(*names, "extra/dog/1.jpg", "test/2.jpg")
    assert result.layout == "split/class/file"
    assert [item.split for item in result.items] == ["train", "val", "val", "test", "train"]
    assert result.classes == ["cat", "dog"]
    assert refused(report) == {"extra/dog/1.jpg": "stray_file", "test/2.jpg": "stray_file"}


IN_SPLITS = "train/cat/1.jpg train/dog/1.jpg test/dog/2.jpg"


@pytest.mark.parametrize(
    ("prefix", "inner"),
    [("pets3/", IN_SPLITS), ("a b/v1/", IN_SPLITS), ("test/", IN_SPLITS), ("pets3/", "cat/1.jpg dog/1.jpg")],
)
def test_a_wrapping_folder_is_stripped(prefix: str, inner: str) -> None:
    result, report = planned(*[prefix + name for name in inner.split()], prefix + "SOURCE.txt", "README.md")
    assert [item.path for item in result.items] == inner.split()
    assert [item.source for item in result.items] == [prefix + name for name in inner.split()]
    assert refused(report) == {prefix + "SOURCE.txt": "stray_file", "README.md": "stray_file"}


def test_one_class_folder_is_no_wrapper() -> None:
    result, _ = planned("cat/1.jpg", "cat/2.jpg")
    assert labels(result) == {"cat/1.jpg": ("cat", None), "cat/2.jpg": ("cat", None)}
    assert planned("train/cat/1.jpg", "train/dog/1.jpg")[0].layout == "split/class/file"
    assert planned("pets/cat/1.jpg")[0].classes == ["cat"]


def test_classes_may_be_called_like_splits() -> None:
    result, _ = planned("train/1.jpg", "car/1.jpg", "bus/1.jpg")
    assert result.classes == ["bus", "car", "train"]


def test_pictures_directly_in_split_folders_have_no_class() -> None:
    assert error("train/1.jpg", "train/2.jpg", "test/3.jpg") == "no_class_folders"


def test_names_with_spaces_unicode_and_equal_file_names() -> None:
    result, _ = planned(" big cat /1.jpg", "Größe/1.jpg", "日本/1.jpg")
    assert result.classes == ["Größe", "big cat", "日本"]
    assert len({item.path for item in result.items}) == 3


@pytest.mark.parametrize(
    "names",
    [("Cat", "cat"), ("golden_retriever", "golden-retriever"), ("a b", "a_b"), ("STRASSE", "straße"), ("ﬁsh", "fish")],
)
def test_colliding_class_names_are_named(names: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        planned(f"{names[0]}/1.jpg", f"{names[1]}/1.jpg")
    assert caught.value.code == "class_names_collide"
    assert all(name in caught.value.message for name in names)


def test_unspeakable_class_names_are_refused() -> None:
    _, report = planned("___/1.jpg", "cat/1.jpg", "x" * 201 + "/1.jpg")
    assert list(refused(report).values()) == ["bad_class_name", "bad_class_name"]


def test_empty_class_folders_are_known() -> None:
    result, _ = planned("p/cat/1.jpg", "p/dog/1.jpg", directories=("p", "p/cat", "p/emu", "p/cat/deep", "other"))
    assert result.classes == ["cat", "dog", "emu"]
    split, _ = planned("train/cat/1.jpg", "test/cat/1.jpg", directories=("train", "train/emu", "junk/owl"))
    assert split.classes == ["cat", "emu"]


def test_absurdly_many_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_CLASSES", 3)
    assert len(planned(*[f"class {n % 3}/{n}.jpg" for n in range(9)])[0].classes) == 3
    assert error(*[f"class {n}/1.jpg" for n in range(4)]) == "too_many_classes"
    rows = "".join(f"{n}.jpg,class {n}\n" for n in range(4))
    assert error(*[f"{n}.jpg" for n in range(4)], csv=f"file_name,label\n{rows}") == "too_many_classes"


def test_nothing_to_find() -> None:
    assert error("1.jpg", "2.jpg") == "no_images"
    with pytest.raises(InvalidInput) as caught:
        planned()
    assert caught.value.code == "no_images"


def test_metadata_csv_with_everything() -> None:
    result, report = planned(
        "images/1.jpg",
        "images/2.jpg",
        "images/ä b.jpg",
        csv="\ufeffFile_Name, label ,caption,split\r\n"
        'images/1.jpg,Cat,"a cat, asleep",train\r\n'
        "./images\\2.jpg, dog ,,Validation\r\n"
        "images/a\u0308 b.jpg,dog,,\r\n",
    )
    assert result.layout == "metadata"
    assert labels(result) == {
        "images/1.jpg": ("Cat", "train"),
        "images/2.jpg": ("dog", "val"),
        "images/ä b.jpg": ("dog", None),
    }
    assert [item.caption for item in result.items] == ["a cat, asleep", None, None]
    assert report.as_dict()["refused"] == {}


def test_metadata_jsonl() -> None:
    result, _ = planned(
        "1.jpg",
        "train/2.jpg",
        jsonl='{"file_name": "1.jpg", "label": 7}\n\n{"file_name": "train/2.jpg", "label": "dog", "caption": null}\n',
    )
    assert labels(result) == {"1.jpg": ("7", None), "train/2.jpg": ("dog", "train")}


def test_metadata_in_each_split_folder_under_a_wrapper() -> None:
    report = Report()
    names = ["p/train/1.jpg", "p/train/metadata.csv", "p/test/1.jpg", "p/test/metadata.csv", "p/val/1.jpg"]
    metadata = {name: b"file_name,label\n1.jpg,cat\n" for name in names if name.endswith("csv")}
    result = plan(names, metadata, (), report)
    assert labels(result) == {"train/1.jpg": ("cat", "train"), "test/1.jpg": ("cat", "test")}
    assert refused(report) == {"p/val/1.jpg": "no_metadata_row"}


def test_utf16_as_spreadsheets_save_it() -> None:
    report = Report()
    result = plan(
        ["1.jpg", "metadata.csv"], {"metadata.csv": "file_name,label\n1.jpg,köter\n".encode("utf-16")}, (), report
    )
    assert result.classes == ["köter"]


def test_rows_and_files_that_do_not_match() -> None:
    result, report = planned(
        "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg",
        csv="file_name,label,split\n1.jpg,cat,\n1.jpg,cat,\n2.jpg,cat,\n2.jpg,dog,\n3.jpg, ,\n4.jpg,cat,holdout\n"
        "6.jpg,--,\nno.jpg,cat,\n../../etc/passwd,cat,\n",
    )  # fmt: skip
    assert labels(result) == {"1.jpg": ("cat", None)}
    assert refused(report) == {
        "2.jpg": "conflicting_rows",
        "3.jpg": "label_missing",
        "4.jpg": "unknown_split",
        "5.jpg": "no_metadata_row",
        "6.jpg": "bad_class_name",
        "no.jpg": "file_not_found",
        "../../etc/passwd": "file_not_found",
    }
    assert "metadata.csv, line 6" in next(r.message for r in report.refusals if r.path == "3.jpg")
    assert [notice.code for notice in report.notices] == ["repeated_rows"]


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("", "missing_column", "file_name"),
        ("file_name,class\n1.jpg,cat\n", "missing_label_column", "label"),
        ("file_name,label,colour\n1.jpg,cat,red\n", "unknown_column", "colour"),
        ("file_name,label,label\n1.jpg,cat,cat\n", "broken_metadata", "twice"),
        ("file_name,label\n1.jpg,cat,extra\n", "broken_metadata", "line 2"),
        ("file_name,label,caption\n1.jpg,cat\n", "broken_metadata", "line 2"),
        ('file_name,label\n1.jpg,"cat\n', "broken_metadata", "quote"),
        ("file_name;label\n1.jpg;cat\n", "broken_metadata", "commas"),
        ("file_name,label\n,cat\n", "broken_metadata", "line 2"),
        ("file_name,label\n1.jpg,c\0t\n", "broken_metadata", "line 2"),
    ],
)
def test_broken_csv(text: str, code: str, word: str) -> None:
    with pytest.raises(InvalidInput, match=word) as caught:
        planned("1.jpg", csv=text)
    assert caught.value.code == code
    assert "metadata.csv" in caught.value.message


def test_wrong_encoding_names_the_line() -> None:
    with pytest.raises(InvalidInput, match="line 2") as caught:
        plan(["1.jpg"], {"metadata.csv": "file_name,label\n1.jpg,Größe\n".encode("latin-1")}, (), Report())
    assert caught.value.code == "metadata_encoding"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{file_name: 1.jpg}", "broken_metadata"),
        ("[1]", "broken_metadata"),
        ("[" * 200_000, "broken_metadata"),
        ('{"file_name": "1.jpg"}', "missing_label_column"),
        ('{"file_name": "1.jpg", "label": ["cat"]}', "broken_metadata"),
        ('{"file_name": "1.jpg", "label": true}', "broken_metadata"),
        ('{"file_name": "1.jpg", "label": "\\ud800"}', "broken_metadata"),
        ('{"file_name": "1.jpg", "label": "cat", "x": 1}', "unknown_column"),
    ],
)
def test_broken_jsonl(text: str, code: str) -> None:
    assert error("1.jpg", jsonl=text) == code


part = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=6)
path = st.lists(part | st.sampled_from(["train", "test", "val", "cat", "dog"]), min_size=1, max_size=4).map("/".join)


@given(st.lists(path, unique=True, max_size=12))
def test_every_file_is_either_planned_or_refused(names: list[str]) -> None:
    report = Report()
    names = [name for name in names if "metadata." not in name]
    try:
        result = plan(names, {}, (), report)
    except InvalidInput as caught:
        known = caught.code in {"no_images", "class_names_collide", "no_class_folders"}
        result = None
    if result is None:
        assert known
        return
    assert len(result.items) + report.refused.total() == len(names)
    assert {item.source for item in result.items} <= set(names)
    assert len({item.path for item in result.items}) == len(result.items)
    assert {item.class_name for item in result.items} <= set(result.classes)


@given(st.binary(max_size=300), st.sampled_from(["metadata.csv", "metadata.jsonl"]))
def test_arbitrary_metadata_gives_a_plan_or_invalid_input(content: bytes, name: str) -> None:
    try:
        plan(["1.jpg", name], {name: content}, (), Report())
        plan(["1.jpg", name], {name: b"file_name,label\n" + content}, (), Report())
    except InvalidInput:
        pass
