import csv
import io
import json
from statistics import mean, stdev
from typing import Any

import pytest

from shared.core import Core
from tests.integration.factories import add_classifier, add_dataset, add_group
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
    # Trains nothing either, but its captions are those of two images a class.
    add_classifier(core, dataset_id, {"top1": 0.3}, method="caption_prototypes", protocol="zero_shot", shots=2)
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
    add_classifier(core, add_dataset(core), {"top1": 0.9})
    add_classifier(core, dataset_id, {"top1": 0.9}, split="val")
    add_classifier(core, dataset_id, {"top1": 0.9}, head="zero_shot")
    add_classifier(core, dataset_id)  # not scored yet
    (row,) = board(api, dataset_id)
    assert row["classifier_ids"] == [mine]
    answer = api.admin.get("/v1/leaderboard", params={"dataset_id": dataset_id}).json()
    assert {id for row in answer["rows"] for id in row["classifier_ids"]} == {mine, bens}
    assert [row["mean"] for row in board(api, dataset_id, head="zero_shot")] == [0.9]


def test_what_was_scored_on_other_data_stands_apart(api: Api, core: Core, dataset_id: str) -> None:
    add_classifier(core, dataset_id, {"top1": 0.5})
    for seed in (1, 2):
        add_classifier(core, dataset_id, {"top1": 0.9}, seed=seed, data_fingerprint="before", scored_as="before")
    old = add_classifier(core, dataset_id, {"top1": 0.8}, method="mmft", data_fingerprint="long ago", scored_as=None)
    rows = board(api, dataset_id)
    assert [(row["rank"], row["mean"], row["n"], row["data_changed"]) for row in rows] == [
        (1, 0.5, 1, False),
        (None, 0.9, 2, True),
        (None, 0.8, 1, True),
    ]
    assert rows[1]["id"] == f"{rows[0]['id']}.was-before"
    assert rows[1]["trained_on"] is None
    assert rows[2]["classifier_ids"] == [old]
    assert all(row["tied_with_best"] is None for row in rows)


def test_training_on_other_data_keeps_rows_apart_but_ranked(api: Api, core: Core, dataset_id: str) -> None:
    """Scored on the same images they compare; but one of them is no further seed of the other."""
    elsewhere = add_dataset(core)
    add_classifier(core, dataset_id, {"top1": 0.5})
    add_classifier(core, dataset_id, {"top1": 0.6}, seed=1, data_fingerprint="before")
    add_classifier(core, elsewhere, {"top1": 0.7}, seed=2, scored_on=dataset_id)
    rows = board(api, dataset_id)
    assert [(row["rank"], row["mean"], row["n"], row["trained_on"]) for row in rows] == [
        (1, 0.7, 1, elsewhere),
        (2, 0.6, 1, dataset_id),
        (3, 0.5, 1, None),
    ]
    assert len({row["id"] for row in rows}) == 3
    assert board(api, elsewhere) == []


FILTERED = [
    ({"method": "mmft"}, ["mmft"]),
    ({"model": "RN50/openai"}, ["other model"]),
    ({"captioner": "attributes-2"}, ["captioned"]),
    ({"protocol": "none"}, ["unvalidated", "zero_shot"]),
    ({"tag": "good"}, ["tagged"]),
    ({"tag": "bad"}, []),
    ({"shots": 4}, ["four", "zero_shot"]),
    ({"method": "flyp", "tag": "good"}, ["tagged"]),
]


@pytest.mark.parametrize(("filters", "names"), FILTERED)
@pytest.mark.parametrize("pinned", [False, True])
def test_filters_leave_pinned_rows_in(
    api: Api, core: Core, dataset_id: str, filters: dict[str, Any], names: list[str], pinned: bool
) -> None:
    def add(name: str, **columns: Any) -> None:
        add_classifier(core, dataset_id, {"top1": 0.5}, suffix=name, **columns)

    add("mmft", method="mmft")
    add("other model", model="RN50/openai")
    add("captioned", captioner="attributes-2")
    add("unvalidated", protocol="none")
    add("tagged", tags=["good", "x"])
    add("four", shots=4)
    zero_shot(core, dataset_id, 0.4, suffix="zero_shot")
    if pinned:
        for seed in range(2):
            add("pinned", seed=seed, pinned=seed == 0, shots=1)
    rows = {row["suffix"]: row for row in board(api, dataset_id, **filters)}
    assert sorted(rows) == sorted(names + ["pinned"] * pinned)
    if pinned:
        assert (rows["pinned"]["n"], rows["pinned"]["pinned"]) == (2, True)  # the row, not the run
        assert "pinned" not in {row["suffix"] for row in board(api, dataset_id, metric="nll", **filters)}
        assert board(api, dataset_id, split="val", **filters) == []


def test_another_owners_pin_pins_nothing(api: Api, core: Core, dataset_id: str) -> None:
    add_classifier(core, dataset_id, {"top1": 0.5})
    add_classifier(core, dataset_id, {"top1": 0.9}, owner="ben", pinned=True)
    assert board(api, dataset_id, method="mmft") == []


def test_a_group_is_a_filter(api: Api, core: Core, dataset_id: str) -> None:
    group = add_group(core, dataset_id)
    mine = add_classifier(core, dataset_id, {"top1": 0.5}, group_id=group)
    add_classifier(core, dataset_id, {"top1": 0.7}, seed=1)
    (row,) = board(api, dataset_id, group_id=group)
    assert (row["classifier_ids"], row["mean"]) == ([mine], 0.5)


@pytest.mark.parametrize(
    ("metric", "order", "means"),
    [
        ("top1", "best", [0.9, 0.5, 0.1]),
        ("top1", "asc", [0.1, 0.5, 0.9]),
        ("top1", "desc", [0.9, 0.5, 0.1]),
        ("nll", "best", [0.1, 0.5, 0.9]),
        ("nll", "desc", [0.9, 0.5, 0.1]),
    ],
)
def test_the_order_may_be_another_than_the_rank(
    api: Api, core: Core, dataset_id: str, metric: str, order: str, means: list[float]
) -> None:
    for value in (0.5, 0.1, 0.9):
        add_classifier(core, dataset_id, {metric: value}, suffix=str(value))
    rows = board(api, dataset_id, metric=metric, order=order)
    assert [row["mean"] for row in rows] == means
    best = max(means) if metric == "top1" else min(means)
    assert [row["rank"] == 1 for row in rows] == [mean == best for mean in means]


def test_pages_follow_one_another_by_row_id(api: Api, core: Core, dataset_id: str) -> None:
    for i in range(7):
        add_classifier(core, dataset_id, {"top1": 0.5 if i < 4 else 0.1 * i}, suffix=f"row {i}")  # four alike
    zero_shot(core, dataset_id, 0.3)
    add_classifier(core, dataset_id, {"top1": 0.9}, protocol="none")
    add_classifier(core, dataset_id, {"top1": 0.9}, data_fingerprint="before", scored_as="before")
    whole = board(api, dataset_id)
    assert len(whole) == 11  # the row without training stands twice
    assert len({row["id"] for row in whole}) == 11
    for limit in (1, 2, 5, 11):
        found: list[Row] = []
        params: dict[str, Any] = {"dataset_id": dataset_id, "limit": limit}
        while True:
            answer = api.anna.get("/v1/leaderboard", params=params)
            found += answer.json()["rows"]
            assert answer.json()["last_id"] == found[-1]["id"]
            if not answer.json()["has_more"]:
                assert "Link" not in answer.headers
                break
            assert len(answer.json()["rows"]) == limit
            address, relation = answer.headers["Link"].split(">; ")
            assert relation == 'rel="next"'
            assert f"after={found[-1]['id']}" in address
            params["after"] = found[-1]["id"]
        assert found == whole
    answer = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id, "after": "0" * 32})
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_row")
    end = api.anna.get("/v1/leaderboard", params={"dataset_id": dataset_id, "after": whole[-1]["id"]}).json()
    assert (end["rows"], end["has_more"], end["last_id"]) == ([], False, None)


def test_every_page_knows_what_is_tied_with_the_best(api: Api, core: Core, dataset_id: str) -> None:
    for suffix, values in {"a": [0.90, 0.91, 0.92], "b": [0.89, 0.92, 0.90], "c": [0.5, 0.51, 0.52]}.items():
        for seed, value in enumerate(values):
            add_classifier(core, dataset_id, {"top1": value}, suffix=suffix, seed=seed, shot_seed=seed)
    whole = {row["suffix"]: row["tied_with_best"] for row in board(api, dataset_id)}
    assert whole == {"a": None, "b": True, "c": False}
    last = board(api, dataset_id, limit=1, after=board(api, dataset_id)[1]["id"])
    assert [(row["suffix"], row["tied_with_best"]) for row in last] == [("c", False)]


def test_ties_in_accuracy_are_told_by_the_images(api: Api, core: Core, dataset_id: str) -> None:
    """Every seed gets 30 of 300 images wrong that the other gets right: what three means could not tell."""
    for suffix, wrong in (("best", 0), ("worse", 30), ("same", 1)):
        for seed in range(3):
            right = [i % 10 != seed and i >= wrong for i in range(300)]
            values = {"top1": sum(right) / 300, "nll": 0.5 + 0.1 * seed}
            add_classifier(core, dataset_id, values, suffix=suffix, seed=seed, correct=right)
    assert {row["suffix"]: row["tied_with_best"] for row in board(api, dataset_id)} == {
        "best": None,
        "worse": False,
        "same": True,
    }
    assert [row["tied_with_best"] for row in board(api, dataset_id, metric="nll")] == [None, True, True]


def test_one_seed_leaves_nothing_to_tell_by(api: Api, core: Core, dataset_id: str) -> None:
    add_classifier(core, dataset_id, {"top1": 0.9}, suffix="a", correct=[True] * 9 + [False])
    add_classifier(core, dataset_id, {"top1": 0.1}, suffix="b", correct=[False] * 9 + [True])
    assert [row["tied_with_best"] for row in board(api, dataset_id)] == [None, None]


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
    wrong = {"shots": 0, "split": "dev", "limit": 1001, "order": "up", "format": "xml", "protocol": "x", "head": "x"}
    for name, value in [*wrong.items(), ("shots", "some"), ("methods", "mmft"), ("metrics", "top1")]:
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


def test_as_markdown_and_latex(api: Api, core: Core, dataset_id: str) -> None:
    add_classifier(core, dataset_id, {"top1": 0.5}, suffix="50 % | $x_1$")
    params = {"dataset_id": dataset_id}
    answer = api.anna.get("/v1/leaderboard", params=params | {"format": "markdown"})
    assert answer.headers["content-type"].startswith("text/markdown")
    assert r"flyp \(50 % \| \$x\_1\$\)" in answer.text
    answer = api.anna.get("/v1/leaderboard", params=params | {"format": "latex"})
    assert answer.headers["content-type"].startswith("application/x-latex")
    assert r"flyp (50 \% \textbar{} \$x\_1\$)" in answer.text
    assert r"\textbf{50.00*}" in answer.text
