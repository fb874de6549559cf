"""AdamW as the methods use it, its schedule, and how a model is set up for training."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from services.trainer.methods.base import FineTuneHyperparameters

MAX_LOGIT_SCALE = math.log(100)  # CLIP's own bound (arXiv 2103.00020, section 2.5)
# The blocks that towers are stacks of: open_clip's ViT, text and ResNet, timm's, Hugging Face's.
_BLOCK = re.compile(r"^(.*\b(?:resblocks|blocks?|layers?\d?|h)\.\d+(?:\.\d+)*)\.")
_LAST = ("proj", "text_projection")  # last layers that are parameters of the tower itself, which come first by name


class Optimizer:
    """Fused AdamW with the schedule, loss scaling for float16, clipping and the bound of the logit scale.

    Nothing here waits for the device: with float16 the optimiser skips a step on the device where gradients overflowed,
    and the learning rate is looked up there by the steps it really took."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        hp: FineTuneHyperparameters,
        total_steps: int,
        device: torch.device,
    ) -> None:
        self.parameters, self.hp, self.total_steps = parameters, hp, total_steps
        self.adamw = AdamW(parameter_groups(parameters, hp), lr=hp.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=hp.precision == "fp16")
        self._rates: Tensor | None = None
        if self.scaler.is_enabled():
            rates = [hp.learning_rate * schedule(i, total_steps, hp.warmup) for i in range(total_steps)]
            self._rates = torch.tensor(rates, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to take the gradients of."""
        found: Tensor = self.scaler.scale(loss)
        return found

    def step(self, step: int) -> tuple[float | Tensor, Tensor | None]:
        """Step `step`, from 0, by the gradients there are. -> (learning rate, norm of the gradients if clipped)."""
        lr = self._rate(step)
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["factor"]
        norm = None
        self.scaler.unscale_(self.adamw)
        if self.hp.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.hp.max_grad_norm)
        self.scaler.step(self.adamw)
        self.scaler.update()
        scale = self.parameters.get("logit_scale")
        if scale is not None:
            with torch.no_grad():
                scale.clamp_(max=MAX_LOGIT_SCALE)
        return lr, norm

    def _rate(self, step: int) -> float | Tensor:
        if self._rates is None:
            return self.hp.learning_rate * schedule(step, self.total_steps, self.hp.warmup)
        # AdamW counts a step back where it was skipped; the largest, as a parameter may be without gradients.
        taken = [state["step"] for state in self.adamw.state.values()]
        done = (
            torch.stack(taken).max().long() if taken else torch.zeros((), dtype=torch.long, device=self._rates.device)
        )
        return self._rates[done[None]].squeeze()

    def grad_norm(self) -> Tensor:
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        return nn.utils.get_total_norm(grads) if grads else torch.zeros(())

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by "moment/name", the loss scaler's JSON) to go on from."""
        tensors = {
            f"{moment}/{name}": value
            for name, parameter in self.parameters.items()
            for moment, value in self.adamw.state.get(parameter, {}).items()
        }
        return tensors, self.scaler.state_dict()

    def load(self, tensors: Mapping[str, Tensor], scaler: dict[str, Any]) -> None:
        for key, value in tensors.items():
            moment, name = key.split("/", 1)
            parameter = self.parameters[name]
            # AdamW walks its moments in memory order, which must be that of the weights (channels last in conv towers).
            like = torch.empty_like(parameter if value.shape else value, dtype=value.dtype, device=parameter.device)
            self.adamw.state[parameter][moment] = like.copy_(value)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)


def parameter_groups(parameters: Mapping[str, nn.Parameter], hp: FineTuneHyperparameters) -> list[dict[str, Any]]:
    """AdamW's groups: by decay (vectors and scalars, that is norms, biases and the logit scale, only where `decay` is
    "all") and by `factor`, the share of the learning rate that `layer_decay` leaves them."""
    factors = layer_factors(parameters, hp.layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decay = hp.weight_decay if hp.decay == "all" or parameter.ndim >= 2 else 0.0
        group = {"params": [], "weight_decay": decay, "factor": factors[name]}
        groups.setdefault((decay, factors[name]), group)["params"].append(parameter)
    return list(groups.values())


def layer_factors(names: Iterable[str], decay: float) -> dict[str, float]:
    """decay ** (layers above), counted in each tower for itself: the projections and final norms, the head and the
    logit scale have 1, the last block has `decay`, and the embeddings or the stem have the least."""
    towers: dict[str, list[str]] = {"visual.": [], "": []}
    for name in names:
        towers["visual." if name.startswith("visual.") else ""].append(name)
    factors: dict[str, float] = {}
    for prefix, own in towers.items():
        depths, top = _depths([name.removeprefix(prefix).removeprefix("text.") for name in own])
        factors |= {name: decay ** (top - depth) for name, depth in zip(own, depths, strict=True)}
    return factors


def _depths(names: list[str]) -> tuple[list[int], int]:
    """Of parameters in the order of their modules: embeddings and stem 0, block i at i + 1, what follows on top; and
    the top."""
    matches = [_BLOCK.match(name) for name in names]
    blocks = list(dict.fromkeys(match[1] for match in matches if match))
    last = max((i for i, match in enumerate(matches) if match), default=-1)
    depths: list[int] = []
    top, current = len(blocks) + 1, 0
    for i, (name, match) in enumerate(zip(names, matches, strict=True)):
        if match:
            current = blocks.index(match[1]) + 1
            depths.append(current)
        elif name.startswith((*_LAST, "logit_", "head.")):
            depths.append(top)
        elif "embed" in name:  # CLIP's token embedding is listed after the blocks
            depths.append(0)
        else:
            depths.append(top if i > last else current)
    return depths, top


def schedule(step: int, total: int, warmup: float = 0.0) -> float:
    """Share of the peak learning rate at `step` (from 0): a line up to 1 in the first `warmup` of the steps, then a
    cosine to 0 after the last."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


def prefer_channels_last(model: Any) -> None:
    """Stores the weights of a convolutional image tower channels last (a ViT's one convolution doesn't count): on the
    CPU a step of the starter at batch 64 took half the time."""
    if sum(isinstance(module, nn.Conv2d) for module in model.visual.modules()) > 1:
        model.visual.to(memory_format=torch.channels_last)


def freeze_batch_norm_statistics(model: nn.Module) -> None:
    """Keeps BatchNorm's running statistics as they are (its weights still train): batches of some dozen images would
    drift them away from what the model was trained with. To be called after every `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
