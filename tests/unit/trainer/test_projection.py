"""Projecting what a tower gives its last projection must give what the tower itself gives."""

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from shared.clip.loading import LoadedClip, encode_image, normalise
from shared.clip.projection import last_projection
from shared.errors import InvalidInput

TEXT = {"context_length": 16, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1}


def built(like: LoadedClip, vision: dict[str, Any], size: int) -> LoadedClip:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(16, {"image_size": size, **vision}, TEXT).eval()
        for parameter in model.visual.parameters():
            if parameter.ndim == 1:  # biases, which start at 0 and would hide a mistake
                torch.nn.init.normal_(parameter, std=0.5)
    return replace(like, model=model, image_size=size)


def timm(name: str = "test_efficientnet", size: int = 64, **vision: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": size, **vision}


TOWERS = {
    "vit": ({"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}, 32, "visual.proj"),
    "vit, mean of patches": (
        {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "avg", "final_ln_after_pool": True},
        32,
        "visual.proj",
    ),
    "vit, attention pooling": (
        {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "attentional_pool": True, "attn_pooler_heads": 2},
        32,
        "visual.proj",
    ),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 4, "head_width": 32}, 32, "visual.attnpool.c_proj.weight"),
    "timm, as the starter": (
        timm(timm_pool="avg", timm_proj="linear", timm_proj_bias=True),
        64,
        "visual.head.proj.weight",
    ),
    "timm, without a bias": (timm(timm_pool="avg", timm_proj="linear"), 64, "visual.head.proj.weight"),
    "timm, an MLP": (timm(timm_pool="avg", timm_proj="mlp"), 64, "visual.head.mlp.fc2.weight"),
    "timm, its own classifier": (timm(timm_pool="avg", timm_proj=""), 64, "visual.trunk.classifier.weight"),
    "timm, a ViT's own classifier": (
        timm("test_vit", 160, timm_pool="token", timm_proj=""),
        160,
        "visual.trunk.head.weight",
    ),
    "timm, attention pooling": (timm(timm_pool="rot_attn", timm_proj=""), 64, "visual.head.pool.proj.weight"),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_projecting_what_came_before_gives_the_embedding(tower, tiny):
    vision, size, name = TOWERS[tower]
    clip = built(tiny, vision, size)
    projection = last_projection(clip)
    assert projection.name == name
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    raw = projection.unprojected(clip.model, normalise(images, clip))
    width = projection.weight.shape[1 if projection.of_layer else 0]
    assert raw.shape == (3, width)
    torch.testing.assert_close(
        F.normalize(projection.project(raw), dim=-1), encode_image(clip, images), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_another_weight_in_its_place_does_what_the_model_would_do_with_it(tower, tiny):
    vision, size, name = TOWERS[tower]
    clip = built(tiny, vision, size)
    projection = last_projection(clip)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    raw = projection.unprojected(clip.model, normalise(images, clip))
    other = torch.randn(projection.weight.shape, generator=torch.Generator().manual_seed(2))
    before = encode_image(clip, images)
    clip.model.load_state_dict({**clip.model.state_dict(), name: other})
    after = encode_image(clip, images)
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(F.normalize(projection.project(raw, other), dim=-1), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fixture", ["tiny", "tiny_resnet"])
def test_it_holds_for_loaded_models_which_stay_as_they_are(fixture, request, balls):
    clip: LoadedClip = request.getfixturevalue(fixture)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    projection = last_projection(clip)
    raw = projection.unprojected(clip.model, normalise(balls.images, clip))
    found = F.normalize(projection.project(raw), dim=-1)
    torch.testing.assert_close(found, encode_image(clip, balls.images), rtol=0, atol=1e-5)
    assert not raw.requires_grad
    assert all(torch.equal(before[name], value) for name, value in clip.model.state_dict().items())


def test_a_tower_that_gives_its_tokens_too(tiny, balls):
    vision, size, _ = TOWERS["vit"]
    clip = built(tiny, vision, size)
    pixels = normalise(balls.images, clip)
    plain = last_projection(clip).unprojected(clip.model, pixels)
    clip.model.visual.output_tokens = True
    torch.testing.assert_close(last_projection(clip).unprojected(clip.model, pixels), plain)


def test_a_tower_without_a_projection_is_refused(tiny):
    clip = built(tiny, timm("test_vit", 160, timm_pool="token", timm_proj="none"), 160)
    with pytest.raises(InvalidInput, match="no linear projection") as caught:
        last_projection(clip)
    assert (caught.value.code, caught.value.param) == ("no_projection", "model")
