"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599, sec. 4.2): one number T that logits are divided by, which
minimises the negative log-likelihood of held-out images. The ranking stays. Shapes: N images, C classes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from services.evaluator.metrics.base import Floats, Predictions, log_softmax

LOWEST, HIGHEST = 0.01, 100.0
_STEPS = 100  # bisection halves the range in logs 100 times: more than float64 can tell apart
_PRECISE = 1e-6  # relative


@dataclass(frozen=True)
class Temperature:
    """`value`, within 0.01 and 100; `at_bound`: the likelihood rises beyond that range, as where every image is right
    (the lower bound) or the logits say nothing (the upper one). NLL before and after on the images it was fitted on."""

    value: float
    at_bound: bool
    images: int
    nll_before: float
    nll_after: float


def fit(logits: Any, labels: Any) -> Temperature:
    """logits (N, C), labels (N,), N at least 1. The NLL is convex in 1 / T, so its one minimum is where the derivative
    changes sign; found by Newton's method, held within a bracket that shrinks at every step. Where T makes no
    difference (one class, equal logits) it is 1. Raises InvalidInput as `Predictions` does."""
    p = Predictions(logits, labels)
    centred = p.logits - p.logits[np.arange(len(p.labels)), p.labels][:, None]  # the right class has 0
    low, high = 1 / HIGHEST, 1 / LOWEST  # of b = 1 / T
    if not centred.any():
        best, at_bound = 1.0, False
    elif _slope(centred, low)[0] >= 0:
        best, at_bound = low, True
    elif _slope(centred, high)[0] <= 0:
        best, at_bound = high, True
    else:
        best, at_bound = _root(centred, low, high), False
    return Temperature(1 / best, at_bound, len(p.labels), _nll(centred, 1.0), _nll(centred, best))


def _root(centred: Floats, low: float, high: float) -> float:
    b = 1.0
    for _ in range(_STEPS):
        slope, curvature = _slope(centred, b)
        if slope > 0:
            high = b
        else:
            low = b
        newton = b - slope / curvature if curvature > 0 else low
        after = newton if low < newton < high else float(np.sqrt(low * high))
        if abs(after - b) <= _PRECISE * b:
            return after
        b = after
    return b


def _slope(centred: Floats, b: float) -> tuple[float, float]:
    """First and second derivative by b of the NLL of logits times b: the mean over the images of the expectation of a
    centred logit, and of its variance."""
    p = np.exp(log_softmax(b * centred))
    mean = (p * centred).sum(1)
    variance = (p * np.square(centred)).sum(1) - np.square(mean)
    return float(mean.mean()), float(variance.mean())


def _nll(centred: Floats, b: float) -> float:
    scaled = b * centred
    top = scaled.max(1)
    return float((top + np.log(np.exp(scaled - top[:, None]).sum(1))).mean())
