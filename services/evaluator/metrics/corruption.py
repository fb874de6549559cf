"""Robustness to common corruptions, measured by passes/corruptions.py."""

from services.evaluator.metrics.base import Metric

CORRUPTION_TOP1 = Metric(title="Mean top-1 accuracy on corrupted images", unit="fraction", higher_is_better=True)
CORRUPTION_ROBUSTNESS = Metric(
    title="Corrupted over clean accuracy, same images", unit="fraction", higher_is_better=True
)
