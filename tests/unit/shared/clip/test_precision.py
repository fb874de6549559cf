"""shared/clip/precision.py: which tower is trained in bf16 where."""

import pytest
import torch
from torch import nn

from shared.clip.precision import bf16_pays

TRANSFORMER = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Linear(8, 8))  # patches, then matrix products
CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("able", "tower", "pays"),
    [
        ({"avx512_bf16": True}, TRANSFORMER, True),
        ({"amx_bf16": True}, TRANSFORMER, True),
        ({"avx512_bf16": True, "amx_bf16": True}, CONVOLUTIONS, False),
        ({"avx512_bf16": False, "avx512_f": True}, TRANSFORMER, False),
        ({}, TRANSFORMER, False),
    ],
)
def test_on_a_cpu(able: dict[str, bool], tower: nn.Module, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert bf16_pays(tower, torch.device("cpu")) is pays


@pytest.mark.parametrize("supported", [True, False])
def test_on_a_gpu_its_own_word_counts(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert bf16_pays(CONVOLUTIONS, torch.device("cuda")) is supported
