"""Retrieval between images and their captions: recall at 1, 5 and 10 both ways, as CLIP (Radford et al. 2021, arXiv
2103.00020, sec. 3.1.2 and table 13) reports it on Flickr30k. An image counts where any of its captions is among its
first K, a caption where its image is among its first K. Captions stand without the class's prefix, which would carry
most of the similarity. Ties count against.

At most 5,000 images (COCO's test is as large), drawn evenly by a fixed seed: recall falls with the size of the gallery,
so `detail` states it. Chance is about K / images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from services.evaluator.passes.base import OnStep

LIMIT = 5000  # images
KS = (1, 5, 10)
_BLOCK = 1024  # rows of similarities at a time
_EQUAL = 1e-6  # cosines closer than this are a tie


class Retrieval:
    """image_emb (N, D), text_emb (T, D), rows of length 1; own (T,): the image of each text. Every image has one."""

    def __init__(self, image_emb: Tensor, text_emb: Tensor, own: Tensor) -> None:
        self._images, self._texts, self._own = image_emb, text_emb, own
        self.detail: dict[str, Any] = {"images": len(image_emb), "captions": len(text_emb)}

    def run(self, on_step: OnStep) -> Iterator[tuple[str, float]]:
        on_step(0, 2)
        to_text = self._ranks_of_captions()
        on_step(1, 2)
        to_image = self._ranks_of_images()
        on_step(2, 2)
        for k in KS:
            yield f"image_to_text_r{k}", float((to_text <= k).double().mean())
        for k in KS:
            yield f"text_to_image_r{k}", float((to_image <= k).double().mean())

    def _ranks_of_captions(self) -> Tensor:
        """(N,) for each image, the place of its best caption among all captions: 1 + the others' captions that are as
        similar or more."""
        ranks = []
        for start in range(0, len(self._images), _BLOCK):
            similar = self._images[start : start + _BLOCK] @ self._texts.T
            mine = self._own[None] == torch.arange(start, start + len(similar))[:, None]
            best = similar.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
            ranks.append(1 + ((similar >= best - _EQUAL) & ~mine).sum(1))
        return torch.cat(ranks)

    def _ranks_of_images(self) -> Tensor:
        """(T,) for each caption, the place of its image among all images."""
        ranks = []
        for start in range(0, len(self._texts), _BLOCK):
            similar = self._texts[start : start + _BLOCK] @ self._images.T
            own = similar.gather(1, self._own[start : start + _BLOCK, None])
            ranks.append((similar >= own - _EQUAL).sum(1))  # its own image is one of them
        return torch.cat(ranks)
