"""Every metric by name. A new one is one file and one line here. numpy only: no torch."""

from typing import Any

from services.evaluator.metrics.base import Metric, Predictions
from services.evaluator.metrics.ece import ECE
from services.evaluator.metrics.macro_f1 import MACRO_F1
from services.evaluator.metrics.nll import NLL
from services.evaluator.metrics.top1 import TOP1
from services.evaluator.metrics.top5 import TOP5

METRICS: dict[str, Metric] = {"top1": TOP1, "top5": TOP5, "macro_f1": MACRO_F1, "ece": ECE, "nll": NLL}


def score(logits: Any, labels: Any) -> dict[str, float]:
    """Every metric of logits (N, C), scale included, and labels (N,). Raises InvalidInput as `Predictions` does."""
    predictions = Predictions(logits, labels)
    return {name: metric.compute(predictions) for name, metric in METRICS.items()}


__all__ = ["METRICS", "Metric", "Predictions", "score"]
