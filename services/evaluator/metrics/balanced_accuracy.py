"""Balanced accuracy: the unweighted mean of the recalls of the classes that have images."""

from services.evaluator.metrics.base import Metric, Predictions


def _balanced_accuracy(p: Predictions) -> float:
    return float(p.recalls.mean())


BALANCED_ACCURACY = Metric(
    title="Balanced accuracy", unit="fraction", higher_is_better=True, compute=_balanced_accuracy
)
