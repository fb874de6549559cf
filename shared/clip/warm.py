"""What a process keeps between jobs or requests: base models, and the cache of their embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from shared.clip.embedder import Embedder
from shared.clip.loading import LoadedClip, files_of, load_clip
from shared.config import CoreSettings
from shared.row_cache import RowCache, open_cache

MODELS = 2  # base models in memory


@dataclass(frozen=True)
class Warm:
    """A base model on the device, which training copies; what embeds with it; and the cache of this machine's
    workers."""

    clip: LoadedClip
    embedder: Embedder
    cache: RowCache


def warm_model(name: str, core: CoreSettings, device: torch.device) -> Warm:
    """Raises what `load_clip` does."""
    clip = warm_clip(name, core.model_cache, core.model_roots)
    clip.model.to(device)
    rows = row_cache(core)
    return Warm(clip, Embedder(clip, rows, device), rows)


def row_cache(core: CoreSettings) -> RowCache:
    return open_cache(core.model_cache / "rows", core.cache_bytes)


def warm_clip(name: str, model_cache: Path, model_roots: Sequence[Path]) -> LoadedClip:
    """Loaded once. Raises what `load_clip` does."""
    roots = tuple(model_roots)
    return _load(name, model_cache, roots, files_of(name, roots))


@lru_cache(maxsize=MODELS)
def _load(
    name: str,
    model_cache: Path,
    roots: tuple[Path, ...],
    files: tuple[tuple[str, int, int], ...],  # so that a directory whose weights were replaced is another model
) -> LoadedClip:
    return load_clip(name, model_cache, roots)


forget = _load.cache_clear  # gives the memory back
loaded = _load.cache_info


def place(device: str) -> torch.device:
    """The device that a setting names: "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
