import pytest

from services.evaluator.scoring.classes import check_classes
from shared.errors import InvalidInput


def test_the_same_list_passes():
    check_classes(["a", "b"], ("a", "b"), "")


@pytest.mark.parametrize(
    ("own", "of_data", "message"),
    [
        (["a", "b"], ["a"], "2 classes and the data set 1, .* at class 2: 'b' and missing. Do this"),
        (["a"], ["a", "b", "c"], "at class 2: missing and 'b'"),
        (["a", "b"], ["b", "a"], "at class 1: 'a' and 'b'"),
        ([], ["a"], "at class 1: missing and 'a'"),
    ],
)
def test_the_first_difference_is_told(own, of_data, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        check_classes(own, of_data, "Do this")
    assert caught.value.code == "class_lists_differ"
