"""What a metric is and what it reads. Shapes: N images, C classes. Every metric is one number per evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidInput

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Predictions:
    """A classifier's output on a test set: logits (N, C) and labels (N,) as arrays or anything numpy converts (CPU
    tensors too), and what follows from them, computed once, in float64. temperature: what the logits are divided by to
    be calibrated, fitted on other images (temperature.py); None where there were none.

    Raises InvalidInput where the shapes disagree, a label names no class, there is no image, or a logit is not finite.
    """

    def __init__(self, logits: Any, labels: Any, temperature: float | None = None) -> None:
        self.temperature = temperature
        self.logits: Floats = np.asarray(logits, dtype=np.float64)
        self.labels: Integers = np.asarray(labels, dtype=np.int64)
        n, c = self.logits.shape if self.logits.ndim == 2 else (0, 0)
        if n == 0 or c == 0 or self.labels.shape != (n,):
            raise InvalidInput(
                f"Scoring needs logits of shape (images, classes) and one label per image, at least one image; "
                f"got {self.logits.shape} and {self.labels.shape}. Is the test split empty?",
                code="invalid_predictions",
            )
        if self.labels.min() < 0 or self.labels.max() >= c:
            raise InvalidInput(
                f"Labels run from {self.labels.min()} to {self.labels.max()}, but the classifier has {c} classes. "
                "Score it on a data set with the class list it was made for.",
                code="label_out_of_range",
            )
        if not np.isfinite(self.logits).all():
            raise InvalidInput(
                "The classifier gives NaN or infinite scores: its training diverged. "
                "Train again with a lower learning rate.",
                code="logits_not_finite",
            )

    @cached_property
    def scaled(self) -> "Predictions | None":
        """The same, calibrated: logits / temperature."""
        return None if self.temperature is None else Predictions(self.logits / self.temperature, self.labels)

    @cached_property
    def log_probabilities(self) -> Floats:
        """(N, C) natural logarithms of the softmax."""
        return log_softmax(self.logits)

    @cached_property
    def probabilities(self) -> Floats:
        """(N, C)"""
        return np.exp(self.log_probabilities)

    @cached_property
    def ranked(self) -> Integers:
        """(N, C) classes from the most to the least probable; equal ones in class order."""
        return np.argsort(-self.logits, axis=1, kind="stable")

    @property
    def predicted(self) -> Integers:
        """(N,)"""
        top: Integers = self.ranked[:, 0]
        return top

    @cached_property
    def images_per_class(self) -> Integers:
        """(C,) by label."""
        return np.bincount(self.labels, minlength=self.logits.shape[1])

    @cached_property
    def hits_per_class(self) -> Integers:
        """(C,) images whose prediction is their label."""
        return np.bincount(self.labels[self.predicted == self.labels], minlength=self.logits.shape[1])

    @cached_property
    def predicted_per_class(self) -> Integers:
        """(C,) by prediction."""
        return np.bincount(self.predicted, minlength=self.logits.shape[1])

    @cached_property
    def recalls(self) -> Floats:
        """(at most C,) recall of each class that has images, in class order."""
        seen = self.images_per_class > 0
        recalls: Floats = self.hits_per_class[seen] / self.images_per_class[seen]
        return recalls


def log_softmax(logits: Floats) -> Floats:
    """Over the last axis, shifted by the largest so that nothing overflows."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_p: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_p


@dataclass(frozen=True)
class Metric:
    """`title` for people, `unit` of the value, its direction, and the pure function that computes it. It gives None
    where there is nothing to compute it from. No function: the value is measured beside the predictions, by a pass
    (services/evaluator/passes) or while training."""

    title: str
    unit: str
    higher_is_better: bool
    compute: Callable[[Predictions], float | None] | None = None
