"""Zero-shot accuracy on a held-aside data set, measured by passes/forgetting.py."""

from services.evaluator.metrics.base import Metric

FORGETTING_BEFORE = Metric(title="Zero-shot top-1 held aside, base model", unit="fraction", higher_is_better=True)
FORGETTING_AFTER = Metric(title="Zero-shot top-1 held aside, this model", unit="fraction", higher_is_better=True)
FORGETTING = Metric(title="Zero-shot top-1 lost held aside", unit="fraction", higher_is_better=False)
