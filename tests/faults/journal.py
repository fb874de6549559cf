"""What the driver asked of the system and what it was told: the oracle's ground truth. JSON lines, each on disk before
the driver goes on, so that a driver that dies leaves it too."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

Entry = dict[str, Any]


@dataclass
class Submission:
    """A POST that makes a job, by its Idempotency-Key, and what became of it. expect: what the oracle may hold the job
    to (see load.py). body: as JSON, or the form's fields."""

    key: str
    kind: str
    expect: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    acknowledged: list[str] = field(default_factory=list)  # the id that each 202 named
    refused: str | None = None  # the code of a 4xx that is final


class Journal:
    def __init__(self, path: Path | None = None) -> None:
        """path: appended to; None keeps it in memory."""
        self.entries: list[Entry] = []
        self._lock = threading.Lock()
        self._file = None if path is None else path.open("a")

    def add(self, what: str, **more: Any) -> None:
        entry = {"at": round(time.time(), 3), "what": what, **more}
        with self._lock:
            self.entries.append(entry)
            if self._file is not None:
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @classmethod
    def read(cls, path: Path) -> Self:
        journal = cls()
        journal.entries = [json.loads(line) for line in path.read_text().splitlines()]
        return journal

    def of(self, *whats: str) -> Iterator[Entry]:
        with self._lock:
            found = [entry for entry in self.entries if entry["what"] in whats]
        return iter(found)

    def submissions(self) -> dict[str, Submission]:
        """By key, in the order they were first sent."""
        found: dict[str, Submission] = {}
        for entry in self.of("sent", "acknowledged", "refused"):
            if entry["what"] == "sent":
                found.setdefault(entry["key"], Submission(entry["key"], entry["kind"], entry["expect"], entry["body"]))
            elif entry["what"] == "acknowledged":
                found[entry["key"]].acknowledged.append(entry["id"])
            else:
                found[entry["key"]].refused = entry["code"]
        return found

    def acknowledged(self) -> dict[str, Submission]:
        """By id."""
        return {id: each for each in self.submissions().values() for id in each.acknowledged}

    def deleted(self) -> set[str]:
        """Data sets whose deletion was acknowledged."""
        return {entry["id"] for entry in self.of("deleted") if entry["status"] == 204}

    def maybe_deleted(self) -> set[str]:
        """Also those whose deletion was asked for, and the answer lost."""
        return {entry["id"] for entry in self.of("deleting")}
