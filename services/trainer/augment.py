"""Light augmentation of a batch, as open_clip trains: a random resized crop of 90-100% of the area, bicubic with
antialiasing, and an optional mirror. Pixels stay uint8, so on the CPU the resampling is PIL's, in integers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = (0.9, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10  # draws before the whole image is taken


def crop_boxes(n: int, size: int, rng: torch.Generator) -> Tensor:
    """Boxes of a random resized crop on square images: (n, 4) int64 as top, left, height, width.

    Area uniform in SCALE, aspect ratio log-uniform in RATIO, drawn anew until the box fits; position uniform.
    """
    area = size * size * torch.empty(n, ATTEMPTS).uniform_(*SCALE, generator=rng)
    ratio = torch.empty(n, ATTEMPTS).uniform_(math.log(RATIO[0]), math.log(RATIO[1]), generator=rng).exp()
    position = torch.rand(n, 2, generator=rng)
    width = (area * ratio).sqrt().round().long()
    height = (area / ratio).sqrt().round().long()
    fits = (width <= size) & (height <= size)
    first = fits.int().argmax(1)  # 0 where none fits
    whole = ~fits.any(1)
    rows = torch.arange(n)
    h = torch.where(whole, size, height[rows, first])
    w = torch.where(whole, size, width[rows, first])
    top = (position[:, 0] * (size - h + 1)).long()
    left = (position[:, 1] * (size - w + 1)).long()
    return torch.stack([top, left, h, w], 1)


def augment(images: Tensor, rng: torch.Generator, *, flip: bool) -> Tensor:
    """images (B, 3, S, S) uint8 -> the same shape and type, each image cropped and perhaps mirrored on its own."""
    n, size = len(images), images.shape[-1]
    boxes = crop_boxes(n, size, rng).tolist()
    mirrored = (torch.rand(n, generator=rng) < 0.5).tolist() if flip else [False] * n
    out = torch.empty_like(images)
    for i, (top, left, h, w) in enumerate(boxes):
        crop = images[i : i + 1, :, top : top + h, left : left + w]
        if images.device.type != "cpu":
            crop = crop.float()  # uint8 resampling exists on the CPU only
        crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)
        if crop.is_floating_point():
            crop = crop.round().clamp(0, 255)
        out[i] = (crop.flip(-1) if mirrored[i] else crop)[0]
    return out
