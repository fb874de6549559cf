"""Classifiers as the API serves them. Imports torch, so it is imported when the first one is asked for."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from services.evaluator.prediction.model_size import check_size
from services.evaluator.settings import EvaluatorSettings
from shared.classifier.card import ClassifierCard
from shared.classifier.folder import Classifier, load_classifier, write_standalone
from shared.clip.loading import LoadedClip, preprocess_uint8
from shared.clip.warm import place, warm_clip
from shared.core import Core
from shared.datasets.images import decode
from shared.errors import InvalidInput

_one = Lock()  # whole models in memory for a check or a download: one at a time, however many ask


class Served:
    """A classifier that takes files: what serving.Model asks for."""

    def __init__(self, classifier: Classifier, batch: int) -> None:
        self.card, self._classifier, self._batch = classifier.card, classifier, batch

    def prepare(self, image: bytes) -> Tensor:
        return preprocess_uint8(decode(image), self._classifier.clip)

    def probabilities(self, prepared: Sequence[Tensor]) -> list[list[float]]:
        logits = self._classifier.logits(torch.stack(list(prepared)), self._batch)
        if not logits.isfinite().all():
            raise InvalidInput(
                "the classifier gives NaN or infinite scores: its weights are damaged or its training diverged; train "
                "or import it again",
                code="logits_not_finite",
            )
        rows: list[list[float]] = logits.double().softmax(1).tolist()
        return rows


def load(core: Core, settings: EvaluatorSettings, storage_key: str) -> Served:
    """Raises what `load_classifier` does, NotFound where the store has lost the folder."""
    with core.store.local_folder(storage_key) as folder:
        return Served(_open(core, settings, folder), settings.predict_batch)


def check(core: Core, settings: EvaluatorSettings, folder: Path) -> ClassifierCard:
    """The card of a folder that loads, which nobody has checked yet. Raises as `load`."""
    with _one:
        check_size(folder)
        return _open(core, settings, folder).card


def standalone(core: Core, settings: EvaluatorSettings, folder: Path, target: Path) -> None:
    """Writes the classifier in `folder`, with all weights, into `target`. Raises as `load`."""
    with _one:
        write_standalone(_open(core, settings, folder), target)


def _open(core: Core, settings: EvaluatorSettings, folder: Path) -> Classifier:
    """A classifier on the device that serves."""

    def base(name: str) -> LoadedClip:
        return warm_clip(name, core.settings.model_cache, core.settings.model_roots)  # shared by those on its weights

    return load_classifier(folder, str(place(settings.device)), base)
