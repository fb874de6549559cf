"""Whether the store holds what the rows name: the proof of a restored backup."""

import hashlib
from collections.abc import Iterator
from itertools import islice

from sqlalchemy import text

from shared.core import Core
from shared.errors import NotFound
from shared.store.references import every_key

BATCH = 500


def check(core: Core) -> Iterator[str]:
    """A line for each object that a row needs and that is missing, or a picture whose bytes are not those of its
    SHA-256. Reads every picture; what is deleted meanwhile may show."""
    with core.db.snapshot() as session:
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))  # to read what lies there takes long
        keys = every_key(session)
        while batch := list(islice(keys, BATCH)):
            missing = set(core.store.missing(batch))
            for key in batch:
                if key in missing:
                    yield f"missing: {key}"
                elif key.startswith("blobs/") and not _whole(core, key):
                    yield f"damaged: {key}"


def _whole(core: Core, key: str) -> bool:
    try:
        return hashlib.sha256(core.store.read_bytes(key)).hexdigest() == key.rpartition("/")[2]
    except NotFound:
        return False
