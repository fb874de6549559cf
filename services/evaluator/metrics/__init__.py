"""Every metric by name. A new one is one file and one line here. numpy only: no torch."""

from typing import Any

from services.evaluator.metrics.balanced_accuracy import BALANCED_ACCURACY
from services.evaluator.metrics.base import Metric, Predictions
from services.evaluator.metrics.brier import BRIER
from services.evaluator.metrics.captions import CAPTIONS_DISTINCT_2, CAPTIONS_FLAGGED, CAPTIONS_NAMING_CLASS
from services.evaluator.metrics.corruption import CORRUPTION_ROBUSTNESS, CORRUPTION_TOP1
from services.evaluator.metrics.cost import (
    CAPTION_SECONDS,
    LATENCY_MS,
    PEAK_MEMORY_MIB,
    TRAIN_SECONDS,
    TRAINABLE_PARAMETERS,
)
from services.evaluator.metrics.ece import ECE
from services.evaluator.metrics.ece_scaled import ECE_SCALED
from services.evaluator.metrics.forgetting import FORGETTING, FORGETTING_AFTER, FORGETTING_BEFORE
from services.evaluator.metrics.macro_f1 import MACRO_F1
from services.evaluator.metrics.nll import NLL
from services.evaluator.metrics.nll_scaled import NLL_SCALED
from services.evaluator.metrics.retrieval import (
    IMAGE_TO_TEXT_R1,
    IMAGE_TO_TEXT_R5,
    IMAGE_TO_TEXT_R10,
    TEXT_TO_IMAGE_R1,
    TEXT_TO_IMAGE_R5,
    TEXT_TO_IMAGE_R10,
)
from services.evaluator.metrics.top1 import TOP1
from services.evaluator.metrics.top5 import TOP5
from services.evaluator.metrics.worst_class import WORST_CLASS

METRICS: dict[str, Metric] = {
    "top1": TOP1,
    "top5": TOP5,
    "macro_f1": MACRO_F1,
    "balanced_accuracy": BALANCED_ACCURACY,
    "worst_class": WORST_CLASS,
    "nll": NLL,
    "brier": BRIER,
    "ece": ECE,
    "nll_scaled": NLL_SCALED,
    "ece_scaled": ECE_SCALED,
    "corruption_top1": CORRUPTION_TOP1,
    "corruption_robustness": CORRUPTION_ROBUSTNESS,
    "forgetting_before": FORGETTING_BEFORE,
    "forgetting_after": FORGETTING_AFTER,
    "forgetting": FORGETTING,
    "image_to_text_r1": IMAGE_TO_TEXT_R1,
    "image_to_text_r5": IMAGE_TO_TEXT_R5,
    "image_to_text_r10": IMAGE_TO_TEXT_R10,
    "text_to_image_r1": TEXT_TO_IMAGE_R1,
    "text_to_image_r5": TEXT_TO_IMAGE_R5,
    "text_to_image_r10": TEXT_TO_IMAGE_R10,
    "captions_flagged": CAPTIONS_FLAGGED,
    "captions_distinct_2": CAPTIONS_DISTINCT_2,
    "captions_naming_class": CAPTIONS_NAMING_CLASS,
    "train_seconds": TRAIN_SECONDS,
    "caption_seconds": CAPTION_SECONDS,
    "trainable_parameters": TRAINABLE_PARAMETERS,
    "peak_memory_mib": PEAK_MEMORY_MIB,
    "latency_ms": LATENCY_MS,
}


def score(logits: Any, labels: Any, temperature: float | None = None) -> dict[str, float]:
    """Every metric that logits (N, C), scale included, and labels (N,) allow. Raises InvalidInput as `Predictions`."""
    return scores(Predictions(logits, labels, temperature))


def scores(predictions: Predictions) -> dict[str, float]:
    """The same, of predictions made before."""
    found = {name: metric.compute(predictions) for name, metric in METRICS.items() if metric.compute is not None}
    return {name: value for name, value in found.items() if value is not None}


__all__ = ["METRICS", "Metric", "Predictions", "score", "scores"]
