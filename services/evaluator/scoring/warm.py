"""What a process keeps between jobs or requests: base models, and the cache of their embeddings."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from services.evaluator.settings import EvaluatorSettings
from shared.clip import LoadedClip, files_of, load_clip
from shared.config import CoreSettings
from shared.embedder import Embedder
from shared.row_cache import RowCache, open_cache

MODELS = 2  # base models in memory


@dataclass(frozen=True)
class Warm:
    """A base model on the device that scores, what embeds with it, and the cache of this machine's workers."""

    clip: LoadedClip
    embedder: Embedder
    cache: RowCache


def model(name: str, core: CoreSettings, settings: EvaluatorSettings) -> Warm:
    """Raises what `load_clip` does."""
    roots = tuple(core.model_roots)
    return _model(name, core.model_cache, roots, core.cache_bytes, place(settings), files_of(name, roots))


def cache(core: CoreSettings) -> RowCache:
    return open_cache(core.model_cache / "rows", core.cache_bytes)


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
    clip.model.to(device)
    rows = open_cache(model_cache / "rows", cache_bytes)
    return Warm(clip, Embedder(clip, rows, device), rows)


def place(settings: EvaluatorSettings) -> str:
    """The device as torch calls it."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device
