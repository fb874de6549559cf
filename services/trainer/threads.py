"""How many threads small fits take."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_IMAGES = 256  # for each thread: with fewer, threads wait for one another longer than they work


@contextmanager
def threads_for(images: int) -> Iterator[None]:
    """As many of torch's threads inside as fits on so many images' features keep busy. On 2 cores shared with other
    processes, ProLIP on 48 images took 1.2 s with 1 thread and 33 s with 2: each of its short operations ends when the
    last thread has had its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, images // _IMAGES)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
