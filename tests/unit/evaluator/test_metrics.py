"""Metrics against values worked out by hand and against scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.evaluator.metrics import METRICS, Predictions, score
from shared.errors import InvalidInput


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, dtype=np.float64)).astype(np.float32)


def test_top1_top5_and_nll_by_hand():
    logits = logits_of([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]])
    result = score(logits, [0, 2, 2])
    assert result["top1"] == pytest.approx(2 / 3)
    assert result["top5"] == 1.0  # three classes only
    assert result["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.2) + math.log(0.5)) / 3, rel=1e-6)


def test_top5_counts_ranks_up_to_five():
    logits = np.arange(8, 0, -1, dtype=np.float32)[None].repeat(8, 0)  # class 0 first, class 7 last
    assert score(logits, np.arange(8))["top5"] == pytest.approx(5 / 8)


def test_equal_logits_are_ranked_in_class_order():
    assert score(np.zeros((2, 7), dtype=np.float32), [0, 5]) == pytest.approx(
        {
            "top1": 0.5,
            "top5": 0.5,
            "macro_f1": (2 / 3 + 0) / 2,
            "balanced_accuracy": 0.5,
            "worst_class": 0.0,
            "ece": abs(0.5 - 1 / 7),
            "nll": math.log(7),
            "brier": 1 - 1 / 7,
        }
    )


def test_macro_f1_by_hand():
    # class 0: TP 2, FP 1, FN 0 -> 4/5; class 1: TP 0, FP 0, FN 1 -> 0; class 2 occurs nowhere and is left out
    logits = logits_of([[0.8, 0.1, 0.1]] * 3)
    assert score(logits, [0, 0, 1])["macro_f1"] == pytest.approx((4 / 5 + 0) / 2)


def test_ece_by_hand():
    # confidences 0.95 (right), 0.95 (wrong) share bin 15; 0.6 (right) lies in bin 9
    logits = logits_of([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6]])
    expected = (2 / 3) * abs(0.5 - 0.95) + (1 / 3) * abs(1 - 0.6)
    assert score(logits, [0, 1, 1])["ece"] == pytest.approx(expected, rel=1e-5)


def test_a_perfect_confident_classifier():
    logits = np.eye(4, dtype=np.float32) * 1000
    ones = dict.fromkeys(("top1", "top5", "macro_f1", "balanced_accuracy", "worst_class"), 1.0)
    zeros = dict.fromkeys(("ece", "nll", "brier"), 0.0)
    assert score(logits, np.arange(4)) == pytest.approx(ones | zeros)


def test_directions_and_units():
    lower = {"nll", "brier", "ece", "nll_scaled", "ece_scaled", "forgetting", "captions_flagged"}
    lower |= {"train_seconds", "caption_seconds", "trainable_parameters", "peak_memory_mib", "latency_ms"}
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == lower
    assert all(metric.title and metric.unit for metric in METRICS.values())


def test_a_class_without_images_has_no_recall():
    # class 0: 2 of 3 right; class 1: none of 1; class 2 has no image, though one is taken for it
    logits = logits_of([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]])
    result = score(logits, [0, 0, 0, 1])
    assert result["balanced_accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["worst_class"] == 0.0


def test_scaled_metrics_are_those_of_divided_logits():
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    result, divided = score(logits, labels, temperature=2.5), score(logits / 2.5, labels)
    assert result["nll_scaled"] == pytest.approx(divided["nll"])
    assert result["ece_scaled"] == pytest.approx(divided["ece"])
    assert result["nll"] == score(logits, labels)["nll"]
    assert not {"nll_scaled", "ece_scaled"} & divided.keys()


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), c=st.integers(2, 8))
def test_against_scikit_learn(seed, n, c):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(n, c)).astype(np.float32) * 3, rng.integers(0, c, n)
    p = Predictions(logits, labels)
    result = score(logits, labels)
    assert result["top1"] == pytest.approx(sklearn_metrics.accuracy_score(labels, p.predicted))
    assert result["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(labels, p.predicted, average="macro", zero_division=0)
    )
    assert result["nll"] == pytest.approx(sklearn_metrics.log_loss(labels, p.probabilities, labels=range(c)))
    recalls = sklearn_metrics.recall_score(labels, p.predicted, average=None, labels=np.unique(labels), zero_division=0)
    assert result["balanced_accuracy"] == pytest.approx(recalls.mean())
    assert result["worst_class"] == pytest.approx(recalls.min())
    brier = sum((p.probabilities[i, k] - (labels[i] == k)) ** 2 for i in range(n) for k in range(c)) / n
    assert result["brier"] == pytest.approx(brier)
    if c > 5:
        expected = sklearn_metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(c))
        assert result["top5"] == pytest.approx(expected)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), c=st.integers(2, 8))
def test_ece_against_a_loop_over_bins(seed, n, c):
    rng = np.random.default_rng(seed)
    p = Predictions(rng.normal(size=(n, c)) * 3, rng.integers(0, c, n))
    confidence, right = p.probabilities.max(1), p.predicted == p.labels
    expected = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert METRICS["ece"].compute(p) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logits", "labels", "code"),
    [
        (np.zeros((0, 3)), [], "invalid_predictions"),
        (np.zeros((2, 3)), [0], "invalid_predictions"),
        (np.zeros(3), [0, 1, 2], "invalid_predictions"),
        (np.zeros((2, 3)), [0, 3], "label_out_of_range"),
        (np.zeros((2, 3)), [-1, 0], "label_out_of_range"),
        (np.full((1, 3), np.nan), [0], "logits_not_finite"),
    ],
)
def test_nonsense_is_refused(logits, labels, code):
    with pytest.raises(InvalidInput) as caught:
        score(logits, labels)
    assert caught.value.code == code
