"""How long things are kept that nothing names, and what a run of the collector has removed."""

from dataclasses import dataclass, field

from shared.store.references import FORMS

DAY = 86_400.0
EVENTS, KEYS, UNFINISHED = "events", "idempotency keys", "unfinished writes"
_SHOWN = 20  # unknown keys that are listed


@dataclass(frozen=True)
class Retention:
    """Ages in seconds. unreferenced: of an object that no row names, since it was written. events: of a job's events,
    since the job ended. idempotency_keys: since the request; a later one with the same key is a new request. archives:
    of an uploaded archive, since its ingestion ended (nothing reads it any more); None: as long as its data set."""

    unreferenced: float = DAY
    events: float = 90 * DAY
    idempotency_keys: float = 30 * DAY
    archives: float | None = 30 * DAY


@dataclass
class Amount:
    """Rows or objects; a folder counts as one."""

    number: int = 0
    bytes: int = 0


@dataclass
class Collected:
    """removed: by kind of thing, all kinds; in a dry run what would be removed. unknown: keys that are none of ours and
    are left alone, the first few. postponed: objects that could not be removed now. complete: False where it was
    stopped."""

    dry_run: bool
    removed: dict[str, Amount] = field(
        default_factory=lambda: {kind: Amount() for kind in (*FORMS, UNFINISHED, EVENTS, KEYS)}
    )
    unknown: list[str] = field(default_factory=list)
    postponed: int = 0
    complete: bool = True

    def add(self, kind: str, number: int, size: int) -> None:
        self.removed[kind].number += number
        self.removed[kind].bytes += size

    def add_unknown(self, key: str) -> None:
        if len(self.unknown) < _SHOWN:
            self.unknown.append(key)

    def table(self) -> str:
        """For a terminal: kind, count, bytes."""
        rows = [("would go" if self.dry_run else "removed", "count", "bytes")]
        rows += [(kind, f"{each.number:,}", f"{each.bytes:,}") for kind, each in self.removed.items()]
        lines = [f"{kind:<18}{number:>12}{size:>20}" for kind, number, size in rows]
        lines += [f"unknown, left alone: {key}" for key in self.unknown]
        if self.postponed:
            lines.append(f"left for the next run: {self.postponed:,}")
        if not self.complete:
            lines.append("stopped before the end")
        return "\n".join(lines)
