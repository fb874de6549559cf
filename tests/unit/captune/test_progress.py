"""Progress: one line redrawn on a terminal, a line per stage in a log."""

import io

from captune.progress import ProgressBar
from shared.schemas.common import JobEvent, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def updates(bar: ProgressBar) -> None:
    for done in (0, 5, 10):
        bar(Progress(stage="training", done=done, total=10, eta_seconds=10.0 - done))
    bar(Progress(stage="saving", done=0, total=0))


def test_a_log_gets_a_line_per_stage() -> None:
    out = io.StringIO()
    with ProgressBar("run", out) as bar:
        updates(bar)
    assert out.getvalue() == "run: training (10)  ETA 10 s\nrun: saving (0)\n"


def test_a_terminal_shows_share_and_eta_on_one_line() -> None:
    out = Terminal()
    with ProgressBar("run", out) as bar:
        updates(bar)
    assert "\n" not in out.getvalue()
    half = next(part for part in out.getvalue().split("\r\033[K") if "5/10" in part)
    assert half == f"run: training {'█' * 14}{'░' * 14} 5/10  ETA 5 s"
    assert out.getvalue().endswith("\r\033[K"), "the line is cleared at the end"


def test_warnings_are_kept_and_other_events_are_not() -> None:
    out = io.StringIO()
    bar = ProgressBar("run", out)
    for level in ("info", "warning"):
        event = {"seq": 1, "level": level, "type": "t", "message": f"a {level}", "created_at": 0}
        bar(JobEvent.model_validate(event))
    assert out.getvalue() == "run: warning: a warning\n"
