"""Which rows of a leaderboard cannot be told from the best of their protocol, at 95 %.

By top1 with the two-way clustered standard error over images and seeds (significance.py). By any other metric, or where
no predictions were kept, with a paired t-test over the seeds that both rows have, else Welch's."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np

from services.evaluator.board.correctness import Bits, Floats, Run, matrix, pair
from services.evaluator.board.significance import LEVEL, t_test, welch_test

CACHED_PAIRS = 100_000


class Contender(NamedTuple):
    """A row: its runs, and whether it is of a method that does not train, so that seeds are nothing to it."""

    runs: tuple[Run, ...]
    untrained: bool

    @property
    def seeds(self) -> int:
        return len({run.seeds for run in self.runs})


class Ties:
    """Remembers what it computed: a pair of rows changes only when an evaluation is added to one."""

    def __init__(self, pairs: int = CACHED_PAIRS) -> None:
        self._pairs = pairs
        self._found: OrderedDict[tuple[str, Contender, Contender], bool | None] = OrderedDict()
        self._lock = Lock()

    def known(self, metric: str, best: Contender, row: Contender) -> bool:
        with self._lock:
            return (metric, best, row) in self._found

    def tied(self, metric: str, best: Contender, row: Contender, bits: Mapping[str, Bits]) -> bool | None:
        """None where nothing tells. `bits`: of the runs' evaluations; not looked at where the pair is known."""
        key = (metric, best, row)
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        p = p_value(metric, best, row, bits)
        found = None if p is None else p >= LEVEL
        with self._lock:
            self._found[key] = found
            if len(self._found) > self._pairs:
                self._found.popitem(last=False)
        return found


def p_value(metric: str, a: Contender, b: Contender, bits: Mapping[str, Bits]) -> float | None:
    """Two-sided, of no difference. None where a trained row has but one seed: how much seeds matter is not known."""
    if any(not each.untrained and each.seeds < 2 for each in (a, b)):
        return None
    if metric == "top1":
        of_a, of_b = matrix(a.runs, bits), matrix(b.runs, bits)
        if of_a is not None and of_b is not None and of_a[1].shape[1] == of_b[1].shape[1]:
            return pair(of_a, of_b, a.untrained, b.untrained, least=2).difference().p_value
    if a.untrained and b.untrained:
        return None
    values_a, values_b = _per_seed(a.runs), _per_seed(b.runs)
    if a.untrained or b.untrained:
        one, many = (values_a, values_b) if a.untrained else (values_b, values_a)
        return t_test(_array(many.values()) - float(np.mean(list(one.values()))))
    if len(common := sorted(values_a.keys() & values_b.keys())) >= 2:
        return t_test(np.array([values_a[each] - values_b[each] for each in common]))
    return welch_test(_array(values_a.values()), _array(values_b.values()))


def _per_seed(runs: Sequence[Run]) -> dict[tuple[int, int], float]:
    found: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        found.setdefault(run.seeds, []).append(run.value)
    return {seeds: float(np.mean(values)) for seeds, values in found.items()}


def _array(values: object) -> Floats:
    return np.array(list(values), dtype=np.float64)  # type: ignore[call-overload]
