"""Surface: how much changes from point to point, at what scale, in which direction, and whether it repeats."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.captioner.attributes.colours import Floats, Mask


@dataclass(frozen=True)
class Texture:
    contrast: float  # 95th minus 5th percentile of L*, 0..100
    flat: float  # share of cells with hardly any gradient
    edges: float  # share of cells with a strong gradient
    sharpness: float  # strongest gradients over contrast: 1 = steps from one cell to the next
    fineness: float  # energy of changes within 2 cells over those within 8: high = fine grain, low = broad patches
    coherence: float  # 0 = edges in all directions, 1 = all parallel
    angle: float  # direction of the edges' lines, degrees from horizontal, -90..90
    period: float  # distance of a repeating pattern as a share of the longer side; 0 = none found
    dark: float  # share of distinctly dark spots on lighter surroundings
    light: float  # the reverse


def measure(lightness: Floats, mask: Mask) -> Texture:
    """(H, W) L* and the cells to look at -> Texture. A mask of fewer than 30 inner cells is used whole."""
    inner = _eroded(mask)
    inside = inner if inner.sum() >= 30 else mask
    gy, gx = (np.asarray(part) for part in np.gradient(lightness))
    size: NDArray[Any] = np.hypot(gx, gy)
    values, slopes = lightness[inside], size[inside]
    contrast = float(np.percentile(values, 95) - np.percentile(values, 5))
    xx, yy, xy = (gx * gx)[inside].sum(), (gy * gy)[inside].sum(), (gx * gy)[inside].sum()
    coherence = float(np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-6))
    across = 0.5 * np.degrees(np.arctan2(2 * xy, xx - yy))  # direction of change, image coordinates (y down)
    near, far = _blur(lightness, 2), _blur(lightness, 8)
    fine = float(((lightness - near)[inside] ** 2).mean())
    broad = float(((near - far)[inside] ** 2).mean())
    local = (near - far)[inside]
    return Texture(
        contrast=contrast,
        flat=float((slopes < 1.5).mean()),
        edges=float((slopes > 8).mean()),
        sharpness=float(np.percentile(slopes, 98) / max(contrast, 5)),
        fineness=fine / max(fine + broad, 1e-6),
        coherence=coherence,
        angle=float((-(across + 90) + 90) % 180 - 90),
        period=_period(lightness, inside),
        dark=float((local < -7).mean()),
        light=float((local > 7).mean()),
    )


def _period(lightness: Floats, inside: Mask) -> float:
    """Autocorrelation (Wiener-Khinchin) of the part: the nearest second peak counts if it is high and the trough before
    it is deep, so that smooth shading does not pass for a pattern."""
    ys, xs = np.nonzero(inside)
    part = lightness[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    if min(part.shape) < 16:
        return 0.0
    window = np.hanning(part.shape[0])[:, None] * np.hanning(part.shape[1])[None]
    waves = (part - _blur(part, max(4, min(part.shape) // 4))) * window
    power = np.abs(np.fft.rfft2(waves, s=(2 * part.shape[0], 2 * part.shape[1]))) ** 2
    correlation = np.fft.irfft2(power)
    correlation /= max(float(correlation[0, 0]), 1e-6)
    best = 0.0
    for line in (correlation[0, : part.shape[1] // 2], correlation[: part.shape[0] // 2, 0]):
        low = int(line[: len(line) // 2 + 1].argmin())
        if low < 2 or line[low] > -0.12:
            continue
        peak = low + int(line[low:].argmax())
        if line[peak] > 0.35 and peak >= 4:
            best = max(best, peak / max(lightness.shape))
    return best


def _blur(values: Floats, radius: int) -> NDArray[np.float32]:
    """Mean over a (2 radius + 1) square, edges repeated, through cumulative sums."""
    span = 2 * radius + 1
    for axis in (0, 1):
        widths = [(0, 0), (0, 0)]
        widths[axis] = (radius + 1, radius)
        total = np.cumsum(np.pad(values, widths, mode="edge"), axis=axis, dtype=np.float64)
        upper = total[span:] if axis == 0 else total[:, span:]
        lower = total[:-span] if axis == 0 else total[:, :-span]
        values = ((upper - lower) / span).astype(np.float32)
    return values


def _eroded(mask: Mask) -> Mask:
    """Without the two outermost cells: the outline against the background is no texture."""
    padded = np.pad(mask, 2)
    result = mask.copy()
    for step in (1, 2):
        result &= padded[2 - step : -2 - step or None, 2:-2] & padded[2 + step : len(padded) - 2 + step, 2:-2]
        result &= padded[2:-2, 2 - step : -2 - step or None] & padded[2:-2, 2 + step : padded.shape[1] - 2 + step]
    return result
