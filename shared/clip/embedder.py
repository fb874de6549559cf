"""Embeddings of a frozen model, each computed once: kept in the row cache for every run and worker with the same
weights. Shapes: N images, T texts, C classes, D embedding, P width of the image tower before its last projection."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.clip.loading import LoadedClip, encode_image, encode_tokens, normalise
from shared.clip.pixels import load_pixels, pixel_space
from shared.clip.projection import last_projection
from shared.db.models import Image
from shared.row_cache import RowCache
from shared.store.storage import Store

_IMAGES = 64  # decoded, encoded and written at a time
_TEXTS = 4096


class Embedder:
    """All results float32 on the CPU. The model is moved to `device` when something must be computed, and stays there.
    Embeddings of a CPU and of a GPU differ in the last digits, so they are kept apart."""

    def __init__(self, clip: LoadedClip, cache: RowCache | None, device: str | torch.device = "cpu") -> None:
        self.clip, self._cache, self._device = clip, cache, torch.device(device)

    def images(self, store: Store, images: Sequence[Image], on_chunk: Callable[[int], None]) -> Tensor:
        """(N, D), L2-normalised. `on_chunk(done)` is called every 64 images and may raise."""
        width = int(self.clip.config["model_cfg"]["embed_dim"])
        return self._of_images("images", width, store, images, on_chunk, lambda pixels: encode_image(self.clip, pixels))

    def unprojected(self, store: Store, images: Sequence[Image], on_chunk: Callable[[int], None]) -> Tensor:
        """(N, P): what the image tower's last projection is given. Raises InvalidInput for a tower without one."""
        projection = last_projection(self.clip)

        def compute(pixels: Tensor) -> Tensor:
            parts = [part.to(self._device) for part in torch.split(pixels, 64)]
            rows = [projection.unprojected(self.clip.model, normalise(part, self.clip)).float() for part in parts]
            return torch.cat(rows).cpu()

        width = projection.weight.shape[1 if projection.of_layer else 0]
        return self._of_images("unprojected", width, store, images, on_chunk, compute)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(T, D), L2-normalised. Equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            raise ValueError("no texts to encode")
        parts = []
        for start in range(0, len(distinct), _TEXTS):
            # By tokens: what the model sees, whichever tokenizer made them.
            tokens = self.clip.tokenizer(distinct[start : start + _TEXTS])
            keys = [sha256(row.numpy().tobytes()).hexdigest() for row in tokens]
            parts.append(self._rows("texts", keys, partial(_encode, self.clip, tokens)))
        place = {text: i for i, text in enumerate(distinct)}
        return torch.cat(parts)[torch.tensor([place[text] for text in texts])]

    def class_means(self, texts_by_class: Sequence[Sequence[str]]) -> Tensor:
        """(C, D): each class's normalised mean of its texts' normalised embeddings, a text counting as often as it
        occurs. Every class needs a text."""
        flat = self.texts([text for texts in texts_by_class for text in texts])
        means = [part.mean(0) for part in torch.split(flat, [len(texts) for texts in texts_by_class])]
        return F.normalize(torch.stack(means), dim=-1)

    @cached_property
    def _revision(self) -> str:
        """Of everything an embedding depends on besides the input: weights, activation, how an image becomes pixels,
        normalisation, device."""
        config = json.dumps(self.clip.config, sort_keys=True)
        of = f"{self.clip.revision} {config} {pixel_space(self.clip)} {self._device.type}"
        return sha256(of.encode()).hexdigest()[:32]

    def _of_images(
        self,
        what: str,
        width: int,
        store: Store,
        images: Sequence[Image],
        on_chunk: Callable[[int], None],
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        parts = [torch.empty(0, width)]
        for start in range(0, len(images), _IMAGES):
            on_chunk(start)
            part = images[start : start + _IMAGES]

            def encode(positions: Sequence[int], part: Sequence[Image] = part) -> Tensor:
                pixels = load_pixels(self._cache, store, [part[i] for i in positions], self.clip, lambda _: None)
                assert isinstance(pixels, Tensor)  # so few always fit
                return compute(pixels)

            parts.append(self._rows(what, [image.sha256 for image in part], encode))
        return torch.cat(parts)

    def _rows(self, what: str, keys: Sequence[str], compute: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """(len(keys), width), at least one: from the cache, or by `compute(positions)`, once for equal keys."""
        space = f"embeddings-{what}-{self._revision}" if self._cache else ""
        kept = self._cache.get_many(space, keys) if self._cache else [None] * len(keys)
        found = zip(keys, kept, strict=True)
        rows = {key: torch.frombuffer(bytearray(row), dtype=torch.float32) for key, row in found if row}
        absent = {key: i for i, key in enumerate(keys) if key not in rows}
        if absent:
            self.clip.model.to(self._device)
            fresh = dict(zip(absent, compute(list(absent.values())), strict=True))
            rows |= fresh
            if self._cache:
                self._cache.put_many(space, {key: row.numpy().tobytes() for key, row in fresh.items()})
        return torch.stack([rows[key] for key in keys])


def _encode(clip: LoadedClip, tokens: Tensor, positions: Sequence[int]) -> Tensor:
    return encode_tokens(clip.model, tokens[list(positions)])
