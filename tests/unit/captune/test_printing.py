"""What others wrote is shown in a terminal and does nothing there."""

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from captune import Client, cli
from captune.printing import printable, printable_lines
from captune.progress import ProgressBar
from shared.schemas.common import JobEvent, Progress
from tests.unit.captune.commands.test_leaderboard import page
from tests.unit.captune.test_client import CAPTION, JOB
from tests.unit.captune.test_progress import Terminal
from tests.unit.captune.test_tables import PREVIEW, row

ROOT = Path(__file__).resolve().parents[3]
EVIL = "x\x1b]0;pwned\x07\x1b[2J\x9b31m\x7f\r\u202ey"
SHOWN = "x?]0;pwned??[2J?31m???y"
PROBLEM = {"title": "no", "status": 404, "code": "not_found", "detail": f"there is no '{EVIL}'"}
DATASET = {
    **{"id": "ds_1", "status": "succeeded", "created_at": 0, "name": EVIL, "domain": EVIL, "archive_sha256": "0"},
    **{"archive_bytes": 1, "split_seed": 0, "val_fraction": 0.1, "test_fraction": 0.2},
    "classes": [{"name": "cat", "display_name": EVIL, "count": 1}],
    "report": {"notices": [{"message": EVIL}], "refusals": [{"path": EVIL, "message": EVIL}]},
}
FAILED = {"status": "failed", "error": {"code": "failed", "message": EVIL}}
GROUP = {
    **{"id": "grp_1", "name": EVIL, "dataset_id": "ds_1", "status": "finished", "runs": 1, "scored": 1},
    **{"counts": {"succeeded": 1}, "leaderboard": "/", "created_at": 0},
}
REPORT = {
    **{"caption_job_id": "cap_1", "images": 1, "captions": 1, "excluded": 0, "edited": 0, "flags": {"empty": 1}},
    **{"characteristics": {EVIL: 1}, "budget": 77, "tokens": [], "words_mean": 1.0, "distinct_1": 1.0},
    **{"distinct_2": 1.0, "distinct_sample": 1, "agreement": None, "examples": {"empty": [CAPTION | {"text": EVIL}]}},
}


def listed(*rows: Any) -> dict[str, Any]:
    return {"data": rows, "has_more": False, "last_id": None}


def answer(request: httpx.Request) -> httpx.Response:
    """As a server would whose every user is up to no good."""
    asked = f"{request.method} {request.url.path.removeprefix('/v1/')}"
    evil = row(method=EVIL, model=EVIL, suffix=EVIL)
    if request.url.params.get("format") == "csv":
        return httpx.Response(200, text=f"a,{EVIL}\r\nb,c\r\n")
    bodies: dict[str, Any] = {
        "GET datasets": listed(DATASET),
        "GET datasets/ds_1": DATASET,
        "POST datasets": DATASET,
        "PATCH datasets/ds_1": DATASET,
        "GET leaderboard": page([evil]) | {"dataset_name": EVIL},
        "GET datasets/ds_1/captions": listed(CAPTION | {"text": EVIL, "path": EVIL}),
        "POST caption_jobs": JOB | FAILED,
        "POST caption_jobs/preview": PREVIEW
        | {"path": EVIL, "examples": [{"characteristic": EVIL, "prompt": EVIL, "text": EVIL, "clip_tokens": 1}]},
        "GET caption_jobs/cap_1/report": REPORT,
        "GET fine_tuning/groups": listed(GROUP),
    }
    if asked not in bodies:
        return httpx.Response(404, json=PROBLEM)
    return httpx.Response(200, json=bodies[asked])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """All that a command prints."""
    made = Client.__init__

    def connect(self: Client, *_: Any, **__: Any) -> None:
        made(self, "http://server", "key")
        self._http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))

    monkeypatch.setattr(Client, "__init__", connect)

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            cli.main(list(arguments))
        printed = capsys.readouterr()
        return printed.out + printed.err

    return call


@pytest.mark.parametrize(
    "command",
    [
        "datasets list",
        "datasets push {file} --domain x",
        "datasets rename-classes ds_1 cat=x",
        "datasets rm ds_9",
        "leaderboard ds_1",
        "leaderboard ds_1 --format csv",
        "captions list ds_1",
        "captions report cap_1",
        "caption ds_1",
        "caption ds_1 --dry-run",
        "groups list",
    ],
)
def test_no_escape_sequence_reaches_the_terminal(run: Callable[..., str], command: str, tmp_path: Path) -> None:
    file = tmp_path / "some.zip"
    file.write_bytes(b"")
    shown = run(*(part.format(file=file) for part in command.split()))
    assert SHOWN in shown
    assert {c for c in shown if not c.isprintable()} <= {"\n", "\r"}
    assert shown.count("\r") == shown.count("\r\n") == 2 * ("csv" in command), "only a CSV's own line ends"


@pytest.mark.parametrize("command", ["datasets show ds_1", "datasets list --json", "leaderboard ds_1 --format json"])
def test_json_reads_back_as_it_was_and_is_printable(run: Callable[..., str], command: str) -> None:
    shown = run(*command.split())
    assert all(c.isprintable() or c == "\n" for c in shown)
    found = json.loads(shown)
    found = found[0] if isinstance(found, list) else found
    assert found.get("name", found.get("dataset_name")) == EVIL


def test_a_name_is_one_line_and_a_text_is_more() -> None:
    assert printable("a\nb\r\nc é 猫 ±") == "a?b??c é 猫 ±"
    assert printable_lines("a\tb\nc\r\nd\re") == "a?b\nc\r\nd?e"


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_progress_shows_what_others_wrote(out: io.StringIO) -> None:
    bar = ProgressBar(EVIL, out)
    bar(JobEvent.model_validate({"seq": 1, "level": "error", "type": "t", "message": EVIL, "created_at": 0}))
    bar(Progress(stage=EVIL, done=0, total=0))
    said, drawn = out.getvalue().replace("\r\033[K", "").splitlines()
    assert said == f"{SHOWN}: error: {SHOWN}"
    assert drawn.startswith(f"{SHOWN}: {SHOWN} ")


def test_nothing_is_printed_past_it() -> None:
    """Else the next command would forget it."""
    files = {*(ROOT / "captune").rglob("*.py"), ROOT / "services" / "embedded" / "demo.py"}
    past = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted(files - {ROOT / "captune" / "printing.py"})
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr == "stdout")
    ]
    assert past == []
