"""Expected calibration error (Guo et al., arXiv 1706.04599, eq. 3) with 15 equal-width bins over the probability of the
predicted class: sum over bins of (images in bin / N) * |accuracy - mean confidence|. Bin k is (k/15, (k+1)/15]."""

import numpy as np

from services.evaluator.metrics.base import Metric, Predictions

BINS = 15


def ece(p: Predictions) -> float:
    confidence = p.probabilities.max(1)
    correct = p.predicted == p.labels
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


ECE = Metric(title="Expected calibration error", unit="fraction", higher_is_better=False, compute=ece)
