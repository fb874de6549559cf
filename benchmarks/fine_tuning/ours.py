"""Our way to run a method, as the trainer's task does it but without a database: object store, row cache, loop."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_tuning.material import Material, Split
from services.trainer.features import Features
from services.trainer.frozen import fit
from services.trainer.methods.base import Method
from services.trainer.methods.mmft import MMFT
from services.trainer.training.data import TrainData
from services.trainer.training.loop import StepReport, train
from services.trainer.training.reports import TrainResult
from shared.classifier.head import Head
from shared.clip.embedder import Embedder
from shared.clip.loading import LoadedClip, encode_image
from shared.clip.pixels import load_pixels
from shared.db.models import Image
from shared.row_cache import RowCache
from shared.store.disk import DiskStore


class Ours:
    """Our way to run a method, with an object store and a cache of its own."""

    def __init__(self, clip: LoadedClip, material: Material, folder: Path, device: torch.device) -> None:
        self.clip, self.material, self.device = clip, material, device
        self.store = DiskStore(folder / "store")
        self.cache = RowCache(folder / "rows", 20 << 30)
        self.images = {name: self._put(getattr(material, name)) for name in ("train", "val", "test")}
        self.labels = {name: torch.tensor(getattr(material, name).labels) for name in self.images}

    def _put(self, split: Split) -> list[Image]:
        return [Image(sha256=self.store.put_blob(file.read_bytes())) for file in split.files]

    def pixels(self, split: str) -> Any:
        return load_pixels(self.cache, self.store, self.images[split], self.clip, _ignore)

    def data(self) -> TrainData:
        captions, names = self.material.train.captions, self.material.class_names
        train, val = self.pixels("train"), self.pixels("val")
        return TrainData(train, self.labels["train"], captions, names, val, self.labels["val"])

    def features(self, method: Method) -> Features:
        """What the trainer's task gives a method: its prototypes, and embeddings of the images where it asks."""
        embedder = Embedder(self.clip, self.cache, self.device)
        own: list[list[str]] = [[] for _ in self.material.class_names]
        for label, captions in zip(self.material.train.labels, self.material.train.captions, strict=True):
            own[label].extend(captions)
        texts = [method.prototype_texts(name, each) for name, each in zip(self.material.class_names, own, strict=True)]
        found = Features(
            class_names=self.material.class_names,
            prototypes=embedder.class_means(texts),
            logit_scale=float(self.clip.model.logit_scale.detach().exp()),
        )
        if method.kind == "frozen":
            found = dataclasses.replace(
                found,
                train=embedder.images(self.store, self.images["train"], _ignore),
                val=embedder.images(self.store, self.images["val"], _ignore),
                train_labels=self.labels["train"],
                val_labels=self.labels["val"],
            )
        if getattr(method, "needs_unprojected", False):
            raw = {name: embedder.unprojected(self.store, self.images[name], _ignore) for name in ("train", "val")}
            found = dataclasses.replace(found, train_unprojected=raw["train"], val_unprojected=raw["val"])
        return found

    def run(self, method: Method, seed: int) -> TrainResult:
        if not isinstance(method, MMFT):
            return fit(self.clip, method, self.features(method), seed)
        features = self.features(method)
        data = self.data()
        return train(
            self.clip, method, data, features=features, seed=seed, on_step=_read_when_due, device=str(self.device)
        )

    def accuracy(self, state: dict[str, Tensor], head: Head, pixels: Any) -> float:
        """Top-1 on the test images of the model with these weights."""
        base = {name: value.clone() for name, value in self.clip.model.state_dict().items()}
        self.clip.model.load_state_dict(state)
        try:
            return head.top1(encode_image(self.clip, pixels), self.labels["test"])
        finally:
            self.clip.model.load_state_dict(base)


def _ignore(_: object) -> None:
    return None


def _read_when_due(report: StepReport) -> None:
    """As the trainer's task: figures are fetched when they are to be shown."""
    if report.due:
        _ = report.loss, report.grad_norm
