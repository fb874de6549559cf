"""What turns an image embedding into class scores. Shapes: N images, C classes, D embedding."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """logits = image_emb @ weight.T + bias over L2-normalised image embeddings. weight (C, D), bias (C,), float32, on
    the CPU. For class prototypes the weight is exp(logit_scale) * prototypes and the bias 0."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of_prototypes(cls, prototypes: Tensor, logit_scale: float) -> Self:
        """prototypes (C, D), L2-normalised; logit_scale exponentiated."""
        return cls(logit_scale * prototypes, torch.zeros(len(prototypes)))

    @property
    def prototypes(self) -> Tensor:
        """(C, D) L2-normalised directions of the classes."""
        return F.normalize(self.weight, dim=-1)

    def logits(self, image_emb: Tensor) -> Tensor:
        """(N, D) L2-normalised -> (N, C)."""
        return image_emb @ self.weight.T + self.bias

    def top1(self, image_emb: Tensor, labels: Tensor) -> float:
        """Share of the images whose highest score is that of their label (N,)."""
        return float((self.logits(image_emb).argmax(1) == labels).double().mean())
