"""The augmentation against torchvision's, which open_clip uses."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from services.trainer.augment import RATIO, SCALE, augment, crop_boxes
from services.trainer.randomness import generator


def test_pixels_are_those_of_pil():
    rng = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (1, 3, 48, 48), generator=rng, dtype=torch.uint8)
    out = augment(image, generator(5, "x"), flip=False)
    top, left, h, w = crop_boxes(1, 48, generator(5, "x"))[0].tolist()
    assert (h, w) != (48, 48)
    pil = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    expected = pil_to_tensor(resized_crop(pil, top, left, h, w, [48, 48], InterpolationMode.BICUBIC))
    assert (out[0].int() - expected.int()).abs().max() <= 1  # rounding
    assert out.dtype == torch.uint8


def test_boxes_are_distributed_as_torchvisions():
    n, size = 4000, 224
    ours = crop_boxes(n, size, generator(0, "boxes")).double()
    torch.manual_seed(0)
    blank = torch.empty(3, size, size)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(n)]).double()
    for name, a, b in (
        ("area", ours[:, 2] * ours[:, 3] / size**2, theirs[:, 2] * theirs[:, 3] / size**2),
        ("aspect", (ours[:, 3] / ours[:, 2]).log(), (theirs[:, 3] / theirs[:, 2]).log()),
        ("top", ours[:, 0] / size, theirs[:, 0] / size),
        ("left", ours[:, 1] / size, theirs[:, 1] / size),
    ):
        error = (a.var() / n + b.var() / n).sqrt()
        assert abs(a.mean() - b.mean()) < 4 * error, name
        assert a.std() == pytest.approx(float(b.std()), rel=0.06), name


def test_boxes_lie_within_the_image():
    boxes = crop_boxes(2000, 32, generator(3, "boxes"))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 32).all()


def test_half_are_mirrored_only_where_asked():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(200, 3, 32, 32).contiguous()
    rises = augment(ramp, generator(0, "a"), flip=True)
    mirrored = (rises[:, 0, 16, 0] > rises[:, 0, 16, -1]).float().mean()
    assert 0.4 < mirrored < 0.6
    plain = augment(ramp, generator(0, "a"), flip=False)
    assert (plain[:, 0, 16, 0] < plain[:, 0, 16, -1]).all()


def test_the_same_key_draws_the_same():
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    first, again, other = (augment(image, generator(1, "step", k), flip=True) for k in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
