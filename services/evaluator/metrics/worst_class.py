"""Worst class: the lowest recall among the classes that have images."""

from services.evaluator.metrics.base import Metric, Predictions


def _worst_class(p: Predictions) -> float:
    return float(p.recalls.min())


WORST_CLASS = Metric(title="Recall of the worst class", unit="fraction", higher_is_better=True, compute=_worst_class)
