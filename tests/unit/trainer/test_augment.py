"""The augmentation against torchvision's, which open_clip uses."""

import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from services.trainer.training.augment import RATIO, SCALE, crop, crop_boxes, draw_crops, resample
from services.trainer.training.randomness import generator


def augment(images, rng, *, flip):
    return crop(images, draw_crops(len(images), images.shape[-1], rng, flip=flip))


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


@pytest.fixture(scope="module")
def open_clips() -> RandomResizedCrop:
    """The crop of open_clip's train transform, with the scale it is trained with (its default is the same)."""
    transform = image_transform_v2(PreprocessCfg(size=224), is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
    cropping = transform.transforms[0]
    assert isinstance(cropping, RandomResizedCrop)
    return cropping


def test_the_transform_is_open_clips(open_clips):
    assert tuple(open_clips.scale) == SCALE
    assert tuple(open_clips.ratio) == RATIO
    assert open_clips.interpolation == InterpolationMode.BICUBIC
    assert open_clips.antialias
    default = image_transform_v2(PreprocessCfg(size=224), is_train=True)
    assert default.transforms[0].scale == open_clips.scale
    assert not any("Flip" in type(step).__name__ for step in default.transforms)  # as ours: off where not asked for


def test_boxes_are_distributed_as_open_clips(open_clips):
    n, size = 4000, 224
    ours = crop_boxes(n, size, generator(0, "boxes")).double()
    torch.manual_seed(0)
    blank = torch.empty(3, size, size)
    draws = [open_clips.get_params(blank, list(open_clips.scale), list(open_clips.ratio)) for _ in range(n)]
    theirs = torch.tensor(draws).double()
    compared = {
        "area": lambda box: box[:, 2] * box[:, 3] / size**2,
        "aspect": lambda box: (box[:, 3] / box[:, 2]).log(),
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "height": lambda box: box[:, 2],
        "width": lambda box: box[:, 3],
        "right margin": lambda box: size - box[:, 1] - box[:, 3],
        "area times aspect": lambda box: box[:, 2] * box[:, 3] * (box[:, 3] / box[:, 2]).log().abs(),
    }
    for name, of in compared.items():
        a, b = of(ours), of(theirs)
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > 0.01, name
        error = (a.var() / n + b.var() / n).sqrt()
        assert abs(a.mean() - b.mean()) < 4 * error, name
        assert a.std() == pytest.approx(float(b.std()), rel=0.06), name


def test_the_comparison_would_notice_another_scale():
    ours = crop_boxes(4000, 224, generator(0, "boxes")).double()
    torch.manual_seed(0)
    draws = [RandomResizedCrop.get_params(torch.empty(3, 224, 224), [0.88, 1.0], list(RATIO)) for _ in range(4000)]
    theirs = torch.tensor(draws).double()
    assert ks_2samp((ours[:, 2] * ours[:, 3]).numpy(), (theirs[:, 2] * theirs[:, 3]).numpy()).pvalue < 1e-6


@pytest.mark.parametrize("size", [32, 224])
def test_as_matrix_products_the_pixels_are_the_same(size):
    """What a GPU computes, here on the CPU: equal to PIL's up to rounding."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, size, size), generator=rng, dtype=torch.uint8)
    crops = draw_crops(6, size, generator(5, "x"), flip=True)
    assert 0 < crops.mirrored.sum() < 6
    difference = (resample(images, crops).int() - crop(images, crops).int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.05


def test_part_of_a_batch_is_augmented_as_in_the_whole():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    crops = draw_crops(5, 32, generator(5, "x"), flip=True)
    assert torch.equal(crop(images[2:4], crops.part(2, 4)), crop(images, crops)[2:4])


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
