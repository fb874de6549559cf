"""Averages of weights: along a run (EMA) and with the base model's (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

SHARES = [round(0.1 * i, 1) for i in range(11)]  # those tried on the validation images


class EMA:
    """values <- decay * values + (1 - decay) * parameters after each step, from the start's weights. `values`: by name,
    as `Trained.using` takes them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters.values())
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        self._average(list(self.values.values()), [p.detach() for p in self._parameters], torch.zeros(()))


def choose_share(
    wise_ft: float | Literal["val"], accuracy: Callable[[float], float | None]
) -> tuple[float, float | None, dict[str, Any]]:
    """The fine-tuned weights' share in the end, the validation accuracy with it, and a record of both.

    accuracy(share): top-1 on the validation images, None without any. On "val" the best of SHARES is taken; a tie goes
    to the largest, which changes least of what was trained."""
    if wise_ft != "val":
        val = accuracy(wise_ft)
        return wise_ft, val, {"share": wise_ft, "val_top1": val}
    curve = [(share, accuracy(share)) for share in SHARES]
    share, val = max(curve, key=lambda point: (-1.0 if point[1] is None else point[1], point[0]))
    return share, val, {"share": share, "val_top1": val, "curve": [list(point) for point in curve]}
