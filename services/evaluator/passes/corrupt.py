"""Common corruptions of an image: nine of those of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261), each at
five severities. Written anew from the paper's descriptions, so accuracies compare between classifiers scored here, not
with published ones. Images are (S, S, 3) uint8; lengths in pixels are for S = 224 and grow with S. numpy and PIL only.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (S, S, 3)
Floats = NDArray[np.float64]  # (S, S, 3) within 0..1, or (S, S)
Rng = np.random.Generator

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE = 224  # pixels

NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation
PHOTONS = (60, 25, 12, 5, 3)  # per pixel of full brightness
DEFOCUS = (3, 4, 6, 8, 10)  # radius of the disc, pixels
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # half length, standard deviation of the weights, pixels
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))  # thickness; an octave's amplitude over the next's
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor of the distance from the mean
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # of the side
JPEG = (25, 18, 15, 10, 7)  # quality


def gaussian_noise(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """Electronic noise: independent in every pixel and channel."""
    x = _floats(image)
    return _pixels(x + rng.normal(0, NOISE[severity - 1], x.shape))


def shot_noise(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """Poisson noise of few photons."""
    photons = PHOTONS[severity - 1]
    return _pixels(rng.poisson(_floats(image) * photons) / photons)


def defocus_blur(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """A disc-shaped kernel, with the fractions of the pixels at its edge."""
    radius = max(1.0, _scaled(image, DEFOCUS[severity - 1]))
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _pixels(_convolve(_floats(image), np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)))


def motion_blur(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """A line at a random angle within 45 degrees of the horizontal, Gaussian weights."""
    half, sigma = (_scaled(image, length) for length in MOTION[severity - 1])
    reach = max(1, int(np.ceil(half)))
    angle = rng.uniform(-np.pi / 4, np.pi / 4)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for t in np.linspace(-half, half, 8 * reach + 1):  # finer than the pixels, so that every angle is a line
        place = reach + round(t * np.sin(angle)), reach + round(t * np.cos(angle))
        kernel[place] += np.exp(-0.5 * (t / sigma) ** 2)
    return _pixels(_convolve(_floats(image), kernel))


def fog(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """White plasma noise over the image, scaled back so that the brightest stays as bright."""
    thickness, decay = FOG[severity - 1]
    x, brightest = _floats(image), image.max() / 255
    return _pixels((x + thickness * _plasma(len(image), decay, rng)[..., None]) * brightest / (brightest + thickness))


def brightness(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """HSV's value raised; hue and saturation stay."""
    x = _floats(image)
    value = x.max(2, keepdims=True)
    raised = np.clip(value + BRIGHTNESS[severity - 1], 0, 1)
    return _pixels(np.where(value > 0, x * raised / np.maximum(value, 1e-9), raised))


def contrast(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """Each channel drawn towards its mean."""
    x = _floats(image)
    mean = x.mean((0, 1), keepdims=True)
    return _pixels((x - mean) * CONTRAST[severity - 1] + mean)


def pixelate(image: Pixels, severity: int, rng: Rng) -> Pixels:
    """Scaled down by averaging and up again without smoothing."""
    side = max(1, int(len(image) * PIXELATE[severity - 1]))
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((len(image), len(image)), Image.Resampling.NEAREST))


def jpeg_compression(image: Pixels, severity: int, rng: Rng) -> Pixels:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=JPEG[severity - 1])
    return np.asarray(Image.open(out).convert("RGB"))


CORRUPTIONS: dict[str, Callable[[Pixels, int, Rng], Pixels]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "defocus_blur": defocus_blur,
    "motion_blur": motion_blur,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def _floats(image: Pixels) -> Floats:
    return image.astype(np.float64) / 255


def _pixels(x: Floats) -> Pixels:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _scaled(image: Pixels, length: float) -> float:
    return length * len(image) / REFERENCE


def _convolve(x: Floats, kernel: Floats) -> Floats:
    """With a kernel normalised to 1; the image goes on mirrored beyond its edges."""
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    side = len(padded)
    spectrum = np.fft.rfft2(kernel / kernel.sum(), (side, side))[..., None]
    blurred = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * spectrum, (side, side), axes=(0, 1))
    result: Floats = blurred[2 * reach :, 2 * reach :]
    return result


def _plasma(size: int, decay: float, rng: Rng) -> Floats:
    """Cloud-like noise (size, size) from 0 to 1: octaves of smooth random grids, the finer the weaker."""
    total = np.zeros((size, size))
    cells, amplitude = 2, 1.0
    while cells <= size:
        grid = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
        total += amplitude * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
        cells, amplitude = 2 * cells, amplitude / decay
    spread = total.max() - total.min()
    return (total - total.min()) / spread if spread > 0 else np.zeros_like(total)
