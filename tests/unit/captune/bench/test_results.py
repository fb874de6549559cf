"""Runs and scores become rows beside the paper's figures."""

from typing import Any

import pytest

from captune.bench import READERS
from captune.bench.plan import Settings
from captune.bench.results import PAPER_NOTE, Result, report, rows
from services.trainer import methods
from shared.schemas.evaluations import Evaluation
from shared.schemas.fine_tuning import FineTuningJob, Method

KNOWN = [Method(**each) for each in methods.describe()]
SETTINGS = Settings(model="starter", methods=("zero_shot", "flyp", "mmft"), shots=(1, None), seeds=3)


def job(number: int, method: str, shots: int | None, seed: int, **fields: Any) -> FineTuningJob:
    return FineTuningJob(
        id=f"ft_{number}", status="succeeded", created_at=0, model="starter", dataset_id="ds_1", caption_job_id=None,
        method={"type": method}, shots=shots, shot_seed=0 if shots is None else seed, seed=seed, validation="full",
        suffix=None, metadata={}, evaluation_id=f"eval_{number}", **fields,
    )  # fmt: skip


def scored(number: int, top1: float | None) -> Evaluation:
    return Evaluation(
        id=f"eval_{number}", status="succeeded" if top1 is not None else "failed", created_at=0, dataset_id="ds_1",
        classifier_id="clf", split="test", scores=None if top1 is None else {"top1": top1, "top5": 1.0},
    )  # fmt: skip


JOBS = [
    *(job(i, "mmft", None, i) for i in range(3)),
    *(job(10 + i, "mmft", 1, i) for i in range(3)),
    *(job(20 + i, "flyp", 1, i) for i in range(2)),
    job(30, "zero_shot", None, 0),
]
SCORES = {0: 0.70, 1: 0.74, 2: 0.72, 10: 0.5, 11: None, 12: 0.6, 20: 0.4, 30: 0.3}
EVALUATIONS = {f"eval_{number}": scored(number, top1) for number, top1 in SCORES.items()}


def test_mean_and_standard_error_over_seeds() -> None:
    found = rows(JOBS, EVALUATIONS, KNOWN, SETTINGS, READERS["dtd"])
    assert [(row.method, row.trained_on) for row in found] == [
        ("flyp", "1 per class"), ("mmft", "1 per class"), ("zero_shot", "none"), ("mmft", "all of train"),
    ]  # fmt: skip
    flyp, few, zero, full = found
    assert full.mean == pytest.approx(72.0)
    assert full.stderr == pytest.approx(2.0 / 3**0.5)  # 70, 72, 74: s = 2
    assert (full.runs, full.missing, full.seeds, full.paper) == (3, 0, [0, 1, 2], 77.68)
    assert few.mean == pytest.approx(55.0)
    assert (few.runs, few.missing, few.seeds, few.paper) == (2, 1, [0, 2], None)
    assert (flyp.mean, flyp.stderr, flyp.runs, flyp.missing) == (pytest.approx(40.0), None, 1, 1)
    assert (zero.mean, zero.stderr, zero.paper) == (pytest.approx(30.0), None, None)


@pytest.mark.parametrize("later_first", [True, False])
def test_a_repeated_run_counts_once_by_its_score(later_first: bool) -> None:
    again = [job(11, "mmft", 1, 1), job(41, "mmft", 1, 1)]
    evaluations = EVALUATIONS | {"eval_41": scored(41, 0.9)}
    (row,) = rows(again[::-1] if later_first else again, evaluations, KNOWN, SETTINGS, READERS["dtd"])
    assert (row.mean, row.runs, row.missing) == (pytest.approx(90.0), 1, 0)


def test_the_papers_figures_stand_beside_ours_or_not_at_all() -> None:
    reported = {name: benchmark.paper for name, benchmark in READERS.items()}
    assert reported == {
        "dtd": 77.68, "cars": 82.25, "gtsrb": 99.08, "cub": 78.75, "cifar10": 98.04, "cifar100": 88.92,
        "caltech101": 96.73, "eurosat": 98.97, "flowers102": 94.09, "food101": 88.79,
        "oxford_pet": None, "aircraft": None, "imagenet": None,
    }  # fmt: skip
    found = rows(JOBS, EVALUATIONS, KNOWN, SETTINGS, READERS["aircraft"])
    assert [row.paper for row in found] == [None] * 4


def test_the_table_says_what_was_measured() -> None:
    done = Result(
        dataset="dtd", title="DTD", paper=77.68, captioner="qwen@1", notes=["split 1 of the release's ten"],
        rows=rows(JOBS, EVALUATIONS, KNOWN, SETTINGS, READERS["dtd"]),
    )  # fmt: skip
    failed = Result(dataset="cub", title="CUB", error="cap_1 is failed: the model is gone")
    text = report([done, failed], SETTINGS)
    lines = [line.split() for line in text.splitlines()]
    assert ["all", "of", "train", "mmft", "72.00", "±", "1.15", "3", "0", "77.68"] in lines
    assert ["1", "per", "class", "mmft", "55.00", "±", "5.00*", "2", "1", "-"] in lines
    assert "captions by qwen@1" in text
    assert "split 1 of the release's ten" in text
    assert "failed: cap_1 is failed: the model is gone" in text
    assert text.endswith(PAPER_NOTE)
