"""Latency of an image, from its pixels to its scores: the median of several calls on a batch of 1 and on one of 32,
on the device that scores. It depends on the architecture and the machine, not on the weights, so a worker measures each
architecture once; decoding and resizing the file are not in it."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from services.evaluator.passes.base import OnStep
from shared.clip.loading import LoadedClip

_CALLS = {1: 11, 32: 3}  # batch -> timed calls, after one that warms up

_measured: dict[tuple[str, str, int], dict[int, float]] = {}  # (architecture, device, classes): ms per image by batch


class Cost:
    """logits: (B, 3, S, S) uint8 -> (B, C)."""

    def __init__(self, clip: LoadedClip, classes: int, logits: Callable[[Tensor], Tensor]) -> None:
        device = next(clip.model.parameters()).device
        self._key = json.dumps(clip.config["model_cfg"], sort_keys=True, default=str), str(device), classes
        self._device, self._size, self._logits = device, clip.image_size, logits
        self.detail: dict[str, Any] = {}

    def run(self, on_step: OnStep) -> Iterator[tuple[str, float]]:
        if self._key not in _measured:
            _measured[self._key] = {batch: self._milliseconds(batch, calls) for batch, calls in _CALLS.items()}
        found = _measured[self._key]
        self.detail = {
            "device": _name(self._device),
            "threads": torch.get_num_threads() if self._device.type == "cpu" else None,
            "latency_ms": {str(batch): round(value, 3) for batch, value in found.items()},
        }
        yield "latency_ms", found[1]

    def _milliseconds(self, batch: int, calls: int) -> float:
        pixels = torch.randint(0, 256, (batch, 3, self._size, self._size), dtype=torch.uint8)
        self._logits(pixels)
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            self._logits(pixels)  # on the CPU afterwards, so the device has finished
            times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times) / batch


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or "cpu"
