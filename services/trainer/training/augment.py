"""Light augmentation of a batch, as open_clip trains: a random resized crop of 90-100% of the area, bicubic with
antialiasing, and an optional mirror. Pixels stay uint8: on the CPU the resampling is PIL's, in integers; on a GPU it is
the same filter as two matrix products per image, which differs by rounding."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = (0.9, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10  # draws before the whole image is taken
_AT_ONCE = 128  # images resampled at a time on a GPU: their filters are (S, S) each


@dataclass(frozen=True)
class Crops:
    """boxes (B, 4) int64: top, left, height, width; mirrored (B,) bool."""

    boxes: Tensor
    mirrored: Tensor

    def part(self, start: int, stop: int) -> "Crops":
        return Crops(self.boxes[start:stop], self.mirrored[start:stop])


def draw_crops(n: int, size: int, rng: torch.Generator, *, flip: bool) -> Crops:
    boxes = crop_boxes(n, size, rng)
    return Crops(boxes, torch.rand(n, generator=rng) < 0.5 if flip else torch.zeros(n, dtype=torch.bool))


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


def crop(images: Tensor, crops: Crops) -> Tensor:
    """Crop, resize back and mirror: (B, 3, S, S) uint8 -> the same."""
    if images.device.type != "cpu":
        parts = range(0, len(images), _AT_ONCE)
        return torch.cat([resample(images[i : i + _AT_ONCE], crops.part(i, i + _AT_ONCE)) for i in parts])
    size = images.shape[-1]
    out = torch.empty_like(images)
    mirrored = crops.mirrored.tolist()
    for i, (top, left, h, w) in enumerate(crops.boxes.tolist()):
        box = images[i : i + 1, :, top : top + h, left : left + w]
        box = F.interpolate(box, (size, size), mode="bicubic", antialias=True)
        out[i] = (box.flip(-1) if mirrored[i] else box)[0]
    return out


def resample(images: Tensor, crops: Crops) -> Tensor:
    """What `crop` does, as matrix products: output = rows' filter @ image @ columns' filter, without a loop over the
    images nor a wait for the device."""
    size = images.shape[-1]
    boxes = crops.boxes.pin_memory() if images.device.type == "cuda" else crops.boxes
    top, left, h, w = boxes.to(images.device, torch.float32, non_blocking=True).T
    mirrored = crops.mirrored.to(images.device, non_blocking=True)
    columns = _filter(left, w, size)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    wide = images.float() @ columns.transpose(1, 2)[:, None]
    tall = _filter(top, h, size)[:, None] @ wide.round().clamp(0, 255)  # PIL keeps bytes between its passes too
    return tall.round().clamp(0, 255).to(torch.uint8)


def _filter(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Weights (B, size, size) by which each of `size` outputs sums the inputs of [start, start + length), (B,) both.
    Keys's cubic at a = -0.5, as PIL's bicubic; lengths are at most `size`, so nothing has to be widened."""
    place = torch.arange(size, device=start.device) + 0.5
    centre = start[:, None] + place * (length / size)[:, None]
    distance = (place - centre[..., None]).abs()
    weight = torch.where(
        distance < 1,
        (1.5 * distance - 2.5) * distance**2 + 1,
        ((-0.5 * distance + 2.5) * distance - 4) * distance + 2,
    ).masked_fill(distance >= 2, 0)
    inside = (place > start[:, None]) & (place < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)
