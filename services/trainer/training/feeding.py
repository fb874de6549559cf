"""The batches of a run, ready on the device. A step's batch is a function of the seed and the step alone."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from services.trainer.methods.base import FineTune
from services.trainer.processes.peers import Alone
from services.trainer.training.augment import Crops, crop, draw_crops
from services.trainer.training.data import RunTexts, TrainData
from services.trainer.training.randomness import generator

_RESIDENT = 0.25  # the images stay on a GPU if they take at most this share of its free memory


@dataclass(frozen=True)
class Draw:
    """One step's batch. labels (B,) on the device; images (b, 3, S, S) uint8 on the device, augmented: this process's
    share of the batch, from row `start`; texts: rows of the text table, (B,) or (C,), on the CPU, or None."""

    labels: Tensor
    images: Tensor
    start: int
    texts: Tensor | None


class Feed:
    """Draws batches; while one is trained on, a thread reads the pixels of the next, where that takes time."""

    def __init__(
        self, data: TrainData, texts: RunTexts, method: FineTune, seed: int, device: torch.device, peers: Alone
    ) -> None:
        self.data, self.texts, self.method, self.seed, self.device, self.peers = (
            data,
            texts,
            method,
            seed,
            device,
            peers,
        )
        hp = method.hyperparameters
        self.steps_per_epoch = -(-len(data.labels) // hp.batch_size)
        self.total_steps = self.steps_per_epoch * hp.epochs
        self._images = data.images
        self._resident = device.type == "cpu" and isinstance(data.images, Tensor)
        if device.type == "cuda" and isinstance(data.images, Tensor):
            free, _ = torch.cuda.mem_get_info(device)
            self._resident = data.images.nbytes <= _RESIDENT * free
            if self._resident:
                self._images = data.images.to(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._next: tuple[int, Future[Tensor]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def draw(self, step: int) -> Draw:
        rows = self.rows(step)
        rng = generator(self.seed, "step", step)
        crops = draw_crops(len(rows), self.data.images.shape[-1], rng, flip=self.method.hyperparameters.horizontal_flip)
        texts = None
        if self.method.step_texts == "image":
            texts = self.texts.draw(rows, rng)
        elif self.method.step_texts == "class":
            texts = self.texts.class_rows
        start, stop = self.peers.share(len(rows))
        return Draw(
            labels=self.move(self.data.labels[rows]),
            images=self._augmented(step, crops.part(start, stop)),
            start=start,
            texts=texts,
        )

    def rows(self, step: int) -> Tensor:
        """Indices (B,) of a step's images: the epoch's permutation in parts that differ by at most one, since a
        remainder of one or two images would make a contrastive step of no meaning."""
        epoch, part = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.data.labels), generator=generator(self.seed, "order", epoch))
        return order.tensor_split(self.steps_per_epoch)[part]

    def _augmented(self, step: int, crops: Crops) -> Tensor:
        if self._resident:
            return crop(self._pixels(step), crops)
        if self._next is None or self._next[0] != step:
            self._next = step, self._reader.submit(self._pixels, step)
        pixels = self._next[1].result()
        if step + 1 < self.total_steps:
            self._next = step + 1, self._reader.submit(self._pixels, step + 1)
        return crop(self.move(pixels), crops)

    def _pixels(self, step: int) -> Tensor:
        rows = self.rows(step)
        start, stop = self.peers.share(len(rows))
        rows = rows[start:stop]
        if isinstance(self._images, Tensor) and self._images.device.type != "cpu":
            rows = self.move(rows)
        pixels = self._images[rows]
        return pixels.pin_memory() if self.device.type == "cuda" and pixels.device.type == "cpu" else pixels

    def move(self, tensor: Tensor) -> Tensor:
        """To the device without waiting for it."""
        if self.device.type != "cuda":
            return tensor
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self.device, non_blocking=True)
