"""Top-5 accuracy: the share of images with the right class among the five most probable (or all, if fewer)."""

from services.evaluator.metrics.base import Metric, Predictions


def _top5(p: Predictions) -> float:
    return float((p.ranked[:, :5] == p.labels[:, None]).any(1).mean())


TOP5 = Metric(title="Top-5 accuracy", unit="fraction", higher_is_better=True, compute=_top5)
