"""Statistics of the captions a classifier was trained on, read by passes/caption_statistics.py."""

from services.evaluator.metrics.base import Metric

CAPTIONS_FLAGGED = Metric(title="Share of the captions with a flag", unit="fraction", higher_is_better=False)
CAPTIONS_DISTINCT_2 = Metric(title="Distinct-2 of the captions", unit="fraction", higher_is_better=True)
CAPTIONS_NAMING_CLASS = Metric(
    title="Share of the captions that name their class", unit="fraction", higher_is_better=True
)
