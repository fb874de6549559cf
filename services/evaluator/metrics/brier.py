"""Brier score (Brier 1950), the sum over classes: the mean squared distance between the probabilities and the one-hot
label, from 0 to 2."""

import numpy as np

from services.evaluator.metrics.base import Metric, Predictions


def _brier(p: Predictions) -> float:
    right = p.probabilities[np.arange(len(p.labels)), p.labels]
    return float((np.square(p.probabilities).sum(1) - 2 * right + 1).mean())


BRIER = Metric(title="Brier score", unit="1", higher_is_better=False, compute=_brier)
