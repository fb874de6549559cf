"""The image tower's last projection, which maps what the tower has pooled to the space shared with texts. Shapes: B
images, P the width before it, D the embedding's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from shared.clip.loading import LoadedClip
from shared.errors import InvalidInput


@dataclass(frozen=True)
class Projection:
    """name: the weight's key in the model's state_dict. weight: as the model stores it, (P, D) where it is open_clip's
    bare parameter, (D, P) where it is a layer's; on the model's device. bias (D,) if there is one."""

    name: str
    weight: Tensor
    bias: Tensor | None
    of_layer: bool

    def project(self, unprojected: Tensor, weight: Tensor | None = None) -> Tensor:
        """(B, P) -> (B, D), not normalised, by the model's weight or by another one stored like it."""
        weight = self.weight if weight is None else weight
        return F.linear(unprojected, weight if self.of_layer else weight.T, self.bias)

    @torch.no_grad()
    def unprojected(self, model: Any, pixels: Tensor) -> Tensor:
        """What `model` gives its last projection: (B, 3, S, S) as `encode_image` takes it -> (B, P), on its device. The
        tower runs with the identity in the projection's place, which adds nothing but zeros to each number."""
        parameters = dict(model.visual.named_parameters())
        key = self.name.removeprefix("visual.")
        width = self.weight.shape[1 if self.of_layer else 0]
        stands_in = {key: torch.eye(width, dtype=parameters[key].dtype, device=parameters[key].device)}
        if self.bias is not None:
            stands_in[_bias_of(key)] = parameters[key].new_zeros(width)
        found = functional_call(model.visual, stands_in, (pixels,))
        features: Tensor = found[0] if isinstance(found, tuple) else found
        return features


def last_projection(clip: LoadedClip) -> Projection:
    """Raises InvalidInput for an image tower that ends without a linear projection."""
    visual = clip.model.visual
    bare = getattr(visual, "proj", None)
    if isinstance(bare, nn.Parameter):  # open_clip's ViT
        return Projection("visual.proj", bare.detach(), None, of_layer=False)
    for name, layer in _candidates(visual):
        if isinstance(layer, nn.Linear):
            bias = None if layer.bias is None else layer.bias.detach()
            return Projection(f"visual.{name}.weight", layer.weight.detach(), bias, of_layer=True)
    raise InvalidInput(
        f"The image tower of '{clip.name}' has no linear projection at its end, which this method trains. Choose "
        "another model or method.",
        code="no_projection",
        param="model",
    )


def _candidates(visual: nn.Module) -> Iterator[tuple[str, Any]]:
    """Where open_clip's towers have it: the ResNet; timm towers with a head of open_clip's (a layer, an MLP, attention
    pooling); timm towers whose own classifier serves as the projection."""
    modules = dict(visual.named_modules())
    for name in ("attnpool.c_proj", "head.proj", "head.mlp.fc2", "head.pool.proj"):
        yield name, modules.get(name)
    trunk = modules.get("trunk")
    if trunk is not None and not len(modules["head"]._modules) and hasattr(trunk, "get_classifier"):
        classifier = trunk.get_classifier()
        yield from ((name, module) for name, module in modules.items() if module is classifier)


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"
