from hypothesis import given
from hypothesis import strategies as st

from services.captioner.engines.hf_prefix import Plan, plan

IMAGE = 0
picture = st.integers(0, 3)
prompt = st.lists(st.integers(1, 3), min_size=1, max_size=6)


def test_the_prompts_of_a_picture_share_all_but_their_different_end() -> None:
    ids = [[9, 0, 0, 5, 1, 7], [9, 0, 0, 5, 2, 2, 7], [9, 0, 0, 5, 3, 7]]
    assert plan(ids, ["a"] * 3, IMAGE) == Plan([0], [0, 0, 0], cuts=[4, 4, 4])


def test_equal_words_over_another_picture_are_another_beginning() -> None:
    ids = [[9, 0, 0, 5, end] for end in (1, 2, 3)] * 2
    assert plan(ids, ["a"] * 3 + ["b"] * 3, IMAGE) == Plan([0, 3], [0, 0, 0, 1, 1, 1], cuts=[4] * 6)


def test_the_same_request_twice_leaves_one_column_to_go_on_from() -> None:
    assert plan([[9, 0, 5], [9, 0, 5]], ["a", "a"], IMAGE) == Plan([0], [0, 0], cuts=[2, 2])


def test_nothing_is_shared_between_different_pictures() -> None:
    assert plan([[9, 0, 5, 1], [9, 0, 5, 2]], ["a", "b"], IMAGE) is None


def test_a_picture_is_never_cut() -> None:
    assert plan([[5, 0, 0, 1], [6, 0, 0, 1], [6, 0, 0, 1]], ["a", "a", "a"], IMAGE) is None, "text before the picture"


def test_the_padding_inside_rows_counts_as_columns() -> None:
    ids = [[0, 5, 5, 5, 5, 1], [0, 5, 5, 5, 5, 2], [0, 1, 5, 5, 5, 5, 5], [0, 2, 5, 5, 5, 5, 5]]
    made = plan(ids, ["a", "a", "b", "b"], IMAGE)
    assert made == Plan([0, 2], [0, 0, 1, 1], cuts=[5, 5, 1, 1])
    assert made.columns(ids) == 5 + 6, "a sliding window sees these, not the 7 of the longest row"


@given(st.lists(st.tuples(picture, prompt), min_size=1, max_size=12))
def test_a_plan_gives_every_request_its_own_beginning(rows: list[tuple[int, list[int]]]) -> None:
    ids = [[9, IMAGE, IMAGE, *words] for _, words in rows]
    pictures = [which for which, _ in rows]
    made = plan(ids, pictures, IMAGE)
    if made is None:
        return
    assert len(made.representatives) < len(rows)
    for row, beginning in enumerate(made.beginning_of):
        origin = made.representatives[beginning]
        assert pictures[origin] == pictures[row]
        assert ids[origin][: made.cuts[origin]] == ids[row][: made.cuts[row]] != []
        assert ids[row][made.cuts[row] :] != []
        assert IMAGE not in ids[row][made.cuts[row] :]
