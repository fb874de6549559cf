"""What a run computes on."""

import torch

from services.trainer.settings import TrainerSettings
from shared.clip.warm import place


def processes(settings: TrainerSettings) -> int:
    """How many GPUs a run is spread over: all there are, unless one is named or the operator says how many."""
    device = place(settings.device)
    if device.type != "cuda" or device.index is not None:
        return 1
    return min(settings.processes or torch.cuda.device_count(), torch.cuda.device_count())


def device_name(settings: TrainerSettings) -> str:
    """ "cpu", or the GPU's own name, and how many."""
    device = place(settings.device)
    if device.type != "cuda":
        return "cpu"
    count = processes(settings)
    return torch.cuda.get_device_name(device) + (f" x{count}" if count > 1 else "")
