"""Low-rank adapters (LoRA, arXiv 2106.09685) in a CLIP's towers: W + B A with B = 0 at the start, W fixed.

Linear layers and convolutions get peft's. Attention does not: torch's MultiheadAttention reads its weights without
calling their layers, and peft 0.21 answers that by adding B A before each forward pass and subtracting it again, which
lets W drift by rounding, and it adds the output projection's twice. A parametrisation computes the same sum exactly.
"""

import math
import re
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.nn.utils import parametrize

ADAPTER = "default"  # peft's name for the only one


class LowRank(nn.Module):
    """weight (out, in) -> weight + B A, where A is (rank, in) and B (out, rank); A as peft starts it."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return self.lora_B @ self.lora_A

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta()


class Adapters:
    """Adapters of `rank`, scaled by 1, in every linear layer, attention and ungrouped convolution below `prefixes`.

    Changes `model` in place; its starting values come from torch's global generator."""

    def __init__(self, model: nn.Module, names: list[str], rank: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self._low_rank: dict[str, tuple[nn.Module, str]] = {}  # by the weight's plain name: its module and attribute
        plain = dict(model.named_modules())
        for name in names:
            if isinstance(getattr(plain[name], "in_proj_weight", None), nn.Parameter):
                self._attend(plain[name], name, rank)
        layers = [name for name in names if type(plain[name]) in (nn.Linear, nn.Conv2d)]
        self._layers: dict[str, Any] = {}
        if layers:
            pattern = "|".join(re.escape(name) for name in layers)  # a list would match endings of names too
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), model)
            self._layers = {name: model.get_submodule(name) for name in layers}

    def _attend(self, module: nn.Module, name: str, rank: int) -> None:
        places = [(module, "in_proj_weight", f"{name}.in_proj_weight")]
        if isinstance(module, nn.MultiheadAttention):
            places.append((module.out_proj, "weight", f"{name}.out_proj.weight"))
        for owner, attribute, full in places:
            parametrize.register_parametrization(owner, attribute, LowRank(getattr(owner, attribute), rank))
            self._low_rank[full] = (owner, attribute)

    @torch.no_grad()
    def merged(self, share: float = 1.0) -> dict[str, Tensor]:
        """The adapted weights by their plain names: W + share * B A."""
        weights = {}
        for name, (module, attribute) in self._low_rank.items():
            held: Any = getattr(module, "parametrizations")[attribute]  # noqa: B009 (nn.Module types it as a tensor)
            weights[name] = held.original + share * held[0].delta()
        for name, layer in self._layers.items():
            weights[f"{name}.weight"] = layer.base_layer.weight + share * layer.get_delta_weight(ADAPTER)
        return weights


def adaptable(model: nn.Module) -> list[str]:
    """Names of the modules that can carry adapters. Not the depthwise and other grouped convolutions, which are small,
    nor subclasses that compute something else, nor layers whose weights others read without calling them."""
    modules = dict(model.named_modules())
    pools = tuple(f"{name}." for name, module in modules.items() if isinstance(module, AttentionPool2d))
    found = []
    for name, module in modules.items():
        if (pools and name.startswith(pools)) or name.endswith("text_projection"):
            continue
        attention = isinstance(getattr(module, "in_proj_weight", None), nn.Parameter)
        if attention or type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
            found.append(name)
    return found
