"""Do picture and caption agree, in a CLIP's eyes?

CLIPScore (Hessel et al. 2021): 2.5 * max(cosine, 0) of the image and "A photo depicts " + caption, the paper's prefix.
Captune's own prefix, "a photo of a {class}.", is left away on purpose: the class name would carry most of the
similarity, so a wrong caption of the right class would pass, and the picture would always rank before those of other
classes. The scale is the model's: scores of two CLIPs do not compare, and the starter's are low (its text side never
saw a picture).

Self-retrieval: the place of the caption's own picture among all pictures of the job, by the same cosine."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.clip.embedder import Embedder
from shared.clip.loading import LoadedClip, encode_text
from shared.clip.warm import warm_clip
from shared.db.models import Image
from shared.row_cache import RowCache
from shared.store.storage import Store

log = logging.getLogger(__name__)

PREFIX = "A photo depicts "
WEIGHT = 2.5
_EMBEDDINGS = 16_384  # compared at a time
_EQUAL = 1e-6  # cosines closer than this are a tie: equal pictures do not outrank each other
_FREE_BYTES = 4 * 2**30  # a caption model may own the device; with less than this to spare the CPU does it


@dataclass(frozen=True)
class Agreement:
    clip_score: float
    rank: int  # 1: no other picture of the job suits the text better

    def low(self, images: int) -> bool:
        """Do more than half of the job's other pictures suit the text better?"""
        return 2 * (self.rank - 1) > images - 1


def clip_for_measuring(model: str, cache_dir: Path, model_roots: Sequence[Path]) -> LoadedClip:
    """The CLIP on the device that has room for it. Raises what `load_clip` raises."""
    clip = warm_clip(model, cache_dir, model_roots)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    device = "cuda" if free > _FREE_BYTES else "cpu"
    log.info("measuring agreement on %s: %.1f GiB of a GPU free", device, free / 2**30)
    clip.model.to(device)
    return clip


@torch.no_grad()
def agreements(clip: LoadedClip, images: Tensor, texts: Sequence[str], own: Sequence[int]) -> list[Agreement]:
    """One per text. images: (M, D), rows of length 1; own: the row of each text's picture."""
    device = next(clip.model.parameters()).device
    encoded = encode_text(clip, [PREFIX + text for text in texts]).to(device)
    rows = torch.as_tensor(own)
    cosines = (encoded * images[rows].to(device)).sum(1)
    better = torch.zeros(len(texts), dtype=torch.long, device=device)
    for part in torch.split(images, _EMBEDDINGS):
        better += (encoded @ part.to(device).T > cosines[:, None] + _EQUAL).sum(1)
    scores = (WEIGHT * cosines.clamp(min=0)).tolist()
    return [Agreement(round(score, 4), int(n) + 1) for score, n in zip(scores, better.tolist(), strict=True)]


def embed(
    store: Store,
    images: Sequence[Image],
    clip: LoadedClip,
    on_chunk: Callable[[int], None],
    cache: RowCache | None = None,
) -> Tensor:
    """(N, D) float32 on the CPU, rows of length 1, in the order given. `on_chunk(done)` is called every 64 images and
    may raise."""
    return Embedder(clip, cache, next(clip.model.parameters()).device).images(store, images, on_chunk)
