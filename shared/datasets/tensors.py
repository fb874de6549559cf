"""Images of the store as tensors, by a model's own preprocessing."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from shared.clip import LoadedClip, preprocess_uint8
from shared.datasets.images import decode
from shared.db.models import Image
from shared.storage import Store

CHUNK = 64


def load_images(
    store: Store, images: Sequence[Image], clip: LoadedClip, on_chunk: Callable[[int], None], threads: int = 2
) -> Tensor:
    """-> (N, 3, S, S) uint8, in the order given. `on_chunk(done)` is called every 64 images and may raise."""

    def one(image: Image) -> Tensor:
        return preprocess_uint8(decode(store.read_blob(image.sha256)), clip)

    pixels = torch.empty(len(images), 3, clip.image_size, clip.image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(images), CHUNK):
            on_chunk(start)
            for i, tensor in enumerate(pool.map(one, images[start : start + CHUNK]), start):
                pixels[i] = tensor
    return pixels
