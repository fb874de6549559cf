"""Something that goes on in a process of its own while a benchmark measures."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def beside(work: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """`work` never ends by itself."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    try:
        time.sleep(2.0)  # until it has imported
        yield
    finally:
        process.terminate()
        process.join()
