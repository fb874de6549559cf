"""Two rows of the leaderboard against each other."""

from typing import Any

import numpy as np
import pytest

from shared.core import Core
from tests.integration.factories import add_classifier, add_dataset
from tests.integration.support import Api

PATH = "/v1/leaderboard/compare"


@pytest.fixture
def dataset_id(core: Core) -> str:
    return add_dataset(core)


def add(core: Core, dataset_id: str, suffix: str, right: Any, seeds: Any = range(3), **columns: Any) -> None:
    """One run per seed; right (S, N)."""
    for seed, of_seed in zip(seeds, right, strict=True):
        values = {"top1": float(np.mean(of_seed))}
        add_classifier(core, dataset_id, values, suffix=suffix, seed=seed, correct=of_seed, **columns)


def ids(api: Api, dataset_id: str) -> dict[str, str]:
    rows = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id}).json()["rows"]
    return {row["suffix"]: row["id"] for row in rows}


def compare(api: Api, dataset_id: str, a: str, b: str, **params: Any) -> dict[str, Any]:
    answer = api.anna.get(PATH, params={"dataset_id": dataset_id, "a": a, "b": b, **params})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(api: Api, dataset_id: str, a: str, b: str, **params: Any) -> tuple[int, str]:
    answer = api.anna.get(PATH, params={"dataset_id": dataset_id, "a": a, "b": b, **params})
    return answer.status_code, answer.json()["code"]


def test_the_difference_its_interval_and_who_was_right_alone(api: Api, core: Core, dataset_id: str) -> None:
    rng = np.random.default_rng(0)
    a = rng.random((3, 400)) < 0.8
    b = rng.random((3, 400)) < 0.6
    add(core, dataset_id, "a", a)
    add(core, dataset_id, "b", b)
    rows = ids(api, dataset_id)
    found = compare(api, dataset_id, rows["a"], rows["b"])
    assert (found["images"], found["pairs"], found["resamples"]) == (400, 3, 2000)
    assert found["mean_a"] == pytest.approx(a.mean())
    assert found["mean_b"] == pytest.approx(b.mean())
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert found["p_value"] < 0.01
    assert found["only_a"] == pytest.approx((a & ~b).mean())
    assert found["only_b"] == pytest.approx((b & ~a).mean())
    assert compare(api, dataset_id, rows["a"], rows["b"]) == found

    other = compare(api, dataset_id, rows["b"], rows["a"])
    assert (other["difference"], other["low"], other["high"]) == (-found["difference"], -found["high"], -found["low"])
    assert (other["mean_a"], other["only_a"], other["p_value"]) == (found["mean_b"], found["only_b"], found["p_value"])


def test_a_row_does_not_differ_from_itself_nor_from_its_like(api: Api, core: Core, dataset_id: str) -> None:
    right = np.random.default_rng(1).random((3, 100)) < 0.7
    for suffix in ("a", "b"):
        add(core, dataset_id, suffix, right)
    rows = ids(api, dataset_id)
    for b in ("a", "b"):
        found = compare(api, dataset_id, rows["a"], rows[b])
        assert [found[name] for name in ("difference", "low", "high", "p_value", "only_a")] == [0, 0, 0, 1, 0]


def test_seeds_that_both_have_are_paired_else_all_with_all(api: Api, core: Core, dataset_id: str) -> None:
    right = np.random.default_rng(2).random((3, 100)) < 0.7
    add(core, dataset_id, "a", right, [0, 1, 2])
    add(core, dataset_id, "b", right, [1, 2, 3])
    add(core, dataset_id, "c", right, [7, 8, 9])
    rows = ids(api, dataset_id)
    found = compare(api, dataset_id, rows["a"], rows["b"])
    assert found["pairs"] == 2
    assert found["mean_a"] == pytest.approx(right[1:].mean())
    assert found["mean_b"] == pytest.approx(right[:2].mean())
    assert compare(api, dataset_id, rows["a"], rows["c"])["pairs"] == 9


def test_what_does_not_train_is_compared_with_every_seed(api: Api, core: Core, dataset_id: str) -> None:
    rng = np.random.default_rng(3)
    add(core, dataset_id, "trained", rng.random((4, 300)) < 0.8, range(4))
    add(core, dataset_id, "zero", rng.random((1, 300)) < 0.5, [0], protocol="zero_shot", method="zero_shot")
    rows = ids(api, dataset_id)
    assert rows["zero"].endswith(".full")
    found = compare(api, dataset_id, rows["trained"], rows["zero"])
    assert found["pairs"] == 4
    assert found["low"] > 0


def test_rows_that_cannot_be_compared_are_refused(api: Api, core: Core, dataset_id: str) -> None:
    right = np.ones((2, 50), bool)
    add(core, dataset_id, "now", right, range(2))
    add(core, dataset_id, "before", right, range(2), scored_as="before", data_fingerprint="before")
    add(core, dataset_id, "fewer", right[:, :40], range(2))
    add(core, dataset_id, "unkept", right, range(2), scored_as=None)
    rows = ids(api, dataset_id)
    assert refused(api, dataset_id, rows["now"], rows["before"]) == (422, "data_differs")
    assert refused(api, dataset_id, rows["now"], rows["fewer"]) == (422, "images_differ")
    assert refused(api, dataset_id, rows["unkept"], rows["now"]) == (422, "no_predictions")
    assert refused(api, dataset_id, rows["now"], "0" * 32) == (404, "not_found")
    assert refused(api, dataset_id, rows["now"], rows["now"], split="val") == (404, "not_found")
    assert refused(api, dataset_id, rows["now"], rows["now"], metric="nll") == (422, "invalid_request")
    assert refused(api, "ds_no", rows["now"], rows["now"]) == (404, "not_found")


def test_other_owners_rows_are_not_seen(api: Api, core: Core, dataset_id: str) -> None:
    add(core, dataset_id, "a", np.ones((2, 20), bool), range(2))
    add(core, dataset_id, "bens", np.zeros((2, 20), bool), range(2), owner="ben")
    a = ids(api, dataset_id)["a"]
    rows = api.admin.get("/v1/leaderboard", params={"dataset_id": dataset_id}).json()["rows"]
    bens = next(row["id"] for row in rows if row["suffix"] == "bens")
    assert refused(api, dataset_id, a, bens) == (404, "not_found")
    params = {"dataset_id": dataset_id, "a": a, "b": bens}
    assert api.ben.get(PATH, params=params).status_code == 404
    assert api.admin.get(PATH, params=params).json()["difference"] == 1.0


def test_a_comparison_is_remembered_until_the_board_changes(api: Api, core: Core, dataset_id: str) -> None:
    add(core, dataset_id, "a", np.ones((2, 20), bool), range(2))
    a = ids(api, dataset_id)["a"]
    params = {"dataset_id": dataset_id, "a": a, "b": a}
    tag = api.anna.get(PATH, params=params).headers["ETag"]
    assert api.anna.get(PATH, params=params, headers={"If-None-Match": tag}).status_code == 304
    add(core, dataset_id, "a", np.zeros((1, 20), bool), [2])
    assert api.anna.get(PATH, params=params, headers={"If-None-Match": tag}).json()["pairs"] == 3
