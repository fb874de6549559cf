import numpy as np
import pytest

from services.evaluator.metrics import Predictions
from services.evaluator.scoring import tables

NAMES = ["cat", "dog", "newt", "owl"]
LABELS = np.array([0, 0, 0, 1, 1, 2])
GIVEN = np.array([0, 1, 1, 1, 0, 3])


@pytest.fixture
def predictions() -> Predictions:
    return Predictions(np.eye(4)[GIVEN], LABELS)


def test_each_class_by_its_recall_worst_first(predictions):
    rows = tables.per_class(predictions, NAMES)
    assert [row["class_name"] for row in rows] == ["newt", "cat", "dog", "owl"]
    newt, cat, dog, owl = rows
    assert newt == {"class_name": "newt", "images": 1, "predicted": 0, "precision": None, "recall": 0.0, "f1": 0.0}
    assert cat == {
        "class_name": "cat", "images": 3, "predicted": 2, "precision": 0.5, "recall": 0.3333, "f1": 0.4,
    }  # fmt: skip
    assert (dog["precision"], dog["recall"], dog["f1"]) == (0.3333, 0.5, 0.4)
    assert owl == {"class_name": "owl", "images": 0, "predicted": 1, "precision": 0.0, "recall": None, "f1": None}


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 7)), rng.integers(0, 7, 300)
    names = [str(c) for c in range(7)]
    rows = tables.per_class(Predictions(logits, labels), names)
    expected = metrics.precision_recall_fscore_support(labels, logits.argmax(1), labels=range(7))
    for row in rows:
        c = int(row["class_name"])
        found = (row["precision"], row["recall"], row["f1"], row["images"])
        assert found == pytest.approx(tuple(column[c] for column in expected), abs=5e-5)
    matrix = metrics.confusion_matrix(labels, logits.argmax(1))
    for pair in tables.confusions(Predictions(logits, labels), names):
        assert pair["images"] == matrix[int(pair["class_name"]), int(pair["predicted"])]


def test_the_pairs_most_often_confused(predictions):
    assert tables.confusions(predictions, NAMES) == [
        {"class_name": "cat", "predicted": "dog", "images": 2, "share": 0.6667},
        {"class_name": "dog", "predicted": "cat", "images": 1, "share": 0.5},
        {"class_name": "newt", "predicted": "owl", "images": 1, "share": 1.0},
    ]
    assert tables.confusions(Predictions(np.eye(4), [0, 1, 2, 3]), NAMES) == []


def test_tables_are_bounded():
    classes = tables.MAX_CLASSES + 200
    labels = np.arange(classes)
    logits = np.roll(np.eye(classes), 1, axis=1)
    logits[:150] = np.eye(classes)[:150]
    p = Predictions(logits, labels)
    rows = tables.per_class(p, [str(c) for c in labels])
    assert len(rows) == tables.MAX_CLASSES
    assert {row["recall"] for row in rows} == {0.0}  # the worst are kept
    assert len(tables.confusions(p, [str(c) for c in labels])) == tables.MAX_PAIRS
