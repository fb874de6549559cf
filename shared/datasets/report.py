"""What an ingest tells its user: which files were refused and why, and what else is worth knowing."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_LISTED = 1_000
_MAX_PATH_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Refusal:
    """One file that was left out. `path` is as found in the archive, made printable."""

    path: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about the data set as a whole that does not stop it."""

    code: str
    message: str


@dataclass(slots=True)
class Report:
    """Bounded: the first 1,000 refusals in full, all of them counted per code."""

    refusals: list[Refusal] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    skipped: int = 0  # operating system litter such as .DS_Store, not worth a line each
    notices: list[Notice] = field(default_factory=list)

    def refuse(self, path: str, code: str, message: str) -> None:
        self.refused[code] += 1
        if len(self.refusals) < MAX_LISTED:
            self.refusals.append(Refusal(printable(path), code, message))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, safe for a PostgreSQL jsonb column."""
        return {
            "refused": dict(sorted(self.refused.items())),
            "refused_total": self.refused.total(),
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "skipped": self.skipped,
            "notices": [asdict(notice) for notice in self.notices],
        }


def printable(path: str) -> str:
    """Control characters and lone surrogates (neither may go into JSON for PostgreSQL) as `?`, long names cut."""
    shown = "".join(c if c.isprintable() else "?" for c in path[: _MAX_PATH_SHOWN + 1])
    return shown if len(shown) <= _MAX_PATH_SHOWN else shown[: _MAX_PATH_SHOWN - 1] + "…"


def listed(names: list[str], limit: int = 5, count: int | None = None) -> str:
    """`a, b, c and 4 more` for messages. `count`: of all, where `names` are only the first ones."""
    count = len(names) if count is None else count
    shown = ", ".join(printable(name) for name in names[:limit])
    return shown if count <= limit else f"{shown} and {count - limit} more"
