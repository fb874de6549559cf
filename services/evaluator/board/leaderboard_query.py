"""The one SQL query behind the leaderboard.

A row is a setting (shared/settings_key.py) on what it was scored on: its runs differ in nothing but their seeds. What
else keeps runs apart is in the row's id: `<setting>`, then `.on-<data set>-<fingerprint>` where they were trained on
other data than they were scored on, `.was-<fingerprint>` where they were scored on what the data set was before, and
`.<protocol>` for a row that does not train and stands in another protocol's ranking.

The first half walks over every run that has the metric, by the covering indexes ix_scores_leaderboard and
ix_classifiers_leaderboard; the second half reads the rest for the rows of one page only."""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import TextClause, text
from sqlalchemy.orm import Session

from shared.schemas.common import Split
from shared.schemas.evaluations import Head
from shared.web.auth import Principal

ROW_PROTOCOLS = ("none", "few_shot", "full")

_OF_RUN = "e.classifier_id = c.id AND e.dataset_id = :dataset_id AND e.split = :split AND e.head = :head"
_SCORES = """JOIN scores s ON s.classifier_id = c.id
    AND s.dataset_id = :dataset_id AND s.split = :split AND s.head = :head AND s.metric = :metric"""
_JOINS = f"{_SCORES} LEFT JOIN evaluations e ON {_OF_RUN}"
_SCORED_AS = "coalesce(e.data_fingerprint, c.data_fingerprint)"  # scores older than `evaluations` have the one alone
# The same for all runs at once: most were scored on what the data set is now, and need not be joined to be known.
_CHANGED = f"{_SCORES} LEFT JOIN evaluations e ON {_OF_RUN} AND e.data_fingerprint <> :fingerprint"
_CHANGED_AS = f"""CASE WHEN e.id IS NOT NULL THEN e.data_fingerprint
    WHEN c.data_fingerprint = :fingerprint OR EXISTS (SELECT FROM evaluations e WHERE {_OF_RUN}) THEN :fingerprint
    ELSE c.data_fingerprint END"""  # nosec B608 # constants


def _row_id(scored_as: str) -> str:
    return f"""CASE
        WHEN c.dataset_id = :dataset_id AND c.data_fingerprint = :fingerprint AND ({scored_as}) = :fingerprint
            THEN c.setting
        ELSE c.setting
            || CASE WHEN c.dataset_id = :dataset_id AND c.data_fingerprint = ({scored_as}) THEN ''
                    ELSE '.on-' || c.dataset_id || '-' || left(c.data_fingerprint, 8) END
            || CASE WHEN ({scored_as}) = :fingerprint THEN '' ELSE '.was-' || left(({scored_as}), 8) END
        END"""  # the first case says nothing new: it is the usual one, told fast


_FILTERS = {
    # What reads no training images stands beside any number of shots.
    "shots": "(c.shots = :shots OR (c.protocol = 'zero_shot' AND c.shots IS NULL))",
    "model": "c.model = :model",
    "method": "c.method = :method",
    "captioner": "c.captioner = :captioner",
    "protocol": "c.protocol IN (:protocol, 'zero_shot')",
    "tag": ":tag = ANY (c.tags)",
    "group_id": "c.group_id = :group_id",
}
_QUERY = """
WITH per_seed AS (  -- a run repeated with the same seeds is not one more observation
    SELECT {row_of_all} AS row_id, (CAST(c.seed AS bigint) << 31) | c.shot_seed AS seeds, avg(s.value) AS value,
           min(c.protocol) AS protocol
    FROM classifiers c {changed}
    WHERE {visible} AND {wanted}
    GROUP BY 1, 2
), settings AS (
    SELECT row_id, min(protocol) AS protocol, row_id LIKE '%.was-%' AS data_changed,
           avg(value) AS mean, stddev_samp(value) / sqrt(count(*)) AS stderr, count(*) AS n
    FROM per_seed GROUP BY row_id
), protocols AS (
    SELECT DISTINCT protocol FROM settings WHERE protocol <> 'zero_shot' AND NOT data_changed
), placed AS (  -- what does not train is ranked in every protocol; what was scored on other data in none
    SELECT g.row_id || CASE WHEN p.protocol <> g.protocol THEN '.' || p.protocol ELSE '' END AS id, g.row_id,
           g.protocol = 'zero_shot' AS untrained, coalesce(p.protocol, g.protocol) AS protocol,
           g.data_changed, g.mean, g.stderr, g.n
    FROM settings g LEFT JOIN protocols p ON NOT g.data_changed AND g.protocol IN (p.protocol, 'zero_shot')
), ranked AS (
    SELECT *, rank() OVER (PARTITION BY data_changed, protocol ORDER BY mean * :direction DESC) AS rank,
           row_number() OVER (PARTITION BY data_changed, protocol ORDER BY mean * :direction DESC, id) = 1 AS best,
           row_number() OVER (ORDER BY data_changed, protocol, mean * :sorting DESC, id) AS position
    FROM placed
), page AS (  -- with the row before it, one after it, and the best of each protocol
    SELECT ranked.*, since.position AS start
    FROM ranked
    CROSS JOIN (SELECT coalesce((SELECT position FROM ranked WHERE id = :after), 0) AS position) since
    WHERE ranked.position BETWEEN since.position AND since.position + :limit + 1
       OR ranked.best AND NOT ranked.data_changed
)
SELECT page.*, d.*, m.metrics, c.model, c.method, c.captioner, c.shots, c.suffix, c.hyperparameters,
       c.details->'captions' AS captions, CASE WHEN page.row_id LIKE '%.on-%' THEN c.dataset_id END AS trained_on
FROM page
CROSS JOIN LATERAL (
    SELECT min(id) AS one_of_them, bool_or(pinned) AS pinned,
           avg(train_seconds) AS train_seconds, avg(caption_seconds) AS caption_seconds,
           json_agg(json_build_array(id, seed, shot_seed, value, evaluation_id, tags) ORDER BY id) AS runs,
           array_agg(id) AS ids, array_agg(weight) AS weights
    FROM (
        SELECT c.id, c.seed, c.shot_seed, s.value, e.id AS evaluation_id, c.tags, c.pinned,
               CAST(1 AS float) / count(*) OVER (PARTITION BY c.seed, c.shot_seed) AS weight,
               CAST(c.details->>'train_seconds' AS float) AS train_seconds,
               CAST(c.details->>'caption_seconds' AS float) AS caption_seconds
        FROM classifiers c {joins}
        WHERE c.dataset_id = coalesce(substring(page.row_id FROM '[.]on-([^-]+)-'), :dataset_id)
          AND c.setting = split_part(page.row_id, '.', 1) AND {row} = page.row_id AND {visible} AND {wanted}
    ) members
) d
CROSS JOIN LATERAL (
    SELECT json_object_agg(metric, mean) AS metrics
    FROM (
        SELECT s.metric, sum(s.value * run.weight) / sum(run.weight) AS mean
        FROM unnest(d.ids, d.weights) AS run (id, weight)
        JOIN scores s ON s.classifier_id = run.id
            AND s.dataset_id = :dataset_id AND s.split = :split AND s.head = :head
        GROUP BY s.metric
    ) each_metric
) m
JOIN classifiers c ON c.id = d.one_of_them
ORDER BY page.position
"""


@dataclass(frozen=True)
class Asked:
    """What a leaderboard is asked for. shots: a number, "full" (every training image), or None for all."""

    dataset_id: str
    metric: str = "top1"
    split: Split = "test"
    head: Head = "own"
    shots: int | Literal["full"] | None = None
    model: str | None = None
    method: str | None = None
    captioner: str | None = None
    protocol: str | None = None
    tag: str | None = None
    group_id: str | None = None
    order: Literal["best", "asc", "desc"] = "best"
    limit: int = 100
    after: str | None = None


def board_rows(
    session: Session, who: Principal, asked: Asked, fingerprint: str, higher_is_better: bool
) -> list[dict[str, Any]]:
    """The rows of a page in their order; among them, too, the one before it, one after it, and the best of each
    protocol, wherever it stands. `position` counts all rows from 1, `start` is that of `after`."""
    direction = 1 if higher_is_better else -1
    filters = {name: value for name in _FILTERS if (value := getattr(asked, name)) is not None}
    conditions = [
        "c.shots IS NULL" if value == "full" and name == "shots" else _FILTERS[name] for name, value in filters.items()
    ]
    parameters = {
        **_common(who, asked.dataset_id, fingerprint, asked.split, asked.head, asked.metric),
        **filters,
        "direction": direction,
        "sorting": {"best": direction, "desc": 1, "asc": -1}[asked.order],
        "after": asked.after,
        "limit": asked.limit,
    }
    _plan_for_these_values(session)
    found = session.execute(_statement(_QUERY, who, conditions), parameters)
    return [dict(row) for row in found.mappings()]


def runs_of_row(
    session: Session, who: Principal, dataset_id: str, fingerprint: str, split: Split, head: Head, row_id: str
) -> list[dict[str, Any]]:
    """Seeds, protocol and evaluation of each run of a leaderboard's row, oldest first; none where there is no such
    row. A row that stands in several protocols' rankings is the same row in each."""
    base, _, protocol = row_id.rpartition(".")
    query = """
        SELECT c.id, c.seed, c.shot_seed, c.protocol, e.id AS evaluation_id, {scored_as} AS scored_as
        FROM classifiers c {joins}
        WHERE c.setting = split_part(:row_id, '.', 1) AND {row} = :row_id AND {visible} AND {wanted}
        ORDER BY c.id"""
    parameters = _common(who, dataset_id, fingerprint, split, head, "top1")
    parameters["row_id"] = base if protocol in ROW_PROTOCOLS else row_id
    return [dict(row) for row in session.execute(_statement(query, who, []), parameters).mappings()]


def _common(who: Principal, dataset_id: str, fingerprint: str, split: Split, head: Head, metric: str) -> dict[str, Any]:
    names = {"dataset_id": dataset_id, "fingerprint": fingerprint, "split": split, "head": head, "metric": metric}
    return names if "admin" in who.scopes else {**names, "owner": who.owner}


def _statement(query: str, who: Principal, conditions: list[str]) -> TextClause:
    """Pinned rows pass every filter, whole."""
    visible = "true" if "admin" in who.scopes else "c.owner = :owner"
    pinned = f"""(c.setting, c.dataset_id, c.data_fingerprint) IN
        (SELECT c.setting, c.dataset_id, c.data_fingerprint FROM classifiers c
        WHERE c.pinned AND {visible})"""  # nosec B608 # constants
    wanted = f"({' AND '.join(conditions)} OR {pinned})" if conditions else "true"
    parts = {
        **{"row": _row_id(_SCORED_AS), "scored_as": _SCORED_AS, "joins": _JOINS},
        **{"row_of_all": _row_id(_CHANGED_AS), "changed": _CHANGED, "visible": visible, "wanted": wanted},
    }
    return text(query.format(**parts))


def _plan_for_these_values(session: Session) -> None:
    """psycopg prepares what it runs often. A plan for any data set would do for small ones only."""
    session.execute(text("SET LOCAL plan_cache_mode = force_custom_plan"))
