"""Which images the runs of a leaderboard's row got right. Shapes: N images, S seeds."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.evaluator.board import significance
from services.evaluator.board.significance import TwoWay
from shared.db.models import Evaluation

Floats = NDArray[np.float64]
Seeds = tuple[int, int]  # training seed, shot seed
CACHE_BYTES = 64 * 2**20


class Run(NamedTuple):
    """One scored classifier of a row. (A tuple: compared and hashed often.)"""

    seeds: Seeds
    value: float
    evaluation_id: str | None


@dataclass(frozen=True)
class Bits:
    """packed: one bit per image, ordered by path."""

    images: int
    packed: bytes


class BitsCache:
    """What evaluations got right, by their id: it never changes, so it is read from the database once."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._found: OrderedDict[str, Bits] = OrderedDict()
        self._lock = Lock()

    def get(self, session: Session, ids: Iterable[str]) -> dict[str, Bits]:
        """Those of `ids` that there are."""
        wanted = set(ids)
        with self._lock:
            known = {id: self._found[id] for id in wanted if id in self._found}
            for id in known:
                self._found.move_to_end(id)
        missing = sorted(wanted - known.keys())
        if not missing:
            return known
        query = select(Evaluation.id, Evaluation.images, Evaluation.correct).where(Evaluation.id.in_(missing))
        read = {id: Bits(images, correct) for id, images, correct in session.execute(query)}
        with self._lock:
            for id, bits in read.items():
                self._bytes += 0 if id in self._found else len(bits.packed)
                self._found[id] = bits
            while self._bytes > self._max_bytes:
                self._bytes -= len(self._found.popitem(last=False)[1].packed)
        return known | read


def matrix(runs: Sequence[Run], bits: Mapping[str, Bits]) -> tuple[list[Seeds], Floats] | None:
    """The runs' seeds, sorted, and (S, N) whether each image was classified right. Runs with the same seeds are
    averaged. None where a run has no predictions, or the runs do not have as many images."""
    by_seeds: dict[Seeds, list[Floats]] = {}
    for run in runs:
        found = bits.get(run.evaluation_id or "")
        if found is None:
            return None
        right = np.unpackbits(np.frombuffer(found.packed, np.uint8), count=found.images).astype(np.float64)
        by_seeds.setdefault(run.seeds, []).append(right)
    if len(lengths := {len(right) for each in by_seeds.values() for right in each}) != 1 or 0 in lengths:
        return None
    seeds = sorted(by_seeds)
    return seeds, np.stack([np.mean(by_seeds[each], axis=0) for each in seeds])


@dataclass(frozen=True)
class Pairing:
    """Two rows brought together: a (S_a, N), b (S_b, N). `how`: "seeds", the same ones in the same order;
    "without_seeds", one of them or both have none (methods that do not train); "runs", every run with every run."""

    a: Floats
    b: Floats
    how: str

    @property
    def pairs(self) -> int:
        return len(self.a) * len(self.b) if self.how == "runs" else max(len(self.a), len(self.b))

    def difference(self) -> TwoWay:
        """a - b"""
        test = significance.unpaired if self.how == "runs" else significance.paired
        return test(self.a, self.b)


def pair(
    a: tuple[list[Seeds], Floats], b: tuple[list[Seeds], Floats], a_untrained: bool, b_untrained: bool, least: int
) -> Pairing:
    """By the seeds both have, if those are at least `least`."""
    (seeds_a, rows_a), (seeds_b, rows_b) = a, b
    if a_untrained or b_untrained:
        rows_a = rows_a.mean(0, keepdims=True) if a_untrained else rows_a
        return Pairing(rows_a, rows_b.mean(0, keepdims=True) if b_untrained else rows_b, "without_seeds")
    common = sorted(set(seeds_a) & set(seeds_b))
    if len(common) < least:
        return Pairing(rows_a, rows_b, "runs")
    of_a, of_b = [seeds_a.index(each) for each in common], [seeds_b.index(each) for each in common]
    return Pairing(rows_a[of_a], rows_b[of_b], "seeds")
