"""How captions reach the database: many rows a statement, as one JSON parameter (measured: 12 µs of this process's CPU
a row, links included; an executemany takes 23 µs without them)."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, text
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from shared.db.models import Caption, CaptionJobItem

#: id, image_id, key, characteristic, text, clip_tokens, flags, provenance; `excluded` where true; and `replaces`
Row = dict[str, Any]

# In the order of the unique index, so that two jobs on the same images lock alike and never each other out.
_INSERT = """
    INSERT INTO captions
        (id, owner, dataset_id, image_id, key, characteristic, text, clip_tokens, flags, provenance, excluded)
    SELECT
        id, :owner, :dataset_id, image_id, key, characteristic, text, clip_tokens, flags, provenance,
        coalesce(excluded, false)
    FROM json_to_recordset(CAST(:rows AS json)) AS new(
        id text, image_id text, key text, characteristic text, text text, clip_tokens int, flags text[],
        provenance jsonb, excluded bool
    )
    ORDER BY image_id, key
"""
_ADD = text(_INSERT + "ON CONFLICT (image_id, key) DO NOTHING")
_REPLACE = text(
    _INSERT
    + """
    ON CONFLICT (image_id, key) DO UPDATE SET
        characteristic = EXCLUDED.characteristic, text = EXCLUDED.text, clip_tokens = EXCLUDED.clip_tokens,
        flags = EXCLUDED.flags, provenance = EXCLUDED.provenance, version = captions.version + 1,
        original_text = NULL, edited_by = NULL, excluded = EXCLUDED.excluded
    RETURNING id
    """  # nosec B608 # constants
)
# In one order, the same as of the passes over a job's captions, so that none locks another out.
_HOLD = text("""
    SELECT FROM caption_job_items WHERE caption_id = ANY(CAST(:ids AS text[])) ORDER BY caption_id, job_id FOR UPDATE
""")
_FORGET = text("""
    UPDATE caption_job_items SET flags = '{}', agreement = NULL
    WHERE caption_id = ANY(CAST(:ids AS text[])) AND (flags <> '{}' OR agreement IS NOT NULL)
""")
_LINK = text("""
    INSERT INTO caption_job_items (job_id, caption_id)
    SELECT :job_id, captions.id
    FROM unnest(CAST(:images AS text[]), CAST(:keys AS text[])) AS written(image_id, key)
    JOIN captions USING (image_id, key)
    UNION
    SELECT :job_id, unnest(CAST(:links AS text[]))
    ON CONFLICT DO NOTHING
""")


def write(
    session: Session, *, job_id: str, owner: str, dataset_id: str, rows: Sequence[Row], links: Sequence[str]
) -> int:
    """Stores the rows and makes them, and the captions named by `links`, the job's. Returns how many rows were new or
    replaced; one that another job wrote meanwhile is kept, and becomes this job's too."""
    written = 0
    where = {"owner": owner, "dataset_id": dataset_id}
    if new := [row for row in rows if not row["replaces"]]:
        result = session.execute(_ADD, where | {"rows": json.dumps(new)})
        assert isinstance(result, CursorResult)
        written += result.rowcount
    if others := [row for row in rows if row["replaces"]]:
        replaced = session.scalars(_REPLACE, where | {"rows": json.dumps(others)}).all()
        forget_comparisons(session, replaced)
        written += len(replaced)
    session.execute(
        _LINK,
        {
            "job_id": job_id,
            "images": [row["image_id"] for row in rows],
            "keys": [row["key"] for row in rows],
            "links": list(links),
        },
    )
    return written


def forget_comparisons(session: Session, caption_ids: Sequence[str]) -> None:
    """What jobs said of these captions among their others belonged to texts that were replaced. Call after the texts
    are changed, in the same transaction. Locked first, so that what a pass writes at the same time is seen here, or
    the new text there."""
    session.execute(_HOLD, {"ids": list(caption_ids)})
    session.execute(_FORGET, {"ids": list(caption_ids)})


def unlink_other_revisions(session: Session, job_id: str, revision: str, *, only_own: bool) -> None:
    """After the model was replaced while the job ran: what it has of the one before is asked for again, so it does not
    count. The captions stay, for whoever serves that model again. `only_own`: leave what was taken over."""
    other = select(Caption.id).where(Caption.provenance["revision"].astext != revision)
    if only_own:
        other = other.where(Caption.provenance["job_id"].astext == job_id)
    session.execute(
        delete(CaptionJobItem).where(
            CaptionJobItem.job_id == job_id,
            other.where(Caption.id == CaptionJobItem.caption_id).exists(),
        )
    )
