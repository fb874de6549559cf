"""The classifier that a run's parameters make, and its accuracy on the validation images. Shapes: V images, C classes,
D embedding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from services.trainer.training.data import TrainData
from services.trainer.training.feeding import Feed
from services.trainer.training.gradients import Autocast
from services.trainer.training.parameters import Trained, state_on_cpu
from services.trainer.training.prototypes import class_prototypes
from shared.classifier.head import Head
from shared.clip.loading import LoadedClip, encode_tokens, normalise

_BATCH = {"cpu": 64, "cuda": 256}


class Scorer:
    """Encodes with `Trained.using`, each process its share. What fixed towers give is computed once."""

    def __init__(
        self, clip: LoadedClip, data: TrainData, trained: Trained, feed: Feed, autocast: Autocast, width: int
    ) -> None:
        self.clip, self.data, self.trained, self.feed, self.autocast = clip, data, trained, feed, autocast
        self.peers, self.width = feed.peers, width  # D
        self._val: Tensor | None = None
        self._prototypes: Tensor | None = None

    def accuracy(self, values: Mapping[str, Tensor], share: float = 1.0) -> float | None:
        """Top-1 on the validation images with these parameters, None without any images. In the run's precision."""
        if not len(self.data.val_labels):
            return None
        with self.trained.using(values, share) as model:
            head = self._head(model, precise=False)
            return head.top1(self._val_embeddings(model), self.data.val_labels)

    def classifier(
        self, values: Mapping[str, Tensor] | None = None, share: float = 1.0
    ) -> tuple[dict[str, Tensor], Head]:
        """(the whole state_dict, the head), in float32, whatever the run computes in."""
        with self.trained.using(values, share) as model:
            return state_on_cpu(model), self._head(model, precise=True)

    def _val_embeddings(self, model: Any) -> Tensor:
        """(V, D) float32 on the CPU."""
        if self._val is not None:
            return self._val
        start, stop = self.peers.share(len(self.data.val_labels))
        size = _BATCH.get(self.feed.device.type, 64)
        parts = [torch.zeros(0, self.width, device=self.feed.device)]
        for i in range(start, stop, size):
            images = self.data.val_images[torch.arange(i, min(i + size, stop))]
            with self.autocast("visual"):
                parts.append(model.encode_image(normalise(self.feed.move(images), self.clip), normalize=True).float())
        embeddings = self.peers.gathered(torch.cat(parts).cpu(), len(self.data.val_labels))
        if "visual" not in self.trained.towers:
            self._val = embeddings
        return embeddings

    def _head(self, model: Any, *, precise: bool) -> Head:
        head = self.trained.head
        if head is not None:
            bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach().float().cpu().clone()
            return Head(head.weight.detach().float().cpu().clone(), bias)
        return Head.of_prototypes(self._class_prototypes(model, precise=precise), float(model.logit_scale.exp()))

    def _class_prototypes(self, model: Any, *, precise: bool) -> Tensor:
        """(C, D) float32 on the CPU."""
        if self._prototypes is not None:
            return self._prototypes
        fixed = "text" not in self.trained.towers

        def encode(tokens: Tensor) -> Tensor:
            start, stop = self.peers.share(len(tokens))
            part = encode_tokens(model, tokens[start:stop]) if stop > start else torch.zeros(0, self.width)
            return self.peers.gathered(part, len(tokens))

        with self.autocast("text", enabled=not (precise or fixed)):
            prototypes = class_prototypes(self.feed.texts.table, self.feed.texts.prototype_rows, encode)
        if fixed:
            self._prototypes = prototypes
        return prototypes
