"""Colours: sRGB to CIELAB, clustering, and names that people use."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

# name -> sRGB anchors; a colour takes the name of the nearest anchor in CIELAB
ANCHORS: dict[str, tuple[int, ...]] = {
    "black": (0x000000, 0x141414, 0x1B1714),
    "dark gray": (0x3A3A3A, 0x4D4D4D, 0x444A50),
    "gray": (0x808080, 0x6C6C6C, 0x7A828A),
    "light gray": (0xB0B0B0, 0xC8C8C8, 0xB6BCC2),
    "white": (0xFFFFFF, 0xEFEFEF, 0xF7F5F0),
    "cream": (0xF5ECD0, 0xF3E3C2),
    "beige": (0xDCCBB0, 0xCBB89A),
    "tan": (0xC19A6B, 0xB08D62),
    "taupe": (0x8B7D6B, 0x9A8C7C),
    "brown": (0x7B4A1E, 0x855B35, 0x6B4A32),
    "reddish brown": (0x8A3B1E, 0xA0522D, 0x9C5A3C),
    "dark brown": (0x3B2415, 0x4A3222, 0x2E2118),
    "maroon": (0x6E0F1A, 0x800000, 0x5A1420),
    "red": (0xD81E1E, 0xFF0000, 0xB81414),
    "coral": (0xF0796A, 0xE98074),
    "orange": (0xF58216, 0xFF9500, 0xE06A10),
    "peach": (0xF7C9A3, 0xF2B58C),
    "gold": (0xD4A017, 0xC9971F, 0xB8860B),
    "yellow": (0xF7E018, 0xFFFF00, 0xF2D23A),
    "pale yellow": (0xF9F3A8, 0xF4E98E),
    "olive": (0x7A7A22, 0x6B6B2E, 0x595A2A),
    "lime green": (0x9ADB2A, 0x7FE000, 0xB5E04A),
    "green": (0x2E9E3A, 0x00B000, 0x3C8A3C, 0x00FF00),
    "dark green": (0x14401E, 0x0B5A1E, 0x2A4A2A),
    "pale green": (0xB4DDB0, 0x9CCB98),
    "sage green": (0x8A9A78, 0x76886A),
    "teal": (0x107878, 0x1A8C84, 0x2A6464),
    "turquoise": (0x30C8C0, 0x40E0D0),
    "cyan": (0x00E5FF, 0x4FD3F0),
    "pale blue": (0xBBD8EE, 0xA8C6E4),
    "sky blue": (0x6FB4E8, 0x87BCEB),
    "blue": (0x1E5AD8, 0x0000FF, 0x2A66B8),
    "slate blue": (0x5A7090, 0x6C84A0),
    "navy blue": (0x101C50, 0x000080, 0x1C2E4E),
    "lavender": (0xC8BCE8, 0xB4A6D8),
    "purple": (0x7A2AA8, 0x800080, 0x5A3A8C),
    "magenta": (0xE010B0, 0xC8188C),
    "pink": (0xF59AB8, 0xF7B8CC, 0xE884A4),
    "dusty pink": (0xC89898, 0xB88A8C),
}


def to_lab(rgb: NDArray[np.uint8]) -> Floats:
    """(..., 3) uint8 sRGB -> (..., 3) float32 CIELAB, D65 white (IEC 61966-2-1, CIE 15)."""
    linear = _LINEAR[rgb]
    xyz = linear @ _TO_XYZ
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lightness = 116 * f[..., 1] - 16
    return np.stack([lightness, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1).astype(np.float32)


def name_of(lab: Any) -> str:
    distance = ((_ANCHOR_LAB - np.asarray(lab, dtype=np.float32)) ** 2 @ _HUE_FIRST).argmin()
    return _ANCHOR_NAMES[int(distance)]


def cluster(lab: Floats, k: int = 6, steps: int = 6) -> list[tuple[Floats, float]]:
    """k-means in CIELAB: (N, 3) -> [(centre, share)], largest first. Starts are spread by lightness and hue, the same
    for the same pixels. Clusters whose centres carry one name are joined by `palette`, not here."""
    if len(lab) > 1500:
        lab = lab[:: len(lab) // 1500 + 1]
    centres = [lab.mean(0)]
    nearest = ((lab - centres[0]) ** 2).sum(1)
    for _ in range(k - 1):  # farthest point first: small but different areas get a centre too
        centres.append(lab[int(nearest.argmax())])
        nearest = np.minimum(nearest, ((lab - centres[-1]) ** 2).sum(1))
    points = np.stack(centres)
    owner = np.zeros(len(lab), dtype=np.intp)
    for _ in range(steps):
        owner = ((points**2).sum(1) - 2 * lab @ points.T).argmin(1)
        counts = np.bincount(owner, minlength=k)
        sums = np.stack([np.bincount(owner, weights=lab[:, c], minlength=k) for c in range(3)], 1)
        points = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], points).astype(np.float32)
    counts = np.bincount(owner, minlength=k)
    order = np.argsort(-counts, kind="stable")
    return [(cast(Floats, points[i]), float(counts[i] / len(lab))) for i in order if counts[i]]


def palette(lab: Floats, least: float = 0.06) -> list[tuple[str, float]]:
    """(N, 3) -> [(colour name, share)], largest first, names once each, shares below `least` left out."""
    shares: dict[str, float] = {}
    for centre, share in cluster(lab):
        name = name_of(centre)
        shares[name] = shares.get(name, 0.0) + share
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return [item for item in ordered if item[1] >= least] or ordered[:1]


_LINEAR = np.where(
    np.arange(256) / 255 <= 0.04045, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
).astype(np.float32)
_TO_XYZ = (
    np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    / np.array([[0.95047], [1.0], [1.08883]])
).T.astype(np.float32)
_ANCHOR_NAMES = [name for name, values in ANCHORS.items() for _ in values]
_ANCHOR_LAB = to_lab(
    np.array([[v >> 16, v >> 8 & 255, v & 255] for values in ANCHORS.values() for v in values], dtype=np.uint8)
)
_HUE_FIRST = np.array([0.7, 1.0, 1.0], dtype=np.float32)  # light and shade change a surface's L more than its name
