"""Where bfloat16 is faster than float32."""

import torch
from torch import nn


def bf16_pays(tower: nn.Module, device: torch.device) -> bool:
    """Should this tower be trained under bf16 autocast on the device? On a GPU that has it: yes. On a CPU with bf16
    instructions (AVX512-BF16, AMX): where the work is in matrix products. ViT-B-32 on such a CPU trains 3 times faster
    (docs/log.md); EfficientNet, whose depthwise convolutions have no such kernels backwards, is 1.4 times slower. On
    other CPUs bf16 is emulated and loses."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in tower.modules())
    return bool(able.get("avx512_bf16") or able.get("amx_bf16")) and convolutions <= 1  # a ViT has one, for its patches
