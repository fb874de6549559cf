"""Top-1 accuracy: the share of images whose most probable class is the right one."""

from services.evaluator.metrics.base import Metric, Predictions


def _top1(p: Predictions) -> float:
    return float((p.predicted == p.labels).mean())


TOP1 = Metric(title="Top-1 accuracy", unit="fraction", higher_is_better=True, compute=_top1)
