"""Requests encoded one by one -> batches: who may share one, and how they are joined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.captioner.engines.base import CaptionRequest
from services.captioner.engines.hf_text import Stream


@dataclass(frozen=True)
class Prepared:
    """One request as CPU tensors with a batch axis of 1."""

    request: CaptionRequest
    tensors: dict[str, torch.Tensor]
    conversation: list[dict[str, Any]]
    prompt_tokens: int  # with ...
    image_tokens: int  # ... those that stand for pictures
    image_keys: tuple[str, ...]  # of what the vision tower is given (hf_vision.unit_keys)
    stream: Stream | None


def bucket(prepared: Prepared) -> tuple[int, int, int]:
    """Powers of two of image tokens, prompt tokens and max_tokens: less than half of a batch is padding, and no row
    waits for one that may become twice as long. Small ones are one class, as there is little to win."""
    return (
        _octave(prepared.image_tokens, 64),
        _octave(prepared.prompt_tokens, 128),
        _octave(prepared.request.max_tokens, 32),
    )


def _octave(number: int, least: int) -> int:
    return (max(number, least) - 1).bit_length()


def join(prepared: Sequence[Prepared], pad_id: int) -> dict[str, torch.Tensor]:
    """Whatever runs along the tokens, (1, L), is padded on the left to (B, longest); everything else (pixels, grids) is
    stacked on its first axis, zero-padded where shapes differ."""
    joined: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for item in prepared for key in item.tensors):
        parts = [item.tensors[key] for item in prepared if key in item.tensors]
        along_tokens = all(
            key in item.tensors and item.tensors[key].shape == item.tensors["input_ids"].shape for item in prepared
        )
        target = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        fill = pad_id if key == "input_ids" else 0
        joined[key] = torch.cat([_pad(part, target, fill, left=along_tokens) for part in parts])
    return joined


def assert_left_padded(batch: dict[str, torch.Tensor]) -> None:
    assert bool(batch["attention_mask"][:, -1].all()), "prompts must be padded on the left"


def _pad(part: torch.Tensor, target: Sequence[int], fill: int, *, left: bool) -> torch.Tensor:
    """(n, *shape) -> (n, *target); new cells hold `fill` and lie before (`left`) or after the old ones."""
    if list(part.shape[1:]) == list(target):
        return part
    padded = part.new_full((part.shape[0], *target), fill)
    window = (slice(size - old, size) if left else slice(old) for old, size in zip(part.shape[1:], target, strict=True))
    padded[(slice(None), *window)] = part
    return padded
