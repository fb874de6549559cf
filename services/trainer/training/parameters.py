"""What a fine-tune trains of a model, and the model with any values of it, as ordinary weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from services.trainer.methods.base import FineTune
from services.trainer.training.adapters import Adapters, adaptable
from services.trainer.training.optim import freeze_batch_norm_statistics, prefer_channels_last
from services.trainer.training.randomness import derived_seed
from shared.clip.loading import LoadedClip
from shared.errors import InvalidInput

Tower = Literal["visual", "text"]
_BOTH: frozenset[Tower] = frozenset({"visual", "text"})
# The last layer of a tower, in open_clip's names: ViT, ResNet, timm; CLIP's own text tower, a custom one, Hugging Face.
_PROJECTIONS = (
    "visual.proj",
    "visual.attnpool.c_proj.",
    "visual.head.proj.",
    "text_projection",
    "text.text_projection",
    "text.proj.",
)
_SCALES = ("logit_scale", "logit_bias")


def tower_of(name: str) -> Tower:
    """The tower that a parameter or module belongs to, by its name in open_clip's CLIP or CustomTextCLIP."""
    return "visual" if name == "visual" or name.startswith("visual.") else "text"


def trained_towers(method: FineTune) -> frozenset[Tower]:
    """The towers in which the method trains something. Raises InvalidInput where that would be nothing."""
    hp = method.hyperparameters
    if hp.trainable in ("visual", "text"):
        towers: frozenset[Tower] = frozenset({hp.trainable})
    elif hp.trainable == "lora":
        chosen: Literal["both", "visual", "text"] = getattr(hp, "lora_towers", "both")  # a choice of some methods
        towers = _BOTH if chosen == "both" else frozenset({chosen})
    else:
        towers = _BOTH
    if method.step_texts == "none":
        towers -= {"text"}
    if not towers:
        raise InvalidInput(
            f"Method `{method.name}` reads no text in its steps, so the text tower has nothing to learn: give "
            "`trainable` another value.",
            code="nothing_to_train",
            param="method.hyperparameters.trainable",
        )
    return towers


class Trained:
    """A copy of a CLIP in training.

    model: what the steps run; plain: the same in ordinary weights, which `using` fills (another object only with
    adapters); parameters: what the optimiser changes, by name, the head's as "head.weight" and "head.bias"."""

    def __init__(
        self, clip: LoadedClip, method: FineTune, head: nn.Linear | None, seed: int, device: torch.device
    ) -> None:
        hp = method.hyperparameters
        asked = trained_towers(method)
        model: Any = copy.deepcopy(clip.model).requires_grad_(False)
        self.adapters: Adapters | None = None
        if hp.trainable == "lora":
            self.plain: Any = copy.deepcopy(model).to(device)
            torch.manual_seed(derived_seed(seed, "adapters"))
            names = [name for name in adaptable(model) if tower_of(name) in asked]
            self.adapters = Adapters(model, names, hp.lora_rank)
        self.model: Any = model.to(device)
        if self.adapters is None:
            self.plain = self.model
        prefer_channels_last(self.model)
        if self.plain is not self.model:
            prefer_channels_last(self.plain)
        self.head = None if head is None else head.to(device)
        self.parameters = self._choose(hp.trainable, asked)
        # Those with something to train: Hugging Face text towers may have no projection, for one.
        self.towers = {tower_of(name) for name in self.parameters if not name.startswith((*_SCALES, "head."))}
        base = dict(clip.model.named_parameters())
        self._start: dict[str, Tensor] = {n: base[n].detach() for n in self.parameters if n in base}
        self._start |= {name: value for name, value in self.copy().items() if name.startswith("head.")}
        self.train()

    def _choose(self, trainable: str, towers: frozenset[Tower]) -> dict[str, nn.Parameter]:
        """Marks what is trained and returns it."""
        chosen: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if name in _SCALES:
                wanted = name == "logit_scale" and trainable in ("full", "text", "lora")
            elif tower_of(name) not in towers:
                wanted = False
            elif trainable == "projections":
                wanted = name.startswith(_PROJECTIONS)
            else:
                wanted = trainable != "lora" or ".lora_" in name
            if wanted:
                parameter.requires_grad = True
                chosen[name] = parameter
        if not any(name not in _SCALES for name in chosen):
            raise InvalidInput(
                f"This model has nothing that `trainable` '{trainable}' names: choose 'full'.",
                code="nothing_to_train",
                param="method.hyperparameters.trainable",
            )
        if self.head is not None:
            for name, parameter in self.head.named_parameters():
                parameter.requires_grad = True
                chosen[f"head.{name}"] = parameter
        return chosen

    def train(self) -> None:
        """Training mode in the towers that learn: dropout on, BatchNorm statistics as they are. A tower that is fixed,
        or fixed up to its last projection, is a constant function."""
        above = (*_PROJECTIONS, *_SCALES, "head.")
        learning = {tower_of(name) for name in self.parameters if not name.startswith(above)}
        self.model.train("text" in learning)
        self.model.visual.train("visual" in learning)
        freeze_batch_norm_statistics(self.model)

    @contextmanager
    def using(self, values: Mapping[str, Tensor] | None = None, share: float = 1.0) -> Iterator[Any]:
        """`plain` in eval mode with `values` of the parameters (the present ones where None), without gradients.

        `share`: how far from the base model's values to these, 0 to 1 (WiSE-FT, arXiv 2109.01903). The head goes along.
        Afterwards everything is as before, to the bit: tensors are exchanged, not computed back."""
        present = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    value = present[name] if values is None else values[name]
                    if share != 1 and name in self._start:
                        value = torch.lerp(self._start[name].to(value.device), value, share)
                    parameter.data = value
                if self.adapters is not None:
                    self.plain.logit_scale.copy_(self.model.logit_scale)
                    for name, weight in self.adapters.merged(share).items():
                        self.plain.get_parameter(name).copy_(weight)
                self.plain.eval()
                yield self.plain
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = present[name]
            self.train()

    def copy(self) -> dict[str, Tensor]:
        """The parameters' values, on their device."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def state_on_cpu(model: Any) -> dict[str, Tensor]:
    """A copy of the model's state_dict in float32, contiguous, on the CPU."""
    return {
        name: (value.float() if value.is_floating_point() else value)
        .detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
