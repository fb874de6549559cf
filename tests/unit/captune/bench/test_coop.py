"""CoOp's split files: they decide where they lie, and hold what they say or are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captune.bench import READERS, LayoutError, read
from captune.bench.data import SPLITS
from captune.bench.readers import coop
from tests.unit.captune.bench.layouts import BUILD
from tests.unit.captune.bench.layouts import coop as build


@pytest.mark.parametrize(
    ("name", "images"),
    [("eurosat", "2750"), ("oxford_pet", "images"), ("flowers102", "jpg"), ("cars", "."), ("dtd", "images"),
     ("caltech101", "101_ObjectCategories"), ("aircraft", "images"), ("food101", "images")],
)  # fmt: skip
def test_it_decides_where_it_is(name: str, images: str, tmp_path: Path) -> None:
    BUILD[name](tmp_path)
    splits = build(tmp_path, images)
    reading = read(name, tmp_path, 0)
    assert {(e.path, e.label, e.split) for e in reading.entries} == {
        (path, called, split) for split, items in splits.items() for path, _, called in items
    }
    assert reading.classes == ["annual crop land", "river"]
    assert "split_zhou_Any.json" in reading.notes[0]
    assert not reading.refused
    assert all((reading.root / entry.path).is_file() for entry in reading.entries)


def test_two_split_files_are_one_too_many(tmp_path: Path) -> None:
    build(tmp_path, "images", "split_zhou_A.json")
    build(tmp_path, "images", "split_zhou_B.json")
    with pytest.raises(LayoutError, match=r"split_zhou_A\.json and split_zhou_B\.json"):
        read("dtd", tmp_path, 0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", "no JSON file"),
        ('{"train": []}', "'train', 'val' and 'test'"),
        ('{"train": 1, "val": [], "test": []}', "'train' is no list"),
        ('{"train": [["a.jpg", 0]], "val": [], "test": []}', "train, entry 0: expected"),
        ('{"train": [["a.jpg", "0", "cat"]], "val": [], "test": []}', "train, entry 0: expected"),
        ('{"train": [["a.jpg", 0, "cat"]], "val": [["a.jpg", 0, "cat"]], "test": []}', "in train and again in val"),
        ('{"train": [["a.jpg", 0, "cat"], ["b.jpg", 0, "dog"]], "val": [], "test": []}', "called 'cat' and 'dog'"),
        ('{"train": [["a.jpg", 0, "cat"], ["b.jpg", 1, "cat"]], "val": [], "test": []}', "the same class name"),
    ],
)
def test_what_it_cannot_mean_is_refused(broken: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "split_zhou_X.json").write_text(broken)
    with pytest.raises(LayoutError, match=message):
        coop.read(tmp_path / "split_zhou_X.json")


paths = st.text(st.sampled_from("ab/.1_\\ é"), min_size=1, max_size=12)
items = st.tuples(paths, st.integers(0, 3)).map(lambda each: [each[0], each[1], f"class {each[1]}"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*SPLITS, "x"]), inner, max_size=4),
)


@settings(max_examples=150)
@given(anything | st.fixed_dictionaries({split: st.lists(items | anything, max_size=6) for split in SPLITS}))
def test_any_json_is_read_as_it_says_or_refused(content: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "split_zhou_X.json"
        file.write_text(json.dumps(content))
        try:
            reading = coop.read(file, READERS["dtd"].images_in)
        except LayoutError:
            return
        named = [(path, split) for split in SPLITS for path, _, _ in content[split]]
        assert len(set(named)) == len(named) == len(reading.refused)  # none of these files is there
        assert not reading.entries
