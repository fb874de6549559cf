"""What every pass looks like."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

OnStep = Callable[[int, int], None]  # done and total steps of a pass; may raise to stop it
SEED = 0  # of every sample below: the same images for every classifier


class Pass(Protocol):
    detail: dict[str, Any]

    def run(self, on_step: OnStep) -> Iterator[tuple[str, float]]: ...


def sample(count: int, limit: int) -> list[int]:
    """At most `limit` places of 0..count-1, drawn evenly by SEED, in ascending order."""
    if count <= limit:
        return list(range(count))
    return sorted(np.random.default_rng(SEED).choice(count, limit, replace=False).tolist())
