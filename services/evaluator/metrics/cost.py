"""What a classifier costs, as recorded when it was made, and its latency as measured by passes/cost.py."""

from services.evaluator.metrics.base import Metric

TRAIN_SECONDS = Metric(title="Training time", unit="s", higher_is_better=False)
CAPTION_SECONDS = Metric(title="Captioning time of the captions used", unit="s", higher_is_better=False)
TRAINABLE_PARAMETERS = Metric(title="Trainable parameters", unit="parameters", higher_is_better=False)
PEAK_MEMORY_MIB = Metric(title="Peak memory in training", unit="MiB", higher_is_better=False)
LATENCY_MS = Metric(title="Latency of one image", unit="ms", higher_is_better=False)
