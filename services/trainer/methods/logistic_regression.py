"""Multinomial logistic regression on frozen features: the linear probe, and the start of LP-FT's head. In float64 by
L-BFGS, so that the result is the optimum and owes nothing to a learning rate.

Shapes: N images, D embedding, C classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.features import Features
from shared.classifier.head import Head

GRID = tuple(10.0**power for power in range(-2, 7))  # inverse regularisation
DEFAULT = 100.0  # without validation images
MAX_STEPS = 1000  # of L-BFGS, as CLIP's own linear probe (arXiv 2103.00020, appendix A.3)
_RANK = 1e-10  # of the longest principal axis: shorter ones are rounding


class Regression:
    """The problem for images x (N, D) and labels (N,), at any regularisation.

    Solved in other coordinates, which moves no optimum: x is centred (the bias, which is not penalised, takes up the
    mean) and rotated to its principal axes, of which there are at most N and outside of which W is 0; each axis is
    scaled by the curvature that bounds the objective's there (Boehning's: half the covariance, and the penalty). L-BFGS
    then needs tens of steps where it took up to a thousand."""

    def __init__(self, x: Tensor, labels: Tensor, classes: int) -> None:
        x = x.double()
        self._mean = x.mean(0)
        rows, lengths, axes = torch.linalg.svd(x - self._mean, full_matrices=False)
        kept = lengths > _RANK * lengths.max()
        self._lengths, self._axes = lengths[kept], axes[kept]
        self._x = rows[:, kept] * self._lengths
        self._labels, self._targets = labels, F.one_hot(labels, classes).to(x)

    def fit(self, c: float, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """argmin over W, b of |W|^2 / 2 + c * sum_i -log softmax(W x_i + b)_{y_i}, scikit-learn's objective: the bias
        is not penalised. -> W (C, D), b (C,) float64. `start`: another solution to set out from."""
        n, classes = self._targets.shape
        scale = (self._lengths.square() / (2 * n) + 1 / (c * n)).rsqrt()
        scaled, bias = torch.zeros(classes, len(scale)).to(self._x), torch.zeros(classes).to(self._x)
        if start is not None:
            scaled, bias = (start[0] @ self._axes.T) / scale, start[1] + start[0] @ self._mean
        optimizer = torch.optim.LBFGS(
            [scaled, bias],
            max_iter=MAX_STEPS,
            tolerance_grad=1e-7,
            tolerance_change=1e-14,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            # Divided by c * N, which moves no optimum: the gradient's tolerance then means the same for every c.
            weight = scaled * scale
            log_p = F.log_softmax(torch.addmm(bias, self._x, weight.T), dim=1)
            of_logits = (log_p.exp() - self._targets) / n
            scaled.grad = (of_logits.T @ self._x + weight / (c * n)) * scale
            bias.grad = of_logits.sum(0)
            loss: Tensor = F.nll_loss(log_p, self._labels) + weight.square().sum() / (2 * c * n)
            return loss

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        weight = (scaled * scale) @ self._axes
        return weight, bias - weight @ self._mean


def probe(features: Features, c: float | None) -> tuple[Head, dict[str, Any]]:
    """The probe with inverse regularisation `c`, or with the best of GRID by top-1 on the validation images, then by
    their negative log-likelihood, then the smaller; DEFAULT where there are none. Also what was chosen, and how."""
    regression = Regression(features.train, features.train_labels.long(), len(features.class_names))
    if c is not None or not len(features.val_labels):
        value, how = (DEFAULT, "default") if c is None else (c, "given")
        weight, bias = regression.fit(value)
        return Head(weight.float(), bias.float()), {"inverse_regularisation": value, "by": how}
    val, val_labels = features.val.double(), features.val_labels.long()
    best: tuple[tuple[float, float], float, Tensor, Tensor] | None = None
    solution: tuple[Tensor, Tensor] | None = None
    curve = []
    for value in GRID:
        solution = weight, bias = regression.fit(value, solution)
        logits = val @ weight.T + bias
        top1 = float((logits.argmax(1) == val_labels).double().mean())
        nll = float(F.cross_entropy(logits, val_labels))
        curve.append({"inverse_regularisation": value, "val_top1": top1, "val_nll": nll})
        if best is None or (-top1, nll) < best[0]:
            best = (-top1, nll), value, weight, bias
    assert best is not None
    _, value, weight, bias = best
    return Head(weight.float(), bias.float()), {"inverse_regularisation": value, "by": "val", "curve": curve}
