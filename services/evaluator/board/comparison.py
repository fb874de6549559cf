"""Two rows of a leaderboard against each other, image by image. Shapes: N images, S seeds, R resamples."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from services.evaluator.board.correctness import BitsCache, Floats, Pairing, Run, Seeds, matrix, pair
from services.evaluator.board.leaderboard import Header
from services.evaluator.board.leaderboard_query import runs_of_row
from services.evaluator.board.significance import TwoWay
from shared.errors import InvalidInput, NotFound
from shared.schemas.common import Split
from shared.schemas.evaluations import Comparison, Head
from shared.web.auth import Principal

RESAMPLES = 2000


def bootstrap(found: TwoWay, rng: np.random.Generator, resamples: int = RESAMPLES) -> Floats:
    """(R,) differences, as they might have come out with other images and other seeds.

    Images and seeds are crossed factors, and both are resampled (Owen, "The pigeonhole bootstrap", Annals of Applied
    Statistics 1, 2007), but not as cells of one table, which would count what is common to an image and a seed three
    times: images are drawn with replacement, with their means over seeds, which hold it once; to that the effect of
    other seeds is added. As drawing from three seeds gives but ten results, it is drawn by the parametric bootstrap:
    normal, its variance what remains of var_seeds, itself as uncertain as so few seeds leave it (of_seeds chi2-like
    with S - 1 degrees of freedom), when var_both is taken off."""
    values, counts = np.unique(found.images, return_counts=True)  # few, so that drawing N images is one multinomial
    n = len(found.images)
    drawn: Floats = rng.multinomial(n, counts / n, size=resamples) @ values / n
    for sample in found.seeds:
        df = sample.seeds - 1
        variance = sample.of_seeds * df / rng.chisquare(df, resamples) - sample.of_both
        drawn += rng.standard_normal(resamples) * np.sqrt(np.maximum(variance, 0.0))
    return drawn


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    p_value: float


def interval(found: TwoWay, rng: np.random.Generator, resamples: int = RESAMPLES) -> Interval:
    """95 %, by the quantiles; and the two-sided p-value of a difference of 0."""
    drawn = bootstrap(found, rng, resamples)
    if not drawn.any():
        return Interval(0.0, 0.0, 1.0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Interval(float(low), float(high), min(1.0, 2 * (beyond + 1) / (resamples + 1)))


class Comparer:
    """Remembers what evaluations got right."""

    def __init__(self) -> None:
        self._bits = BitsCache()

    def compare(
        self, session: Session, who: Principal, dataset_id: str, head: Header, split: Split, kind: Head, a: str, b: str
    ) -> Comparison:
        """Raises NotFound for a row that there is not, InvalidInput where the two cannot be compared."""
        read = {id: runs_of_row(session, who, dataset_id, head.fingerprint, split, kind, id) for id in (a, b)}
        for name, id in (("a", a), ("b", b)):
            _usable(read[id], name, id, split)
        if read[a][0]["scored_as"] != read[b][0]["scored_as"]:
            raise InvalidInput(
                f"{a} and {b} were scored on different states of the data set; evaluate the older one again",
                code="data_differs",
                param="b",
            )
        bits = self._bits.get(session, (run["evaluation_id"] for runs in read.values() for run in runs))
        right = {id: matrix([_run(run) for run in runs], bits) for id, runs in read.items()}
        of_a, of_b = right[a], right[b]
        if of_a is None or of_b is None or of_a[1].shape[1] != of_b[1].shape[1]:
            raise InvalidInput(
                f"{a} and {b} were not scored on the same images; evaluate their classifiers again",
                code="images_differ",
                param="b",
            )
        # In one order whichever is called a: the same draws, so that a and b swapped give exactly the opposite.
        swapped = a > b
        first, second = (of_b, of_a) if swapped else (of_a, of_b)
        untrained = [read[id][0]["protocol"] == "zero_shot" for id in ((b, a) if swapped else (a, b))]
        found = _compare(first, second, untrained)
        if swapped:
            found = found | {
                **{"mean_a": found["mean_b"], "mean_b": found["mean_a"]},
                **{"difference": -found["difference"], "low": -found["high"], "high": -found["low"]},
                **{"only_a": found["only_b"], "only_b": found["only_a"]},
            }
        return Comparison(dataset_id=dataset_id, split=split, a=a, b=b, resamples=RESAMPLES, **found)


def _compare(a: tuple[list[Seeds], Floats], b: tuple[list[Seeds], Floats], untrained: list[bool]) -> dict[str, Any]:
    paired = pair(a, b, untrained[0], untrained[1], least=1)
    only_a, only_b = _exclusive(paired)
    mean_a, mean_b = float(paired.a.mean()), float(paired.b.mean())
    seed = hashlib.sha256(paired.a.tobytes() + paired.b.tobytes()).digest()[:8]
    found = interval(paired.difference(), np.random.default_rng(int.from_bytes(seed)))
    return {
        **{"images": paired.a.shape[1], "pairs": paired.pairs, "mean_a": mean_a, "mean_b": mean_b},
        **{"difference": mean_a - mean_b, "low": found.low, "high": found.high, "p_value": found.p_value},
        **{"only_a": only_a, "only_b": only_b},
    }


def _exclusive(paired: Pairing) -> tuple[float, float]:
    """Shares of (pair of runs, image) that a got right and b wrong, and the other way (McNemar's off-diagonal)."""
    if paired.how == "runs":
        a, b = paired.a.mean(0), paired.b.mean(0)
    else:
        a, b = paired.a, paired.b
    return float((a * (1 - b)).mean()), float((b * (1 - a)).mean())


def _usable(runs: list[dict[str, Any]], param: str, id: str, split: Split) -> None:
    if not runs:
        raise NotFound(f"there is no row '{id}' on the '{split}' split of this data set's leaderboard", param=param)
    if lacking := [run["id"] for run in runs if run["evaluation_id"] is None]:
        raise InvalidInput(
            f"no predictions were kept of {', '.join(lacking[:5])}, scored by an earlier version; evaluate again",
            code="no_predictions",
            param=param,
        )


def _run(row: dict[str, Any]) -> Run:
    return Run((row["seed"], row["shot_seed"]), 0.0, row["evaluation_id"])
