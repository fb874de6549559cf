import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.datasets.checks import fingerprint
from shared.datasets.classes import Split
from shared.datasets.report import MAX_LISTED, Report
from shared.datasets.splits import Labelled
from shared.errors import InvalidInput
from tests.on_lists import check_classes


def image(class_name: str, split: Split = "train", number: int = 0, sha256: str = "") -> Labelled:
    return Labelled(f"{split}/{class_name}/{number}.jpg", class_name, split, sha256)


@pytest.mark.parametrize(
    ("images", "code", "words"),
    [
        ([], "no_images", "report"),
        ([image("cat"), image("cat", "test")], "one_class", "cat"),
        ([image("cat"), image("dog"), image("emu", "test")], "class_without_training_images", "emu"),
        ([image("cat"), image("dog"), image("emu", "val")], "class_without_training_images", "emu"),
    ],
)
def test_unusable_data_sets(images: list[Labelled], code: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        check_classes(images, ["cat"])
    assert caught.value.code == code


def test_a_good_data_set_has_no_notices() -> None:
    images = [image("cat", sha256="1"), image("cat", number=1, sha256="1"), image("dog"), image("dog", "test")]
    assert check_classes(images, ["cat", "dog"]) == []


def test_notices() -> None:
    images = [
        image("cat", sha256="same"),
        image("cat", "test", sha256="same"),
        image("dog", sha256="twice"),
        image("cat", number=1, sha256="twice"),
    ]
    notices = {notice.code: notice.message for notice in check_classes(images, ["cat", "dog", "emu", "owl"])}
    assert set(notices) == {"empty_class", "duplicates_across_splits", "duplicates_with_different_labels"}
    assert "emu, owl" in notices["empty_class"]
    assert "train/cat/0.jpg (train) = test/cat/0.jpg (test)" in notices["duplicates_across_splits"]
    assert "train/dog/0.jpg = train/cat/1.jpg" in notices["duplicates_with_different_labels"]


rows = st.tuples(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.sampled_from(["train", "test"]))


@given(st.lists(rows, unique=True, max_size=8), st.lists(rows, unique=True, max_size=8), st.randoms())
def test_fingerprints_are_equal_exactly_for_equal_sets(
    one: list[tuple[str, str, str, Split]], other: list[tuple[str, str, str, Split]], shuffler: random.Random
) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (set(one) == set(other))
    shuffled = list(one)
    shuffler.shuffle(shuffled)
    assert fingerprint(shuffled) == fingerprint(iter(one))


def test_values_do_not_run_into_each_other() -> None:
    assert fingerprint([("ab", "c", "", "train")]) != fingerprint([("a", "bc", "", "train")])


def test_the_report_is_bounded_and_json() -> None:
    report = Report()
    for number in range(MAX_LISTED + 500):
        report.refuse(f"{number}\0\ud800" + "x" * 5000, "link", "no")
    result = report.as_dict()
    assert result["refused"] == {"link": MAX_LISTED + 500}
    assert len(result["refusals"]) == MAX_LISTED
    text = json.dumps(result, ensure_ascii=False)
    assert text.encode()
    assert "\0" not in text
    assert all(len(refusal["path"]) <= 300 for refusal in result["refusals"])
