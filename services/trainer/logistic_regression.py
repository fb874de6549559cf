"""Multinomial logistic regression on frozen features: the linear probe, and the start of LP-FT's head. In float64 by
L-BFGS, so that the result is the optimum and owes nothing to a learning rate.

Shapes: N images, D embedding, C classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.features import Features
from shared.head import Head

GRID = tuple(10.0**power for power in range(-2, 7))  # inverse regularisation
DEFAULT = 100.0  # without validation images
MAX_STEPS = 1000  # of L-BFGS, as CLIP's own linear probe (arXiv 2103.00020, appendix A.3)


def fit(
    x: Tensor, labels: Tensor, classes: int, c: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """argmin over W, b of |W|^2 / 2 + c * sum_i -log softmax(W x_i + b)_{y_i}, scikit-learn's objective: the bias is
    not penalised. x (N, D) float64, labels (N,) -> W (C, D), b (C,) float64. `start`: another solution to set out
    from."""
    weight, bias = (torch.zeros(classes, x.shape[1]), torch.zeros(classes)) if start is None else start
    weight, bias = (part.to(x).clone().requires_grad_() for part in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_STEPS,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        # Divided by c * N, which moves no optimum: the gradient's tolerance then means the same for every c.
        loss = F.cross_entropy(x @ weight.T + bias, labels) + weight.square().sum() / (2 * c * len(x))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def probe(features: Features, c: float | None) -> tuple[Head, dict[str, Any]]:
    """The probe with inverse regularisation `c`, or with the best of GRID by top-1 on the validation images, then by
    their negative log-likelihood, then the smaller; DEFAULT where there are none. Also what was chosen, and how."""
    classes, x, labels = len(features.class_names), features.train.double(), features.train_labels.long()
    if c is not None or not len(features.val_labels):
        value, how = (DEFAULT, "default") if c is None else (c, "given")
        weight, bias = fit(x, labels, classes, value)
        return Head(weight.float(), bias.float()), {"inverse_regularisation": value, "by": how}
    val, val_labels = features.val.double(), features.val_labels.long()
    best: tuple[tuple[float, float], float, Tensor, Tensor] | None = None
    solution: tuple[Tensor, Tensor] | None = None
    curve = []
    for value in GRID:
        solution = weight, bias = fit(x, labels, classes, value, solution)
        logits = val @ weight.T + bias
        top1 = float((logits.argmax(1) == val_labels).double().mean())
        nll = float(F.cross_entropy(logits, val_labels))
        curve.append({"inverse_regularisation": value, "val_top1": top1, "val_nll": nll})
        if best is None or (-top1, nll) < best[0]:
            best = (-top1, nll), value, weight, bias
    assert best is not None
    _, value, weight, bias = best
    return Head(weight.float(), bias.float()), {"inverse_regularisation": value, "by": "val", "curve": curve}
