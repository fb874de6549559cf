"""Macro-F1: the unweighted mean of the classes' F1 = 2TP / (2TP + FP + FN), over the classes that occur among the
labels or the predictions."""

import numpy as np

from services.evaluator.metrics.base import Metric, Predictions


def _macro_f1(p: Predictions) -> float:
    c = p.logits.shape[1]
    hits = np.bincount(p.labels[p.predicted == p.labels], minlength=c)
    total = np.bincount(p.labels, minlength=c) + np.bincount(p.predicted, minlength=c)  # 2TP + FP + FN
    seen = total > 0
    return float((2 * hits[seen] / total[seen]).mean())


MACRO_F1 = Metric(title="Macro-F1", unit="fraction", higher_is_better=True, compute=_macro_f1)
