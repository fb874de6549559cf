"""Common corruptions: deterministic, stronger with severity, and what their descriptions say."""

import numpy as np
import pytest
from PIL import Image

from services.evaluator.passes.corrupt import CORRUPTIONS, FOG, SEVERITIES, _convolve, _plasma

SIZE = 64


def photo(size: int = SIZE) -> np.ndarray:
    """Shapes, colours, smooth and fine structure; neither black nor white."""
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.stack([0.3 + 0.4 * x, 0.3 + 0.4 * y, 0.4 + 0.2 * np.sin(40 * x * y)], -1)
    image[size // 4 : size // 2, size // 4 : size // 2] = (0.7, 0.25, 0.2)
    return np.rint(255 * image).astype(np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_deterministic_keeps_the_shape_and_grows_with_severity(name):
    # Blocks that happen to lie on the pixel grid spare large shapes, so pixelate is judged on texture.
    image = rng(3).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) if name == "pixelate" else photo()
    before = image.copy()
    distances = []
    for severity in SEVERITIES:
        found = CORRUPTIONS[name](image, severity, rng())
        assert found.dtype == np.uint8
        assert found.shape == image.shape
        np.testing.assert_array_equal(found, CORRUPTIONS[name](image, severity, rng()))
        distances.append(np.square(found.astype(float) - image).mean())
    np.testing.assert_array_equal(image, before)  # the original is left as it was
    assert distances[0] > 0
    if name != "fog":  # which shifts the levels too: below
        assert distances == sorted(distances)
        assert len(set(distances)) == len(distances)


def test_fog_leaves_less_of_the_image_or_is_rougher_with_severity():
    image, other = photo(), photo()[::-1].copy()
    assert image.max() == other.max()
    shares, roughness = [], []
    for severity, (thickness, _) in zip(SEVERITIES, FOG, strict=True):
        a, b = (CORRUPTIONS["fog"](each, severity, rng()).astype(float) for each in (image, other))
        shares.append(np.abs(a - b).mean() / np.abs(image.astype(float) - other).mean())
        assert shares[-1] == pytest.approx(image.max() / 255 / (image.max() / 255 + thickness), rel=0.02)
        roughness.append(
            np.abs(np.diff(CORRUPTIONS["fog"](np.full_like(image, 128), severity, rng()).astype(int), axis=0)).mean()
        )
    assert shares[0] > shares[1] > shares[2] > shares[4]
    assert roughness[3] > roughness[2]  # equally thick


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "motion_blur", "fog"])
def test_random_ones_differ_by_seed(name):
    assert (CORRUPTIONS[name](photo(), 3, rng(0)) != CORRUPTIONS[name](photo(), 3, rng(1))).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8), photo(7)])
def test_flat_and_tiny_images_are_no_trouble(name, image):
    for severity in (1, 5):
        assert CORRUPTIONS[name](image, severity, rng()).shape == image.shape


def test_noise_has_the_stated_strength():
    grey = np.full((128, 128, 3), 128, np.uint8)
    assert CORRUPTIONS["gaussian_noise"](grey, 1, rng()).std() / 255 == pytest.approx(0.08, rel=0.03)
    expected = np.sqrt(128 / 255 * 60) / 60  # Poisson: the variance is the mean
    assert CORRUPTIONS["shot_noise"](grey, 1, rng()).std() / 255 == pytest.approx(expected, rel=0.05)


def test_blurs_keep_the_mean_and_flat_areas():
    for name in ("defocus_blur", "motion_blur"):
        blurred = CORRUPTIONS[name](photo(224), 3, rng())
        assert blurred.mean() == pytest.approx(photo(224).mean(), abs=1)
        grey = np.full((64, 64, 3), 90, np.uint8)
        np.testing.assert_array_equal(CORRUPTIONS[name](grey, 5, rng()), grey)


def test_the_convolution_is_the_plain_one():
    x, kernel = rng().uniform(size=(9, 9, 2)), rng(1).uniform(size=(3, 3))
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="symmetric")
    flipped = kernel[::-1, ::-1, None] / kernel.sum()
    naive = np.array([[(padded[i : i + 3, j : j + 3] * flipped).sum((0, 1)) for j in range(9)] for i in range(9)])
    np.testing.assert_allclose(_convolve(x, kernel), naive, atol=1e-12)


def test_brightness_raises_the_value_and_keeps_hue_and_saturation():
    colour = np.full((4, 4, 3), (100, 50, 25), np.uint8)
    found = CORRUPTIONS["brightness"](colour, 2, rng())[0, 0]
    before, after = (
        np.asarray(Image.fromarray(each[None, None]).convert("HSV"))[0, 0].astype(int) for each in (colour[0, 0], found)
    )
    assert after[2] - before[2] == pytest.approx(0.2 * 255, abs=1)
    assert abs(after[:2] - before[:2]).max() <= 2


def test_contrast_draws_towards_the_mean():
    found = CORRUPTIONS["contrast"](photo(), 3, rng()).astype(float)
    assert found.std((0, 1)) == pytest.approx(0.2 * photo().std((0, 1)), rel=0.05)
    assert found.mean((0, 1)) == pytest.approx(photo().mean((0, 1)), abs=0.5)


def test_pixelate_leaves_blocks():
    found = CORRUPTIONS["pixelate"](photo(), 5, rng())
    blocks = found.reshape(16, 4, 16, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_plasma_is_smooth_and_fills_the_range():
    noise = _plasma(128, 2.0, rng())
    assert (noise.min(), noise.max()) == (0.0, 1.0)
    assert np.abs(np.diff(noise, axis=0)).mean() < 0.25 * noise.std()
