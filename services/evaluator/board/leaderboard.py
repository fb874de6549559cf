"""The leaderboard: runs that differ in nothing but their seeds make one row; one SQL query behind it.

Ranks are given within a validation protocol, never across: a run that chose its best epoch on a large val split is not
compared with one that had none. Methods that do not train chose nothing, so they stand in every protocol's ranking.
Rows that were scored on what the data set was before stand at the end, without a rank."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.orm import Session

from services.evaluator.board.correctness import Bits, BitsCache, Run
from services.evaluator.board.leaderboard_query import Asked, board_rows
from services.evaluator.board.ties import Contender, Ties
from services.evaluator.metrics import METRICS
from shared.db.models import Dataset, LeaderboardVersion
from shared.errors import InvalidInput, NotFound
from shared.schemas.evaluations import Leaderboard, LeaderboardRow
from shared.web.auth import Principal

FEW_SEEDS = 3


@dataclass(frozen=True)
class Header:
    """What one tiny query tells: enough to know whether a board has changed."""

    name: str
    fingerprint: str
    version: int


def header(session: Session | Connection, who: Principal, dataset_id: str) -> Header:
    """Raises NotFound, also where the data set is another owner's."""
    query = (
        select(Dataset.name, Dataset.fingerprint, LeaderboardVersion.version)
        .outerjoin(LeaderboardVersion, LeaderboardVersion.dataset_id == Dataset.id)
        .where(Dataset.id == dataset_id, who.sees(Dataset.owner))
    )
    found = session.execute(query).one_or_none()
    if found is None:
        raise NotFound(
            f"there is no data set '{dataset_id}' among yours; GET /v1/datasets lists them", param="dataset_id"
        )
    name, fingerprint, version = found
    return Header(name, fingerprint or "", version or 0)


def check(asked: Asked) -> None:
    """Raises InvalidInput for an unknown metric."""
    if asked.metric not in METRICS:
        raise InvalidInput(
            f"there is no metric '{asked.metric}'; choose one of: {', '.join(METRICS)}",
            code="unknown_metric",
            param="metric",
        )


class Board:
    """Reads leaderboards, and remembers what evaluations got right and which rows are tied."""

    def __init__(self) -> None:
        self._bits, self._ties = BitsCache(), Ties()

    def read(self, session: Session, who: Principal, asked: Asked, head: Header) -> Leaderboard:
        """One page. Raises InvalidInput where `after` is no row of this board."""
        metric = METRICS[asked.metric]
        found = board_rows(session, who, asked, head.fingerprint, metric.higher_is_better)
        if asked.after is not None and not any(row["id"] == asked.after for row in found):
            raise InvalidInput(
                f"there is no row '{asked.after}' on this board (any more); read it again from the start",
                code="unknown_row",
                param="after",
            )
        start = found[0]["start"] if found else 0
        page = [row for row in found if start < row["position"] <= start + asked.limit]
        more = any(row["position"] == start + asked.limit + 1 for row in found)
        tied = self._tied(session, asked.metric, found, page)
        rows = [_row(row, tied.get(row["id"])) for row in page]
        return Leaderboard(
            dataset_id=asked.dataset_id,
            dataset_name=head.name,
            data_fingerprint=head.fingerprint,
            split=asked.split,
            metric=asked.metric,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            rows=rows,
            has_more=more,
            last_id=rows[-1].id if rows else None,
        )

    def _tied(
        self, session: Session, metric: str, found: list[dict[str, Any]], page: list[dict[str, Any]]
    ) -> dict[str, bool | None]:
        """By row id, for the ranked rows of a page that are not the best."""
        best = {row["protocol"]: _contender(row) for row in found if row["best"] and not row["data_changed"]}
        rivals = {row["id"]: row for row in page if not row["best"] and not row["data_changed"]}
        pairs = {id: (best[row["protocol"]], _contender(row)) for id, row in rivals.items()}
        bits: dict[str, Bits] = {}
        if metric == "top1":
            unknown = [each for pair in pairs.values() if not self._ties.known(metric, *pair) for each in pair]
            bits = self._bits.get(session, (r.evaluation_id for each in unknown for r in each.runs if r.evaluation_id))
        return {id: self._ties.tied(metric, *pair, bits) for id, pair in pairs.items()}


def _contender(row: dict[str, Any]) -> Contender:
    runs = tuple(Run((seed, shots), value, evaluation) for _, seed, shots, value, evaluation, _ in row["runs"])
    return Contender(runs, row["untrained"])


def _row(row: dict[str, Any], tied: bool | None) -> LeaderboardRow:
    return LeaderboardRow(
        **{name: row[name] for name in LeaderboardRow.model_fields if name in row and name != "rank"},
        rank=None if row["data_changed"] else row["rank"],
        few_seeds=row["n"] < FEW_SEEDS and not row["untrained"],
        tied_with_best=tied,
        tags=sorted({tag for run in row["runs"] for tag in run[5]}),
        classifier_ids=[run[0] for run in row["runs"]],
    )
