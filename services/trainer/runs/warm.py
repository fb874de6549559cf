"""What a worker keeps in its process between jobs: base models, and where their embeddings and pixels are cached."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from services.trainer.settings import TrainerSettings
from shared.clip import LoadedClip, files_of, load_clip
from shared.config import CoreSettings
from shared.embedder import Embedder
from shared.row_cache import RowCache, open_cache

MODELS = 2  # base models in memory


@dataclass(frozen=True)
class Warm:
    """A base model on the CPU, which training copies; what embeds with it; and the cache of this machine's workers."""

    clip: LoadedClip
    embedder: Embedder
    cache: RowCache


def model(name: str, core: CoreSettings, settings: TrainerSettings) -> Warm:
    """Raises what `load_clip` does."""
    roots = tuple(core.model_roots)
    return _model(name, core.model_cache, roots, core.cache_bytes, str(place(settings)), files_of(name, roots))


@lru_cache(maxsize=MODELS)
def _model(
    name: str,
    model_cache: Path,
    roots: tuple[Path, ...],
    cache_bytes: int,
    device: str,
    files: tuple[tuple[str, int, int], ...],  # so that a directory whose weights were replaced is another model
) -> Warm:
    clip = load_clip(name, model_cache, roots)
    cache = open_cache(model_cache / "rows", cache_bytes)
    return Warm(clip, Embedder(clip, cache, device), cache)


def place(settings: TrainerSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def processes(settings: TrainerSettings) -> int:
    """How many GPUs a run is spread over: all there are, unless one is named or the operator says how many."""
    device = place(settings)
    if device.type != "cuda" or device.index is not None:
        return 1
    return min(settings.processes or torch.cuda.device_count(), torch.cuda.device_count())


def device_name(settings: TrainerSettings) -> str:
    """ "cpu", or the GPU's own name, and how many."""
    device = place(settings)
    if device.type != "cuda":
        return "cpu"
    count = processes(settings)
    return torch.cuda.get_device_name(device) + (f" x{count}" if count > 1 else "")
