"""The losses. First the MMFT objective (arXiv 2601.21426) as one soft-target cross-entropy:

L = w * L_sup + (1 - w) * L_clip, each averaged over image->text and text->image. L_clip is CLIP's contrastive
cross-entropy, whose target for row i is its own pair. L_sup is supervised contrastive (SupCon, arXiv 2004.11362; UniCL,
arXiv 2204.03610): the mean log-probability of row i's same-class pairs. Both are cross-entropies on the same softmax,
so L is the cross-entropy with the mixed target, and `log_softmax` keeps it finite at any logit scale.

Then those over class logits: plain and soft-target cross-entropy, and TeS (arXiv 2304.01489).

Shapes: B batch, C classes, D embedding. Logits are nats-scaled cosines, losses are in nats.
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


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, C) against labels (B,), `label_smoothing` of whose target is spread evenly over
    the C classes, the label's own among them: ()."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C) against targets (B, C), each row a distribution: ()."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


def tes_loss(
    logits: Tensor, text_logits: Tensor, labels: Tensor, lambda_v: float, lambda_t: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """TeS: the head's logits (B, C) against (1 - lambda_v) * onehot + lambda_v * softmax(text_logits), and lambda_t
    times the cross-entropy of the text classifier's logits (B, C), already divided by their temperature. No gradient
    flows through the target. Returns (loss (), {"vision": the former, "text": the latter without its weight}), the
    parts detached."""
    onehot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    target = (1 - lambda_v) * onehot + lambda_v * F.softmax(text_logits.detach(), dim=1)
    vision, text = soft_cross_entropy(logits, target), cross_entropy(text_logits, labels)
    return vision + lambda_t * text, {"vision": vision.detach(), "text": text.detach()}
