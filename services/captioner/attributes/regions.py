"""Where the subject is, and the proportions of its silhouette. Everything on a grid of at most 56 x 56 cells."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.captioner.attributes.colours import Floats, Mask, cluster

GRID = 56


@dataclass(frozen=True)
class Region:
    """`mask` (H, W): the subject's cells. kind: "plain" (cut out from a uniform background), "separated" (stands out
    from a busy one) or "whole" (nothing separable: the mask is the central ellipse, only the picture is described)."""

    kind: str
    mask: Mask
    background: Mask


@dataclass(frozen=True)
class Silhouette:
    area: float  # share of the picture, 0..1
    aspect: float  # width / height of the bounding box in pixels
    solidity: float  # share of the spans between outermost cells, by rows and by columns, that is filled: 1 = no gaps
    fill: float  # share of the bounding box: 1 = rectangle, 0.785 = ellipse, 0.5 = triangle
    elongation: float  # long over short axis of the ellipse with the same second moments
    angle: float  # of the long axis, degrees counter-clockwise from horizontal, -90..90
    symmetry: float  # overlap with its own mirror image, 0..1
    oval: float  # overlap of the outline with the ellipse in its bounding box, 0..1
    widest: float  # height of the widest row, 0 = top, 1 = bottom
    centre: tuple[float, float]  # of mass, x and y, 0..1
    holes: float  # enclosed background, share of the area
    parts: int  # pieces of at least 4% of the area
    cut: tuple[str, ...]  # picture edges it runs into


def find(lab: Floats) -> Region:
    """(H, W, 3) CIELAB -> the region to describe."""
    height, width, _ = lab.shape
    ring = np.zeros((height, width), dtype=bool)
    ring[:2], ring[-2:], ring[:, :2], ring[:, -2:] = True, True, True, True
    border = lab[ring]
    colour = np.median(border, axis=0)
    off = np.linalg.norm(border - colour, axis=1)
    if (off < 10).mean() > 0.75:
        # a drawn background is exact, so that even a pale glass on white is found; a photographed one has shades
        shades = float(np.median(off))
        like = np.linalg.norm(lab - colour, axis=2) < np.clip(3 + 3 * shades, 4, 11)
        background = _grow(ring & like, like)
        mask = _majority(~background)
        if shades > 1:  # a photograph; in a drawing thin lines are part of the subject
            mask = _without_threads(mask)
        if 0.003 < mask.mean() < 0.97:
            return Region("plain", mask, ~mask)
    return _separate(lab) or _whole(height, width)


def _separate(lab: Floats) -> Region | None:
    """A subject on a busy background: cells unlike every colour of the border, weighted towards the centre, cut by
    Otsu's threshold, the piece around the strongest cell. None where the two sides differ too little to be believed."""
    height, width, _ = lab.shape
    depth = max(2, min(height, width) // 10)
    frame = np.ones((height, width), dtype=bool)
    frame[depth:-depth, depth:-depth] = False
    palette = [centre for centre, share in cluster(lab[frame], k=5) if share > 0.05]
    distance = np.min([np.linalg.norm(lab - centre, axis=2) for centre in palette], axis=0)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    prior = np.exp(-(x**2 + y**2) * 0.9)
    score = _smooth(_smooth(distance)) * prior
    threshold, separability = _otsu(score)
    over = score > threshold
    seed = np.zeros_like(over)
    seed.flat[int(score.argmax())] = True
    mask = _fill(_majority(_grow(seed, over)))
    touching = mask[frame].mean()
    if not 0.1 < mask.mean() < 0.6 or touching > 0.25 or separability < 0.62:
        return None
    if distance[mask].mean() < 1.8 * distance[~mask].mean() or distance[mask].mean() < 14:
        return None
    return Region("separated", mask, ~mask)


def _whole(height: int, width: int) -> Region:
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    centre = (x**2 + y**2) < 0.55
    return Region("whole", centre, ~((x**2 + y**2) < 0.9))


def silhouette(mask: Mask) -> Silhouette:
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    top, bottom, left, right = ys.min(), ys.max(), xs.min(), xs.max()
    box = mask[top : bottom + 1, left : right + 1]
    rows, columns = box.sum(1), box.sum(0)
    spans = sum(_span(line) for line in box) + sum(_span(line) for line in box.T)
    cov = np.cov(np.stack([xs, ys])) if len(xs) > 2 else np.eye(2)
    values, vectors = np.linalg.eigh(cov)
    angle = float(np.degrees(np.arctan2(-vectors[1, 1], vectors[0, 1])))
    filled = _fill(mask)
    mirrored = box[:, ::-1]
    y, x = np.mgrid[-1 : 1 : box.shape[0] * 1j, -1 : 1 : box.shape[1] * 1j]
    ellipse, outline = x**2 + y**2 <= 1.05, filled[top : bottom + 1, left : right + 1]
    edges = {"top": mask[0], "bottom": mask[-1], "left": mask[:, 0], "right": mask[:, -1]}
    smooth_rows = np.convolve(rows, np.ones(3) / 3, mode="same")
    return Silhouette(
        area=float(mask.mean()),
        aspect=float(len(columns) / len(rows)),
        solidity=float(2 * box.sum() / max(spans, 1)),
        fill=float(box.mean()),
        elongation=float(np.sqrt(max(values[1], 0.1) / max(values[0], 0.1))),
        angle=(angle + 90) % 180 - 90,
        symmetry=float((box & mirrored).sum() / max((box | mirrored).sum(), 1)),
        oval=float((ellipse & outline).sum() / max((ellipse | outline).sum(), 1)),
        widest=float((smooth_rows.argmax() + 0.5) / len(rows)),
        centre=(float(xs.mean() + 0.5) / width, float(ys.mean() + 0.5) / height),
        holes=float((filled & ~mask).sum() / max(mask.sum(), 1)),
        parts=_parts(mask),
        cut=tuple(edge for edge, line in edges.items() if line.mean() > 0.12),
    )


def _span(line: Mask) -> int:
    cells = np.flatnonzero(line)
    return int(cells[-1] - cells[0] + 1) if len(cells) else 0


def _parts(mask: Mask) -> int:
    rest, count = mask.copy(), 0
    while rest.sum() >= 0.04 * mask.sum() and count < 6:
        seed = np.zeros_like(rest)
        seed.flat[int(rest.argmax())] = True
        piece = _grow(seed, rest)
        count += int(piece.sum() >= 0.04 * mask.sum())
        rest &= ~piece
    return max(count, 1)


def _grow(seed: Mask, allowed: Mask) -> Mask:
    """The cells of `allowed` connected to `seed` by their sides; goes by whole runs, along rows and columns."""
    rows, columns = _runs(allowed), _runs(allowed.T)
    grown, size = seed & allowed, -1
    while (now := int(grown.sum())) != size:
        size = now
        grown = _spread(grown, rows) & allowed
        grown = _spread(grown.T, columns).T & allowed
    return grown


def _runs(allowed: Mask) -> NDArray[np.intp]:
    """Numbers the runs of allowed cells in each row (cells that are not allowed get some number too)."""
    return np.cumsum(np.diff(allowed, axis=1, prepend=False).ravel())


def _spread(reached: Mask, runs: NDArray[np.intp]) -> Mask:
    hit = np.zeros(int(runs[-1]) + 1, dtype=bool)
    hit[runs[reached.ravel()]] = True
    return hit[runs].reshape(reached.shape)


def _fill(mask: Mask) -> Mask:
    """The mask with its enclosed holes."""
    outside = np.pad(~mask, 1, constant_values=True)
    seed = np.zeros_like(outside)
    seed[0] = True
    return ~_grow(seed, outside)[1:-1, 1:-1]


def _box3(values: NDArray[Any]) -> NDArray[Any]:
    padded: NDArray[Any] = np.pad(values, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    total: NDArray[Any] = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return total / 9


def _smooth(values: NDArray[Any]) -> NDArray[Any]:
    return _box3(_box3(values))


def _majority(mask: Mask) -> Mask:
    smoothed: Mask = _box3(mask.astype(np.float32)) > 0.4
    return smoothed


def _without_threads(mask: Mask) -> Mask:
    """Opening with a 5 x 5 square: takes a shelf's edge or a caption away, unless a thin subject would go with it."""
    core = _square(mask, np.all)
    opened = _square(core, np.any)
    return opened if opened.sum() > 0.85 * mask.sum() else mask


def _square(mask: Mask, reduce: Any) -> Mask:
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 2), (5, 5))
    return np.asarray(reduce(windows, axis=(2, 3)), dtype=bool)


def _otsu(values: NDArray[Any]) -> tuple[float, float]:
    """-> (threshold, between-class share of the variance). N. Otsu, IEEE Trans. SMC 9 (1979)."""
    counts, edges = np.histogram(values, bins=64)
    middle = (edges[:-1] + edges[1:]) / 2
    weight = counts / counts.sum()
    below, mean = np.cumsum(weight), np.cumsum(weight * middle)
    spread = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-9)
    best = int(spread[:-1].argmax())
    variance = float((weight * (middle - mean[-1]) ** 2).sum())
    return float(edges[best + 1]), float(spread[best] / max(variance, 1e-9))
