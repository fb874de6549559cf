"""Progress on a terminal: one line that is redrawn, or plain lines where the output is no terminal."""

import sys
import time
from typing import Self, TextIO

from captune.printing import printable, printable_lines
from shared.schemas.common import JobEvent, Progress

WIDTH = 28


class ProgressBar:
    """Pass it to `Client.wait`. Use as a context manager; the line is finished when the block ends."""

    def __init__(self, label: str, out: TextIO = sys.stderr) -> None:
        self.label, self.out = printable(label), out
        self._began = time.monotonic()
        self._stage: str | None = None
        self._live = out.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self.out.write("\r\033[K")
            self.out.flush()

    def __call__(self, update: JobEvent | Progress) -> None:
        if isinstance(update, Progress):
            self._draw(update)
        elif update.level != "info":
            self.line(f"{self.label}: {update.level}: {update.message}")

    def line(self, text: str) -> None:
        self.out.write(("\r\033[K" if self._live else "") + printable_lines(text) + "\n")
        self.out.flush()

    def _draw(self, p: Progress) -> None:
        share = p.done / p.total if p.total else 0.0
        eta = "" if p.eta_seconds is None else f"  ETA {p.eta_seconds:.0f} s"
        stage = printable(p.stage)
        if self._live:
            bar = "█" * round(share * WIDTH)
            self.out.write(f"\r\033[K{self.label}: {stage} {bar:░<{WIDTH}} {p.done}/{p.total}{eta}")
            self.out.flush()
        elif p.stage != self._stage:  # a log gets one line per stage
            self.out.write(f"{self.label}: {stage} ({p.total}){eta}\n")
            self.out.flush()
        self._stage = p.stage

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began
