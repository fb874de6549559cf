from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.datasets.catalogue import Names, Records
from shared.datasets.layout import Item

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(words))
def test_names_are_distinct_and_in_order(given: list[str]) -> None:
    names = Names()
    assert [names.add(name) for name in given] == [name not in given[:i] for i, name in enumerate(given)]
    assert list(names) == list(dict.fromkeys(given)) == list(names)
    assert len(names) == len(set(given))
    assert all(name in names for name in given)
    assert "never this one" * 2 not in names


@given(st.lists(st.tuples(words, st.builds(Item, words, words, st.none() | st.just("val"), st.none() | words, words))))
def test_records_are_as_in_a_dict(given: list[tuple[str, Item]]) -> None:
    records, expected = Records(Item._make), dict[str, Item]()
    for name, item in given:
        assert records.add(name, item) == (name not in expected)
        expected.setdefault(name, item)
    assert list(records.items()) == list(expected.items())
    for name, item in list(expected.items())[::2]:
        assert records.get(name) == item
        records.remove(name)
        del expected[name]
        assert records.get(name) is None
    assert list(records) == list(expected.values())
    assert len(records) == len(expected)


def test_memory_stays_flat_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))

    def resident() -> int:  # MiB; SQLite's memory is none of Python's
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

    names, before = Names(), resident()
    for number in range(100_000):
        names.add(f"{number:06d}" * 50)  # 30 MB, and as much again for the index
    assert resident() - before < 24
    assert len(names) == 100_000
    del names
    assert list(tmp_path.iterdir()) == []
