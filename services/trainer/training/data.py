"""What a run is trained on. Shapes: N training images, V validation images, S the model's image size in pixels."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from services.trainer.methods.base import FineTune
from services.trainer.training.prototypes import TextTable
from shared.clip.loading import LoadedClip
from shared.errors import InvalidInput


class ImageRows(Protocol):
    """(N, 3, S, S) uint8 kept elsewhere than in memory, read some rows at a time (shared.clip.pixels.Pixels)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


def _no_images() -> Tensor:
    return torch.empty(0, 3, 0, 0, dtype=torch.uint8)


def _no_labels() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class TrainData:
    """images (N, 3, S, S) uint8, already resized by the model's own rule; labels (N,) int64 into class_names, which are
    display names; captions[i]: the captions of image i, without prefix, possibly none. Validation images need no
    captions and may be absent: then the last epoch is kept instead of the best."""

    images: Tensor | ImageRows
    labels: Tensor
    captions: list[list[str]]
    class_names: list[str]
    val_images: Tensor | ImageRows = field(default_factory=_no_images)
    val_labels: Tensor = field(default_factory=_no_labels)

    def check(self, clip: LoadedClip, method: FineTune) -> None:
        """Raises InvalidInput on what would only fail later, or train on nonsense."""
        n, classes = len(self.labels), len(self.class_names)
        if classes < 2 or n < 2:
            raise InvalidInput(
                f"A classifier needs at least 2 classes, and training 2 images; the split has {classes} and {n}.",
                code="too_little_data",
            )
        size = (3, clip.image_size, clip.image_size)
        for name, images, labels in (("train", self.images, self.labels), ("val", self.val_images, self.val_labels)):
            if len(images) != len(labels) or (len(images) and tuple(images.shape[1:]) != size):
                raise InvalidInput(
                    f"The {name} images have shape {tuple(images.shape)} for {len(labels)} labels; "
                    f"`{clip.name}` takes {size}.",
                    code="image_shape",
                )
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise InvalidInput(f"A {name} label lies outside the {classes} classes.", code="label_out_of_range")
        if len(self.captions) != n:
            raise InvalidInput(f"There are captions for {len(self.captions)} of {n} images.", code="caption_count")
        if method.needs_captions and not any(self.captions):
            raise InvalidInput(
                f"Method `{method.name}` trains on captions, and none of the {n} training images has one. "
                "Caption the data set first, or choose a method that needs none.",
                code="captions_missing",
                param="caption_job_id",
            )
        if method.hyperparameters.wise_ft == "val" and not len(self.val_labels):
            raise InvalidInput(
                "`wise_ft` 'val' chooses on validation images, and the run has none. Give a number, or train with "
                "validation.",
                code="no_validation",
                param="method.hyperparameters.wise_ft",
            )


class RunTexts:
    """The texts of a run: what each image may be paired with, what stands for each class in a step, and what each
    class's prototype is made of, as rows of one table tokenised once."""

    def __init__(self, clip: LoadedClip, method: FineTune, data: TrainData) -> None:
        by_class: list[list[str]] = [[] for _ in data.class_names]
        for label, captions in zip(data.labels.tolist(), data.captions, strict=True):
            by_class[label].extend(captions)
        of_class = [method.prototype_texts(name, own) for name, own in zip(data.class_names, by_class, strict=True)]
        of_image: list[list[str]] = []
        if method.step_texts == "image":
            of_image = [
                method.image_texts(data.class_names[label], captions)
                for label, captions in zip(data.labels.tolist(), data.captions, strict=True)
            ]
        in_step = [method.class_text(name) for name in data.class_names] if method.step_texts == "class" else []
        self.all = [text for texts in of_class + of_image for text in texts] + in_step
        self.table = TextTable(clip, self.all)
        self.prototype_rows = [self.table.rows(texts) for texts in of_class]
        self.class_rows = self.table.rows(in_step)
        self.counts = torch.tensor([len(texts) for texts in of_image])
        self._rows = torch.zeros(len(of_image), max(map(len, of_image), default=0), dtype=torch.int64)
        for i, texts in enumerate(of_image):
            self._rows[i, : len(texts)] = self.table.rows(texts)

    def draw(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """One text per image, evenly among its own: image indices (B,) -> rows of the table (B,)."""
        pick = (torch.rand(len(images), generator=rng) * self.counts[images]).long()
        return self._rows[images, pick]
