"""The MMFT objective (arXiv 2601.21426) as one soft-target cross-entropy.

L = w * L_sup + (1 - w) * L_clip, each averaged over image->text and text->image. L_clip is CLIP's contrastive
cross-entropy, whose target for row i is its own pair. L_sup is supervised contrastive (SupCon, arXiv 2004.11362; UniCL,
arXiv 2204.03610): the mean log-probability of row i's same-class pairs. Both are cross-entropies on the same softmax,
so L is the cross-entropy with the mixed target, and `log_softmax` keeps it finite at any logit scale.

Shapes: B batch, D embedding. Logits are nats-scaled cosines, losses are in nats.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Variant = Literal["exclude_self", "include_self"]


def soft_targets(labels: Tensor, w: float, variant: Variant) -> Tensor:
    """Target distribution of each row over the batch's pairs: labels (B,) -> (B, B) float32, symmetric, rows sum to 1.

    `exclude_self`: 1 - w on the own pair, w spread evenly over the *other* pairs of the class (SupCon); a row without
    any keeps everything on its own pair, that is, falls back to L_clip. `include_self`: w is spread over all pairs of
    the class, the own one among them (UniCL).
    """
    own = torch.eye(len(labels), device=labels.device)
    positives = (labels[:, None] == labels[None, :]).float()
    if variant == "exclude_self":
        positives = positives - own
    counts = positives.sum(1, keepdim=True)
    spread = torch.where(counts > 0, positives / counts.clamp(min=1), own)
    return (1 - w) * own + w * spread


def mmft_loss(
    image_emb: Tensor, text_emb: Tensor, logit_scale: Tensor, labels: Tensor, w: float, variant: Variant
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its two parts.

    image_emb, text_emb: (B, D), L2-normalised, row i of both being one pair; logit_scale: scalar, already
    exponentiated; labels: (B,). Returns (loss (), {"clip": L_clip, "sup": L_sup}), the parts detached. With w = 0 this
    is CLIP's loss exactly.
    """
    logits = logit_scale * image_emb @ text_emb.T
    log_p = (F.log_softmax(logits, dim=1) + F.log_softmax(logits, dim=0).T) / 2  # image->text, text->image
    loss = -(soft_targets(labels, w, variant).to(log_p.dtype) * log_p).sum(1).mean()
    with torch.no_grad():
        clip = -log_p.diagonal().mean()
        sup = -(soft_targets(labels, 1.0, variant).to(log_p.dtype) * log_p).sum(1).mean()
    return loss, {"clip": clip, "sup": sup}
