"""Plain-text tables, the leaderboard's above all."""

from typing import Any

from captune import tables
from shared.schemas.evaluations import Leaderboard, LeaderboardRow


def row(**values: Any) -> LeaderboardRow:
    defaults = {
        "rank": 1,
        "protocol": "full",
        "method": "mmft",
        "model": "starter",
        "captions": None,
        "captioner": None,
        "shots": 8,
        "hyperparameters": {},
        "suffix": None,
        "n": 3,
        "mean": 0.705,
        "stderr": 0.0123,
        "few_seeds": False,
        "metrics": {"top1": 0.705, "top5": 0.95, "macro_f1": 0.7, "ece": 0.05, "nll": 1.25},
        "train_seconds": 12.4,
        "classifier_ids": [],
    }
    return LeaderboardRow.model_validate(defaults | values)


def board(*rows: LeaderboardRow, metric: str = "top1") -> str:
    return tables.leaderboard(
        Leaderboard(
            dataset_id="ds_1",
            dataset_name="pets",
            data_fingerprint="f",
            split="test",
            metric=metric,
            higher_is_better=metric != "nll",
            rows=list(rows),
        )
    )


ZERO = row(rank=2, method="zero_shot", shots=None, n=1, mean=0.5, stderr=None, train_seconds=0.0)


def test_columns_are_padded_and_numbers_stand_right() -> None:
    text = tables.table(("name", "count"), [("a", 1), ("longer", 200), ("b", None)])
    assert text.splitlines() == ["name    count", "------  -----", "a           1", "longer    200", "b           -"]


def test_no_rows_leave_the_header() -> None:
    assert tables.table(("id", "status"), []).splitlines() == ["id  status", "--  ------"]


def test_fractions_are_percentages_with_their_standard_error() -> None:
    lines = board(row(), ZERO).splitlines()
    assert lines[0] == "pets: top1 % on test, mean ± standard error over seeds"
    mmft, zero = (line.split() for line in lines[-2:])
    assert mmft == ["1", "mmft", "starter", "8", "70.50", "±", "1.23", "3", "95.0", "70.0", "5.0", "1.250", "12"]
    assert zero == ["2", "zero_shot", "starter", "0", "50.00", "1", "95.0", "70.0", "5.0", "1.250", "-"]


def test_nats_are_no_percentages() -> None:
    lines = board(row(mean=1.25, stderr=0.02), metric="nll").splitlines()
    assert lines[0].startswith("pets: nll on test")
    assert " 1.25 ± 0.02 " in lines[-1]


def test_all_training_images_are_told_from_none() -> None:
    lines = board(row(shots=None), ZERO).splitlines()
    assert [line.split()[3] for line in lines[-2:]] == ["all", "0"]


def test_few_seeds_are_flagged_and_explained() -> None:
    text = board(row(n=2, few_seeds=True), ZERO)
    assert "70.50 ± 1.23*" in text
    assert text.splitlines()[-1] == "* fewer than 3 seeds: the standard error means little"
    assert "*" not in board(row(), ZERO)


def test_each_protocol_has_its_own_table() -> None:
    text = board(row(), ZERO, row(protocol="none", mean=0.6), row(**ZERO.model_dump() | {"protocol": "none"}))
    assert [line for line in text.splitlines() if line.startswith("validation")] == [
        "validation: full",
        "validation: none",
    ]
    assert text.count("zero_shot") == 2


def test_no_scores_yet_is_told() -> None:
    assert "no scores yet" in board()
