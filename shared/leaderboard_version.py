"""A number per data set that changes whenever its leaderboard may have: what the leaderboard's ETag is made of."""

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.db.models import LeaderboardVersion


def bump(session: Session, dataset_id: str) -> None:
    """In the transaction that changes scores, classifiers, tags, pins, or the data set's name, classes or fingerprint;
    near its end, as others that bump wait for it. Whoever reads the new number reads what was changed, too."""
    row = insert(LeaderboardVersion).values(dataset_id=dataset_id, version=1)
    session.execute(
        row.on_conflict_do_update(
            index_elements=[LeaderboardVersion.dataset_id], set_={"version": LeaderboardVersion.version + 1}
        )
    )
