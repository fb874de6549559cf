"""Macro-F1: the unweighted mean of the classes' F1 = 2TP / (2TP + FP + FN), over the classes that occur among the
labels or the predictions."""

from services.evaluator.metrics.base import Metric, Predictions


def _macro_f1(p: Predictions) -> float:
    total = p.images_per_class + p.predicted_per_class  # 2TP + FP + FN
    seen = total > 0
    return float((2 * p.hits_per_class[seen] / total[seen]).mean())


MACRO_F1 = Metric(title="Macro-F1", unit="fraction", higher_is_better=True, compute=_macro_f1)
