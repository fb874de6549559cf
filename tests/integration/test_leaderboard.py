import csv
import io
import json
from statistics import mean, stdev
from typing import Any

import pytest

from shared.core import Core
from tests.integration.factories import add_classifier, add_dataset
from tests.integration.support import Api

Row = dict[str, Any]


@pytest.fixture
def dataset_id(core: Core) -> str:
    return add_dataset(core)


def board(api: Api, dataset_id: str, **params: Any) -> list[Row]:
    answer = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id} | params)
    assert answer.status_code == 200, answer.text
    rows: list[Row] = answer.json()["rows"]
    return rows


def zero_shot(core: Core, dataset_id: str, top1: float, **columns: Any) -> str:
    columns = {"method": "zero_shot", "protocol": "zero_shot", "hyperparameters": {}} | columns
    return add_classifier(core, dataset_id, {"top1": top1}, **columns)


def test_seeds_are_grouped_to_a_mean_with_its_standard_error(api: Api, core: Core, dataset_id: str) -> None:
    values = [0.70, 0.74, 0.81]
    ids = [
        add_classifier(core, dataset_id, {"top1": v, "nll": 1 - v}, seed=i, shot_seed=i) for i, v in enumerate(values)
    ]
    (row,) = board(api, dataset_id)
    assert row["n"] == 3
    assert row["mean"] == pytest.approx(mean(values))
    assert row["stderr"] == pytest.approx(stdev(values) / 3**0.5)
    assert row["metrics"] == pytest.approx({"top1": mean(values), "nll": 1 - mean(values)})
    assert row["classifier_ids"] == sorted(ids)
    assert row["train_seconds"] == 2.0
    assert not row["few_seeds"]
    assert row["hyperparameters"] == {"epochs": 1}


def test_a_repeated_seed_is_not_one_more_observation(api: Api, core: Core, dataset_id: str) -> None:
    for value in (0.6, 0.7, 0.8):
        add_classifier(core, dataset_id, {"top1": value}, seed=0)
    add_classifier(core, dataset_id, {"top1": 0.9}, seed=1)
    (row,) = board(api, dataset_id)
    assert (row["n"], row["few_seeds"], len(row["classifier_ids"])) == (2, True, 4)
    assert row["mean"] == pytest.approx(mean([0.7, 0.9]))
    assert row["stderr"] == pytest.approx(stdev([0.7, 0.9]) / 2**0.5)


def test_one_run_has_no_error_and_few_runs_are_marked(api: Api, core: Core, dataset_id: str) -> None:
    add_classifier(core, dataset_id, {"top1": 0.7})
    (row,) = board(api, dataset_id)
    assert (row["n"], row["stderr"], row["few_seeds"]) == (1, None, True)
    add_classifier(core, dataset_id, {"top1": 0.8}, seed=1)
    (row,) = board(api, dataset_id)
    assert (row["n"], row["few_seeds"]) == (2, True)
    assert row["stderr"] == pytest.approx(0.05)


def test_a_zero_shot_row_needs_no_seeds(api: Api, core: Core, dataset_id: str) -> None:
    zero_shot(core, dataset_id, 0.6)
    (row,) = board(api, dataset_id)
    assert (row["protocol"], row["few_seeds"], row["rank"]) == ("zero_shot", False, 1)


@pytest.mark.parametrize(
    "difference",
    [
        {"method": "mmft"},
        {"model": "RN50/openai"},
        {"captioner": "attributes-2"},
        {"shots": 4},
        {"hyperparameters": {"epochs": 2}},
        {"suffix": "b"},
        {"details": {"train_seconds": 2.0, "captions": {"words": 10}}},
        {"protocol": "none"},
    ],
)
def test_runs_that_differ_in_more_than_seeds_are_apart(
    api: Api, core: Core, dataset_id: str, difference: dict[str, Any]
) -> None:
    add_classifier(core, dataset_id, {"top1": 0.7})
    add_classifier(core, dataset_id, {"top1": 0.7}, **difference)
    assert [row["n"] for row in board(api, dataset_id)] == [1, 1]


def test_ranks_are_given_within_a_protocol_and_zero_shot_stands_in_each(api: Api, core: Core, dataset_id: str) -> None:
    zero_shot(core, dataset_id, 0.6)
    add_classifier(core, dataset_id, {"top1": 0.9}, protocol="full")
    add_classifier(core, dataset_id, {"top1": 0.5}, protocol="full", method="mmft")
    add_classifier(core, dataset_id, {"top1": 0.7}, protocol="few_shot", shots=4)
    found = [(row["protocol"], row["rank"], row["method"]) for row in board(api, dataset_id)]
    assert found == [
        ("few_shot", 1, "flyp"),
        ("few_shot", 2, "zero_shot"),
        ("full", 1, "flyp"),
        ("full", 2, "zero_shot"),
        ("full", 3, "mmft"),
    ]


def test_equal_means_share_a_rank(api: Api, core: Core, dataset_id: str) -> None:
    for method, top1 in (("flyp", 0.5), ("mmft", 0.5), ("other", 0.4)):
        add_classifier(core, dataset_id, {"top1": top1}, method=method)
    assert [row["rank"] for row in board(api, dataset_id)] == [1, 1, 3]


@pytest.mark.parametrize(
    ("shots", "methods"),
    [
        (4, ["flyp 4", "zero_shot None"]),
        (16, ["flyp 16", "zero_shot None"]),
        ("full", ["flyp None", "zero_shot None"]),
        (8, ["zero_shot None"]),
    ],
)
def test_the_shots_filter_keeps_the_zero_shot_rows(
    api: Api, core: Core, dataset_id: str, shots: Any, methods: list[str]
) -> None:
    zero_shot(core, dataset_id, 0.1)
    for number in (4, 16, None):
        add_classifier(core, dataset_id, {"top1": 0.5}, shots=number)
    assert [f"{row['method']} {row['shots']}" for row in board(api, dataset_id, shots=shots)] == methods


@pytest.mark.parametrize(("metric", "best"), [("nll", "low"), ("ece", "low"), ("top1", "high"), ("macro_f1", "high")])
def test_each_metric_has_its_direction(api: Api, core: Core, dataset_id: str, metric: str, best: str) -> None:
    add_classifier(core, dataset_id, {metric: 0.1}, suffix="low")
    add_classifier(core, dataset_id, {metric: 0.9}, suffix="high")
    rows = board(api, dataset_id, metric=metric)
    assert [row["rank"] for row in rows] == [1, 2]
    assert rows[0]["suffix"] == best
    answer = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id, "metric": metric}).json()
    assert answer["higher_is_better"] == (best == "high")


def test_what_does_not_belong_is_not_there(api: Api, core: Core, dataset_id: str) -> None:
    mine = add_classifier(core, dataset_id, {"top1": 0.5})
    bens = add_classifier(core, dataset_id, {"top1": 0.9}, owner="ben")
    add_classifier(core, dataset_id, {"top1": 0.9}, data_fingerprint="other pictures")
    add_classifier(core, add_dataset(core), {"top1": 0.9})
    add_classifier(core, dataset_id, {"top1": 0.9}, split="val")
    add_classifier(core, dataset_id)  # not scored yet
    (row,) = board(api, dataset_id)
    assert row["classifier_ids"] == [mine]
    answer = api.admin.get("/v1/leaderboard", params={"dataset_id": dataset_id}).json()
    assert {id for row in answer["rows"] for id in row["classifier_ids"]} == {mine, bens}


def test_a_run_without_the_metric_is_not_counted(api: Api, core: Core, dataset_id: str) -> None:
    scored = add_classifier(core, dataset_id, {"top1": 0.5, "top5": 0.9})
    add_classifier(core, dataset_id, {"top1": 0.7}, seed=1)
    (row,) = board(api, dataset_id, metric="top5")
    assert (row["n"], row["mean"], row["classifier_ids"]) == (1, 0.9, [scored])


def test_an_unknown_metric_or_data_set(api: Api, dataset_id: str) -> None:
    answer = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id, "metric": "top2"})
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_metric")
    assert "top5" in answer.json()["detail"]
    assert api.anna.get("/v1/leaderboard", params={"dataset_id": "ds_no"}).status_code == 404
    for name, value in (("shots", 0), ("shots", "some"), ("split", "dev")):
        answer = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id, name: value})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_an_empty_board(api: Api, dataset_id: str) -> None:
    assert board(api, dataset_id) == []


def test_as_csv(api: Api, core: Core, dataset_id: str) -> None:
    add_classifier(core, dataset_id, {"top1": 0.5}, suffix='=HYPERLINK("http://evil")', captioner="@SUM(A1)")
    add_classifier(core, dataset_id, {"top1": 0.4}, suffix="plain, with a comma", model="-2+3")
    answer = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id, "format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert rows[0]["suffix"] == '\'=HYPERLINK("http://evil")'
    assert rows[0]["captioner"] == "'@SUM(A1)"
    assert (rows[1]["suffix"], rows[1]["model"]) == ("plain, with a comma", "'-2+3")
    assert json.loads(rows[0]["hyperparameters"]) == {"epochs": 1}
    assert (rows[0]["dataset_id"], rows[0]["split"], rows[0]["metric"]) == (dataset_id, "test", "top1")
    for row in rows:
        assert not any(cell[:1] in tuple("=+-@\t\r") for cell in row.values() if cell)
