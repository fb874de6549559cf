"""The loss against a naive float64 reference that sums logarithms pair by pair, as the paper states it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.training.losses import (
    Variant,
    cross_entropy,
    mmft_loss,
    soft_cross_entropy,
    soft_targets,
    tes_loss,
)

VARIANTS: tuple[Variant, ...] = ("exclude_self", "include_self")


def reference(image, text, scale, labels, w, variant):
    """w * L_sup + (1 - w) * L_clip with loops, in float64, each averaged over both directions."""
    logits = scale * image.double() @ text.double().T
    clip_sides, sup_sides = [], []
    for z in (logits, logits.T):
        clip_rows, sup_rows = [], []
        for i in range(len(z)):
            log_p = [z[i, j] - torch.logsumexp(z[i], 0) for j in range(len(z))]
            same = [j for j in range(len(z)) if labels[j] == labels[i] and (variant == "include_self" or j != i)]
            clip_rows.append(-log_p[i])
            sup_rows.append(-sum(log_p[j] for j in same) / len(same) if same else -log_p[i])
        clip_sides.append(sum(clip_rows) / len(z))
        sup_sides.append(sum(sup_rows) / len(z))
    clip, sup = sum(clip_sides) / 2, sum(sup_sides) / 2
    return w * sup + (1 - w) * clip, clip, sup


def embeddings(n, seed, dim=6, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    pair = [F.normalize(torch.randn(n, dim, generator=rng, dtype=dtype), dim=-1) for _ in range(2)]
    return pair[0], pair[1]


@settings(max_examples=60)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    w=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 1000),
)
def test_loss_parts_and_gradients_equal_the_reference(labels, w, scale, variant, seed):
    image, text = embeddings(len(labels), seed)
    image.requires_grad_()
    text.requires_grad_()
    log_scale = torch.tensor(math.log(scale), requires_grad=True)
    loss, parts = mmft_loss(image, text, log_scale.exp(), torch.tensor(labels), w, variant)
    gradients = torch.autograd.grad(loss, (image, text, log_scale))

    image64, text64 = (x.detach().double().requires_grad_() for x in (image, text))
    log_scale64 = log_scale.detach().double().requires_grad_()
    expected, clip, sup = reference(image64, text64, log_scale64.exp(), labels, w, variant)
    expected_gradients = torch.autograd.grad(expected, (image64, text64, log_scale64))

    tolerance = {"rtol": 1e-4, "atol": 1e-5 * scale}
    for got, want in zip((loss, parts["clip"], parts["sup"]), (expected, clip, sup), strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)


@settings(max_examples=50)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=12), w=st.floats(0, 1), variant=st.sampled_from(VARIANTS)
)
def test_targets_are_symmetric_distributions_within_the_class(labels, w, variant):
    q = soft_targets(torch.tensor(labels), w, variant)
    torch.testing.assert_close(q.sum(1), torch.ones(len(labels)))
    torch.testing.assert_close(q, q.T)
    same = torch.tensor(labels)[:, None] == torch.tensor(labels)[None]
    assert (q[~same] == 0).all()
    assert (q >= 0).all()


def test_targets_by_hand():
    labels = torch.tensor([0, 0, 0, 1])
    exclude = soft_targets(labels, 0.4, "exclude_self")
    np.testing.assert_allclose(exclude[0], [0.6, 0.2, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(exclude[3], [0, 0, 0, 1])  # a class of one keeps CLIP's target
    include = soft_targets(labels, 0.3, "include_self")
    np.testing.assert_allclose(include[0], [0.8, 0.1, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(include[3], [0, 0, 0, 1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]])
def test_scale_100_and_cosine_1_stay_finite(variant, labels):
    """exp(100) overflows float32: a loss without max-subtraction is infinite here."""
    image = F.normalize(torch.ones(4, 6), dim=-1).requires_grad_()
    loss, _ = mmft_loss(image, image.detach(), torch.tensor(100.0), torch.tensor(labels), 0.1, variant)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)  # all pairs alike: uniform
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()


def test_without_w_it_is_clips_loss():
    image, text = embeddings(5, 3)
    logits = 10 * image @ text.T
    own = torch.arange(5)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    loss, _ = mmft_loss(image, text, torch.tensor(10.0), torch.tensor([0, 0, 1, 1, 1]), 0.0, "exclude_self")
    torch.testing.assert_close(loss, clip)


def test_parts_do_not_hold_the_graph():
    image, text = embeddings(3, 1)
    _, parts = mmft_loss(image.requires_grad_(), text, torch.tensor(10.0), torch.zeros(3), 0.1, "include_self")
    assert not any(part.requires_grad for part in parts.values())


# -- over class logits -------------------------------------------------------------------------------------------------


def class_logits(labels, classes, scale, seed):
    """Logits (B, C) of `scale` times cosines, the first image's cosine with its own class being exactly 1."""
    image, text = embeddings(max(len(labels), classes), seed)
    image, text = image[: len(labels)].clone(), text[:classes]
    image[0] = text[labels[0]]
    return scale * image @ text.T


def naive(logits, targets):
    """Mean over rows of the cross-entropy, class by class in float64."""
    rows = []
    for z, q in zip(logits.double(), targets.double(), strict=True):
        rows.append(-sum(q[c] * (z[c] - torch.logsumexp(z, 0)) for c in range(len(z))))
    return sum(rows) / len(rows)


drawn = settings(max_examples=60)
batches = given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    spare=st.integers(0, 2),  # classes without an image in the batch; with one label 0 and none spare: a single class
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    seed=st.integers(0, 1000),
)


@drawn
@batches
def test_cross_entropy_equals_the_reference(labels, spare, scale, share, seed):
    classes = max(labels) + 1 + spare
    logits = class_logits(labels, classes, scale, seed).requires_grad_()
    loss = cross_entropy(logits, torch.tensor(labels), share)
    wide = logits.detach().double().requires_grad_()
    onehot = torch.eye(classes, dtype=torch.float64)[labels]
    expected = naive(wide, (1 - share) * onehot + share / classes)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * scale}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    got, want = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, wide)[0]
    torch.testing.assert_close(got.double(), want, **tolerance)


@drawn
@batches
def test_soft_cross_entropy_equals_the_reference(labels, spare, scale, share, seed):
    classes = max(labels) + 1 + spare
    logits = class_logits(labels, classes, scale, seed)
    targets = F.softmax(3 * torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed)), dim=1)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * scale}
    torch.testing.assert_close(soft_cross_entropy(logits, targets).double(), naive(logits, targets), **tolerance)


@drawn
@batches
def test_tes_equals_the_reference(labels, spare, scale, share, seed):
    classes, lambda_t = max(labels) + 1 + spare, 0.3
    logits = class_logits(labels, classes, scale, seed).requires_grad_()
    text_logits = class_logits(labels, classes, 1 / 0.03, seed + 1).requires_grad_()
    loss, parts = tes_loss(logits, text_logits, torch.tensor(labels), share, lambda_t)

    wide, text = (x.detach().double().requires_grad_() for x in (logits, text_logits))
    onehot = torch.eye(classes, dtype=torch.float64)[labels]
    reference = torch.exp(text.detach() - torch.logsumexp(text.detach(), 1, keepdim=True))
    vision, words = naive(wide, (1 - share) * onehot + share * reference), naive(text, onehot)
    expected = vision + lambda_t * words
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * max(scale, 1 / 0.03)}
    for got, want in zip((loss, parts["vision"], parts["text"]), (expected, vision, words), strict=True):
        torch.testing.assert_close(got.detach().double(), want.detach(), **tolerance)
    gradients = torch.autograd.grad(loss, (logits, text_logits))
    for got, want in zip(gradients, torch.autograd.grad(expected, (wide, text)), strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)


def test_without_its_terms_tes_is_cross_entropy():
    logits, text_logits = class_logits([0, 1, 2], 3, 10.0, 0), class_logits([0, 1, 2], 3, 30.0, 1)
    labels = torch.tensor([0, 1, 2])
    loss, _ = tes_loss(logits, text_logits, labels, 0.0, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_one_class_costs_nothing():
    logits, labels = torch.full((4, 1), 100.0), torch.zeros(4, dtype=torch.int64)
    assert cross_entropy(logits, labels).item() == 0
    assert tes_loss(logits, logits, labels, 0.1, 0.3)[0].item() == 0
