"""One picture in, all numbers out: about 3 ms."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from services.captioner.attributes import colours, regions, texture

TEXTURE_GRID = 80


@dataclass(frozen=True)
class Measurement:
    region: str  # "plain", "separated" or "whole" (regions.Region.kind)
    shape: regions.Silhouette
    surface: texture.Texture
    subject: list[tuple[str, float]]  # colour names with shares, largest first
    background: list[tuple[str, float]]
    background_edges: float  # share of strong gradients behind the subject: 0 = empty
    lightness: float  # mean L* of the region, 0..100
    backdrop: float  # mean L* of the background
    chroma: float  # mean chroma of the region: below 8 nearly colourless, above 45 vivid
    chroma_high: float  # its 95th percentile: small coloured parts of a gray subject
    frame: float  # width / height of the picture


def measure(image: Image.Image) -> Measurement:
    """An RGB picture of any size -> Measurement."""
    small = _grid(image, regions.GRID)
    lab = colours.to_lab(np.asarray(small))
    region = regions.find(lab)
    large = _grid(image, TEXTURE_GRID)
    lightness = colours.to_lab(np.asarray(large))[..., 0]
    mask = np.asarray(Image.fromarray(region.mask).resize(large.size, Image.Resampling.NEAREST))
    # Colours are sampled, not averaged: averaging turns a drawing's black lines on white into gray.
    sampled = colours.to_lab(np.asarray(image.convert("RGB").resize(small.size, Image.Resampling.NEAREST)))
    pixels, behind = sampled[region.mask], sampled[region.background]
    gy, gx = np.gradient(lab[..., 0])
    chroma = np.hypot(pixels[:, 1], pixels[:, 2])
    return Measurement(
        region=region.kind,
        shape=regions.silhouette(region.mask),
        surface=texture.measure(lightness, mask),
        subject=colours.palette(pixels),
        background=colours.palette(behind, least=0.15),
        background_edges=float((np.hypot(gx, gy)[region.background] > 6).mean()),
        lightness=float(pixels[:, 0].mean()),
        backdrop=float(behind[:, 0].mean()),
        chroma=float(chroma.mean()),
        chroma_high=float(np.percentile(chroma, 95)),
        frame=image.width / image.height,
    )


def _grid(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.BOX)
