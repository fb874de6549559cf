"""What is scored: a classifier or a bare model, in three ways that give the same numbers. On the base model's own
weights embeddings come from the cache; where only the last projection was changed, from cached features before it;
otherwise the images go through the model. Shapes: N images, T texts, C classes, D embedding, S pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.classifier.card import read_card
from shared.classifier.folder import check_base, load_classifier, read_changed, read_head
from shared.classifier.head import Head
from shared.clip.loading import LoadedClip, encode_image, encode_text, normalise
from shared.clip.pixels import load_pixels
from shared.clip.projection import last_projection
from shared.clip.templates import photo_of
from shared.clip.warm import Warm
from shared.db.models import Image
from shared.row_cache import RowCache
from shared.store.storage import Store

OnChunk = Callable[[int], None]  # images done so far; may raise to stop
_CHUNK = 256  # images that go through the model between two reports


class Subject(ABC):
    """`clip`: the model, whose weights are those scored except where the last projection was changed."""

    clip: LoadedClip

    @abstractmethod
    def images(self, store: Store, images: Sequence[Image], on_chunk: OnChunk) -> Tensor:
        """-> (N, D) float32 on the CPU, rows of length 1."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """-> (T, D) float32 on the CPU, rows of length 1."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8, as `preprocess_uint8` gives them -> (N, D), as `images` does but nothing is cached."""

    def zero_shot(self, display_names: Sequence[str]) -> Head:
        """The classes by "a photo of a {class}."."""
        scale = float(self.clip.model.logit_scale.detach().exp())
        return Head.of_prototypes(self.texts([photo_of(name) for name in display_names]), scale)


class OnBase(Subject):
    """The base model as it is."""

    def __init__(self, warm: Warm) -> None:
        self.clip, self._embedder = warm.clip, warm.embedder

    def images(self, store: Store, images: Sequence[Image], on_chunk: OnChunk) -> Tensor:
        return self._embedder.images(store, images, on_chunk)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self._embedder.texts(texts)

    def embed(self, pixels: Tensor) -> Tensor:
        return encode_image(self.clip, pixels)


class OnProjection(OnBase):
    """The base model with another last projection in its image tower: `weight`, stored like the model's."""

    def __init__(self, warm: Warm, weight: Tensor) -> None:
        super().__init__(warm)
        self._projection, self._weight = last_projection(warm.clip), weight

    def images(self, store: Store, images: Sequence[Image], on_chunk: OnChunk) -> Tensor:
        return self._project(self._embedder.unprojected(store, images, on_chunk))

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        device = self._projection.weight.device
        inputs = normalise(pixels.to(device), self.clip)
        return self._project(self._projection.unprojected(self.clip.model, inputs).float())

    def _project(self, unprojected: Tensor) -> Tensor:
        weight = self._projection.weight
        projected = self._projection.project(unprojected.to(weight), self._weight.to(weight))
        return F.normalize(projected.float(), dim=-1).cpu()


class OnOwn(Subject):
    """A model of its own. Pixels are cached, embeddings are not: nobody asks for them again."""

    def __init__(self, clip: LoadedClip, cache: RowCache) -> None:
        self.clip, self._cache = clip, cache

    def images(self, store: Store, images: Sequence[Image], on_chunk: OnChunk) -> Tensor:
        parts = []
        for start in range(0, len(images), _CHUNK):

            def report(done: int, start: int = start) -> None:
                on_chunk(start + done)

            pixels = load_pixels(self._cache, store, images[start : start + _CHUNK], self.clip, report)
            parts.append(encode_image(self.clip, pixels))
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return encode_text(self.clip, texts)

    def embed(self, pixels: Tensor) -> Tensor:
        return encode_image(self.clip, pixels)


def open_subject(
    folder: Path, load_base: Callable[[str], Warm], cache: RowCache, device: str
) -> tuple[Subject, Head, list[str]]:
    """The classifier in a folder: what embeds, its head, and its class names. Raises what `load_classifier` does."""
    card = read_card(folder)
    if card.weights == "base":
        base = load_base(card.base_model)
        check_base(card, base.clip)
        head = read_head(folder, card, base.clip)
        if not card.changed:
            return OnBase(base), head, card.class_names
        if card.changed == [last_projection(base.clip).name]:
            changed = read_changed(folder, card, base.clip)
            return OnProjection(base, changed[card.changed[0]]), head, card.class_names
    loaded = load_classifier(folder, device, lambda name: load_base(name).clip)
    return OnOwn(loaded.clip, cache), loaded.head, card.class_names
