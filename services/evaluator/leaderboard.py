"""The leaderboard: runs that differ in nothing but their seeds make one row; one SQL query behind it.

Ranks are given within a validation protocol, never across: a run that chose its best epoch on a large val split is not
compared with one that had none. Methods that do not train chose nothing, so they stand in every protocol's ranking."""

import csv
import io
import json
from typing import Literal

from sqlalchemy import text
from sqlalchemy.orm import Session

from services.evaluator.metrics import METRICS
from shared.auth import Principal
from shared.db.models import Dataset
from shared.errors import InvalidInput
from shared.schemas.common import Split
from shared.schemas.evaluations import Leaderboard, LeaderboardRow

FEW_SEEDS = 3

# Groups are keyed by `setting`: all that a user chose but the seeds. `untrained` runs have the protocol "zero_shot".
_QUERY = text("""
WITH runs AS (
    SELECT c.id, c.protocol, c.method, c.model, c.captioner, c.shots, c.hyperparameters, c.suffix, c.seed, c.shot_seed,
           (c.details->>'train_seconds')::float AS train_seconds,
           jsonb_build_array(c.protocol, c.method, c.model, c.captioner, c.shots, c.hyperparameters, c.suffix,
                             c.details->'captions') AS setting
    FROM classifiers c
    WHERE c.dataset_id = :dataset_id AND c.data_fingerprint = :fingerprint AND (:admin OR c.owner = :owner)
      AND (CAST(:shots AS int) IS NULL OR c.shots = :shots OR c.protocol = 'zero_shot')
      AND (NOT :full_only OR c.shots IS NULL)
), per_seed AS (  -- a run repeated with the same seeds is not one more observation
    SELECT r.setting, r.seed, r.shot_seed, s.metric, avg(s.value) AS value
    FROM runs r JOIN scores s ON s.classifier_id = r.id AND s.split = :split
    GROUP BY r.setting, r.seed, r.shot_seed, s.metric
), per_metric AS (
    SELECT setting, metric, avg(value) AS mean, stddev_samp(value) / sqrt(count(*)) AS stderr, count(*) AS n
    FROM per_seed GROUP BY setting, metric
), metrics AS (
    SELECT setting, jsonb_object_agg(metric, mean) AS metrics FROM per_metric GROUP BY setting
), settings AS (
    SELECT setting, min(protocol) AS protocol, min(method) AS method, min(model) AS model,
           min(captioner) AS captioner, min(shots) AS shots, min(suffix) AS suffix,
           avg(train_seconds) AS train_seconds, array_agg(id ORDER BY id) AS classifier_ids
    FROM runs WHERE EXISTS (
        SELECT 1 FROM scores s WHERE s.classifier_id = runs.id AND s.split = :split AND s.metric = :metric)
    GROUP BY setting
), protocols AS (
    SELECT DISTINCT protocol FROM settings WHERE protocol <> 'zero_shot'
    UNION ALL
    SELECT 'zero_shot' WHERE NOT EXISTS (SELECT 1 FROM settings WHERE protocol <> 'zero_shot')
)
SELECT p.protocol, g.method, g.model, g.captioner, g.shots, g.setting->5 AS hyperparameters, g.suffix,
       nullif(g.setting->7, 'null') AS captions,
       m.n, m.mean, m.stderr, (m.n < :few_seeds AND g.protocol <> 'zero_shot') AS few_seeds,
       k.metrics, g.train_seconds, g.classifier_ids,
       rank() OVER (PARTITION BY p.protocol ORDER BY m.mean * :direction DESC) AS rank
FROM settings g
JOIN protocols p ON p.protocol = g.protocol OR g.protocol = 'zero_shot'
JOIN per_metric m ON m.setting = g.setting AND m.metric = :metric
JOIN metrics k ON k.setting = g.setting
ORDER BY p.protocol, rank, g.method, g.classifier_ids
""")


def read(
    session: Session,
    who: Principal,
    dataset: Dataset,
    *,
    metric: str,
    split: Split,
    shots: int | Literal["full"] | None,
) -> Leaderboard:
    """Raises InvalidInput for an unknown metric. `shots`: a number, "full" (every training image), or None for all."""
    if metric not in METRICS:
        raise InvalidInput(
            f"there is no metric '{metric}'; choose one of: {', '.join(METRICS)}", code="unknown_metric", param="metric"
        )
    higher = METRICS[metric].higher_is_better
    found = session.execute(
        _QUERY,
        {
            "dataset_id": dataset.id,
            "fingerprint": dataset.fingerprint,
            "admin": "admin" in who.scopes,
            "owner": who.owner,
            "metric": metric,
            "split": split,
            "shots": shots if isinstance(shots, int) else None,
            "full_only": shots == "full",
            "few_seeds": FEW_SEEDS,
            "direction": 1 if higher else -1,
        },
    )
    return Leaderboard(
        dataset_id=dataset.id,
        dataset_name=dataset.name,
        data_fingerprint=dataset.fingerprint or "",
        split=split,
        metric=metric,
        higher_is_better=higher,
        rows=[LeaderboardRow.model_validate(dict(row)) for row in found.mappings()],
    )


def to_csv(board: Leaderboard) -> str:
    """One line per row; lists and objects as JSON."""
    names = list(LeaderboardRow.model_fields)
    out = io.StringIO()
    writer = csv.DictWriter(out, ["dataset_id", "split", "metric", *names])
    writer.writeheader()
    for row in board.rows:
        cells = {k: _cell(v) for k, v in row.model_dump().items()}
        writer.writerow({"dataset_id": board.dataset_id, "split": board.split, "metric": board.metric, **cells})
    return out.getvalue()


def _cell(value: object) -> object:
    """A spreadsheet must not run a user's text as a formula."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
