"""A file system of fsspec's that is not a disk of ours, whose failures are told in words.

What goes wrong between here and an object store has no common kind: s3fs raises PermissionError, OSError with an errno
of its choice, botocore's own errors and aiohttp's."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared.errors import Unavailable, from_disk

log = logging.getLogger(__name__)

WRITING = frozenset({"pipe_file", "put_file"})


@contextmanager
def answering(*, writing: bool) -> Iterator[None]:
    """Raises Unavailable where the object store does not do what it is asked to. That there is no such object is an
    answer to who reads or deletes; to who writes it means that there is no such bucket."""
    try:
        yield
    except Exception as error:
        if isinstance(error, Unavailable) or (isinstance(error, FileNotFoundError) and not writing):
            raise
        log.error("the object store failed", exc_info=error)
        # A copy is made on a disk of ours, which may be full.
        raise (isinstance(error, OSError) and from_disk(error)) or Unavailable(
            "the object store does not answer, or refuses; try again, and if it lasts, tell whoever runs the server: "
            "its log has the reason",
            code="storage_failed",
            retry_after=10,
        ) from error


class Remote:
    """Every call of `fs` under `answering`. A file that `open` returns is not: who writes it says so."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)

        @functools.wraps(found)
        def call(*arguments: Any, **named: Any) -> Any:
            with answering(writing=name in WRITING):
                return found(*arguments, **named)

        return call
