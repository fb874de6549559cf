"""Negative log-likelihood: the mean of -ln p(right class)."""

import numpy as np

from services.evaluator.metrics.base import Metric, Predictions


def nll(p: Predictions) -> float:
    return float(-p.log_probabilities[np.arange(len(p.labels)), p.labels].mean())


NLL = Metric(title="Negative log-likelihood", unit="nats", higher_is_better=False, compute=nll)
