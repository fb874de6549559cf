"""AdamW as the methods use it, its schedule, and how a model is set up for training."""

import math

import torch
from torch import nn
from torch.optim import AdamW

MAX_LOGIT_SCALE = math.log(100)  # CLIP's own bound (arXiv 2103.00020, section 2.5)


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """Over everything trainable; vectors and scalars (norms, biases, the logit scale) are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, fused=True)


def cosine(step: int, total: int) -> float:
    """Share of the peak learning rate at `step` (from 0): 1 at the start, 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


def prefer_channels_last(model: nn.Module) -> None:
    """Stores the weights of a convolutional image tower channels last (a ViT's one convolution doesn't count): on the
    CPU a step of the starter at batch 64 took half the time."""
    visual = model.visual
    assert isinstance(visual, nn.Module)
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1:
        visual.to(memory_format=torch.channels_last)


def freeze_batch_norm_statistics(model: nn.Module) -> None:
    """Keeps BatchNorm's running statistics as they are (its weights still train): batches of some dozen images would
    drift them away from what the model was trained with. To be called after every `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
