"""Images of the store as pixels, by a model's own preprocessing. Each is decoded once: the row cache keeps it by its
SHA-256 for every run and worker whose model sees the same pixels. Shapes: N images, B of them, S pixels a side."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from shared.clip.loading import LoadedClip, preprocess_uint8
from shared.datasets.images import decode
from shared.db.models import Image
from shared.row_cache import RowCache
from shared.store.storage import Store

CHUNK = 64  # images between two reports, and in one write to the cache
IN_MEMORY_BYTES = 4 * 2**30  # of one split; more is read from the cache batch by batch
_VERSION = 1  # raise when `decode` or `preprocess_uint8` change what they give


def load_pixels(
    cache: RowCache | None,
    store: Store,
    images: Sequence[Image],
    clip: LoadedClip,
    on_chunk: Callable[[int], None],
    *,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> "Tensor | Pixels":
    """-> (N, 3, S, S) uint8 in the order given: a Tensor where it takes at most `in_memory_bytes`, else `Pixels`, whose
    rows are by then in the cache. `on_chunk(done)` is called every 64 images and may raise. Raises NotFound for an
    image that the store has lost, InvalidInput for one that can't be decoded."""
    pixels = Pixels(cache, store, [image.sha256 for image in images], clip)
    if pixels.nbytes > in_memory_bytes:
        pixels.fill_cache(on_chunk)
        return pixels
    tensor = torch.empty(pixels.shape, dtype=torch.uint8)
    for start in range(0, len(images), CHUNK):
        on_chunk(start)
        pixels.read_into(tensor[start : start + CHUNK], start)
    return tensor


class Pixels:
    """(N, 3, S, S) uint8 that need not fit into memory: `pixels[rows]` reads a batch from the cache, and decodes what
    it has lost. Safe between threads."""

    dtype = torch.uint8

    def __init__(self, cache: RowCache | None, store: Store, digests: Sequence[str], clip: LoadedClip) -> None:
        """digests: the images' SHA-256, in order."""
        self._cache, self._store, self._digests, self._clip = cache, store, list(digests), clip
        self._space = pixel_space(clip)
        self.shape = torch.Size((len(self._digests), 3, clip.image_size, clip.image_size))

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def nbytes(self) -> int:
        return self.shape.numel()

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """(B,) int64 indices, or a slice -> (B, 3, S, S) uint8, on the CPU."""
        wanted = list(range(len(self))[rows]) if isinstance(rows, slice) else rows.tolist()
        batch = torch.empty((len(wanted), *self.shape[1:]), dtype=torch.uint8)
        self._read(batch, [self._digests[i] for i in wanted])
        return batch

    def read_into(self, out: Tensor, start: int) -> None:
        """Fills `out` (B, 3, S, S) with the images from `start` on."""
        self._read(out, self._digests[start : start + len(out)])

    def fill_cache(self, on_chunk: Callable[[int], None]) -> None:
        """Decodes what the cache lacks, but no more than it has room for: the rest would only push out the first."""
        if self._cache is None:
            return
        room = self._cache.max_bytes // self.shape[1:].numel()
        for start in range(0, min(len(self), room), CHUNK):
            on_chunk(start)
            digests = self._digests[start : start + CHUNK]
            absent = self._cache.missing(self._space, digests)
            if absent:
                self._decode([digests[i] for i in absent])

    def _read(self, out: Tensor, digests: Sequence[str]) -> None:
        """Fills row i of `out` with the image of digests[i]."""
        left = set(range(len(digests)))
        flat = out.flatten(1).numpy()

        def take(i: int, row: memoryview) -> None:
            if len(row) == flat.shape[1]:
                flat[i] = np.frombuffer(row, np.uint8)
                left.discard(i)

        if self._cache is not None:
            self._cache.read(self._space, digests, take)
        if left:
            places = sorted(left)
            for i, tensor in zip(places, self._decode([digests[i] for i in places]), strict=True):
                out[i] = tensor

    def _decode(self, digests: Sequence[str]) -> list[Tensor]:
        """Each (3, S, S), decoded in parallel (PIL lets other threads run meanwhile) and put into the cache."""

        def one(digest: str) -> Tensor:
            return preprocess_uint8(decode(self._store.read_blob(digest)), self._clip)

        with ThreadPoolExecutor(_threads()) as pool:
            tensors = list(pool.map(one, digests))
        if self._cache is not None:
            rows = {digest: tensor.numpy().tobytes() for digest, tensor in zip(digests, tensors, strict=True)}
            self._cache.put_many(self._space, rows)
        return tensors


def pixel_space(clip: LoadedClip) -> str:
    """Where the cache keeps pixels as this model sees them."""
    return f"pixels-{_VERSION}-{clip.preprocessing_key}"


def _threads() -> int:
    """The cores this process may use, at most 16: by then the store is the slower side."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
