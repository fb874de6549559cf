"""Recall at 1, 5 and 10 of captions by their image and of images by their caption, measured by passes/retrieval.py."""

from services.evaluator.metrics.base import Metric


def _recall(title: str) -> Metric:
    return Metric(title=title, unit="fraction", higher_is_better=True)


IMAGE_TO_TEXT_R1 = _recall("Image to caption, recall at 1")
IMAGE_TO_TEXT_R5 = _recall("Image to caption, recall at 5")
IMAGE_TO_TEXT_R10 = _recall("Image to caption, recall at 10")
TEXT_TO_IMAGE_R1 = _recall("Caption to image, recall at 1")
TEXT_TO_IMAGE_R5 = _recall("Caption to image, recall at 5")
TEXT_TO_IMAGE_R10 = _recall("Caption to image, recall at 10")
