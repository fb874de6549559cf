"""What steers each row of a `generate` call by itself: temperature and seed, length, stop strings.

The call as a whole is greedy. A sampled row's next token is drawn by inverting its distribution function at a number in
[0, 1), and all numbers of a row are drawn before the call. So a seeded row's text does not depend on which requests it
shared the batch with, and drawing costs a few operations per step over the whole batch, whatever seeds are in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from services.captioner.engines.base import CaptionRequest
from services.captioner.engines.hf_text import Transcript

_NO_TOKEN = -1


class RowSampler(LogitsProcessor):
    """(B, V) scores -> scores whose argmax is each row's next token. `width`: columns of the prompt."""

    def __init__(self, requests: Sequence[CaptionRequest], width: int, device: torch.device) -> None:
        #: (B,) rows whose scores were not numbers at some step; never read before the call ends
        self.broken = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self._width = width
        temperatures = torch.tensor([request.temperature for request in requests], dtype=torch.float32)
        self._all_greedy = bool((temperatures <= 0).all())
        self._none_greedy = bool((temperatures > 0).all())
        if self._all_greedy:
            return
        self._greedy = (temperatures <= 0).unsqueeze(1).to(device)
        self._temperatures = temperatures.clamp_min(1e-4).unsqueeze(1).to(device)
        steps = max(request.max_tokens for request in requests)
        self._numbers = torch.stack([_numbers(request, steps) for request in requests]).to(device)  # (B, steps)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The largest score is a number unless some score is NaN or +inf, or all are -inf.
        self.broken |= ~scores.amax(dim=1).isfinite()
        if self._all_greedy:
            return scores
        cumulative = (scores / self._temperatures).softmax(dim=1).cumsum(dim=1)
        step = input_ids.shape[1] - self._width
        # The first token whose cumulative probability is greater: one of probability 0 is never that.
        drawn = torch.searchsorted(cumulative, self._numbers[:, step : step + 1] * cumulative[:, -1:], right=True)
        chosen = torch.full_like(scores, float("-inf")).scatter_(1, drawn.clamp_(max=scores.shape[1] - 1), 0.0)
        return chosen if self._none_greedy else torch.where(self._greedy, scores, chosen)


def _numbers(request: CaptionRequest, steps: int) -> torch.Tensor:
    """(steps,) uniform on [0, 1), the same for a seed on every device; without a seed, new ones."""
    if request.seed is None or request.temperature <= 0:
        return torch.rand(steps)
    return torch.rand(steps, generator=torch.Generator().manual_seed(request.seed))


class RowLimits(StoppingCriteria):
    """Ends each row at its own max_tokens, or where it is `broken` (B,). `limits` (B,) counts from column `width`."""

    def __init__(self, limits: torch.Tensor, width: int, broken: torch.Tensor) -> None:
        self._limits, self._width, self._broken = limits, width, broken

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (self._limits <= input_ids.shape[1] - self._width) | self._broken


class RowWatch(StoppingCriteria):
    """Hands each new token of the watched rows (row -> transcript) to their transcripts and ends a row that has met a
    stop string. This waits for the device at every token, so it is used only where a request needs it."""

    def __init__(self, transcripts: Mapping[int, Transcript], broken: torch.Tensor) -> None:
        self._open = dict(transcripts)
        self._broken, self._over = broken, torch.zeros_like(broken)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._open:
            tokens = input_ids[:, -1].masked_fill(self._broken, _NO_TOKEN).tolist()
            for row in [row for row, transcript in self._open.items() if transcript.add(tokens[row])]:
                del self._open[row]
                self._over[row] = True
        return self._over
