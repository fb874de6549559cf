"""Negative log-likelihood after temperature scaling fitted on the val split (temperature.py)."""

from services.evaluator.metrics.base import Metric, Predictions
from services.evaluator.metrics.nll import nll


def _nll_scaled(p: Predictions) -> float | None:
    return None if p.scaled is None else nll(p.scaled)


NLL_SCALED = Metric(
    title="Negative log-likelihood, temperature scaled", unit="nats", higher_is_better=False, compute=_nll_scaled
)
