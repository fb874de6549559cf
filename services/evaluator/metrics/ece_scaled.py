"""Expected calibration error (bins: ece.py) after temperature scaling fitted on the val split (temperature.py)."""

from services.evaluator.metrics.base import Metric, Predictions
from services.evaluator.metrics.ece import ece


def _ece_scaled(p: Predictions) -> float | None:
    return None if p.scaled is None else ece(p.scaled)


ECE_SCALED = Metric(
    title="Expected calibration error, temperature scaled", unit="fraction", higher_is_better=False, compute=_ece_scaled
)
