"""`captune up` as a process: what it prints and writes, what it refuses, and that it leaves nothing behind."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from captune import Client
from services.embedded.processes import marked, running_in
from tests.e2e import pictures
from tests.e2e.waiting import finished, succeeded, until

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]
MARK = "CAPTUNE_E2E"  # in the environment of every process a test starts, and so of all that those start
EXPECTED = {"api", "worker-ingest", "worker-caption", "worker-fine_tune", "worker-evaluate", "reconciler", "collector"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "captune.cli", *arguments]


@dataclass
class Up:
    """A `captune up` on a state directory of its own."""

    process: subprocess.Popen[str]
    state_dir: Path
    mark: str
    output: Path

    @property
    def connection(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.state_dir / "connection.json").read_text())
        return found

    def client(self) -> Client:
        return Client(state_dir=self.state_dir)

    def living(self) -> set[int]:
        return marked({MARK: self.mark})

    def ready(self) -> "Up":
        def said() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return "Stop with Ctrl-C." in self.output.read_text()

        until("captune up is ready", said, 120)
        return self

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(40)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Up]]:
    """Starts `captune up`; whatever a failed test leaves is killed at the end."""
    marks = []

    def begin(state_dir: Path | None = None, port: int = 0) -> Up:
        state_dir = state_dir or tmp_path_factory.mktemp("up") / "state"
        marks.append(uuid4().hex)
        output = state_dir.parent / f"{marks[-1]}.log"
        with output.open("w") as out:
            process = subprocess.Popen(
                command("up", "--port", str(port)),
                cwd=ROOT,
                env={
                    **os.environ,
                    MARK: marks[-1],
                    "CAPTUNE_STATE_DIR": str(state_dir),
                    "CAPTUNE_METRICS_PORT": "9100",
                },
                stdout=out,
                stderr=subprocess.STDOUT,
                # As in a terminal: a test run that a script put in the background hands down an ignored Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                text=True,
            )
        return Up(process, state_dir, marks[-1], output)

    yield begin
    for mark in marks:
        for pid in marked({MARK: mark}):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def running(start: Callable[..., Up]) -> Iterator[Up]:
    up = start().ready()
    yield up
    assert up.end(signal.SIGTERM) == 0
    assert not up.living(), "SIGTERM leaves nothing"


def test_it_says_where_it_is_and_who_may_use_it(running: Up) -> None:
    printed = running.output.read_text()
    assert running.connection["url"] in printed
    assert running.connection["api_key"] in printed
    assert f"{running.connection['url']}/docs" in printed
    assert str(running.state_dir) in printed
    file = running.state_dir / "connection.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_client_and_cli_find_it_by_its_state_directory(running: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTUNE_STATE_DIR", str(running.state_dir))
    with Client() as found:
        assert found.url == running.connection["url"]
        assert {method.name for method in found.methods()} >= {"mmft", "flyp", "zero_shot"}
    done = subprocess.run(
        command("datasets", "list"), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_listens_on_this_machine_only(running: Up) -> None:
    port = int(running.connection["url"].rpartition(":")[2])
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_its_processes_share_no_metrics_port_and_keep_few_heaps(running: Up) -> None:
    """The port is for containers: here the first would have it, and the others crash and be started again for ever.
    Each of glibc's heaps keeps what it once grew to."""
    python = {pid for pid in running.living() if Path(f"/proc/{pid}/comm").read_text().strip() == "python"}
    services = python - {running.process.pid}
    assert len(services) >= len(EXPECTED)
    assert services <= marked({MARK: running.mark, "CAPTUNE_METRICS_PORT": "0", "MALLOC_ARENA_MAX": "2"})


def test_a_second_one_on_the_same_state_directory_is_refused(running: Up) -> None:
    second = subprocess.run(
        command("up", "--port", "0", "--state-dir", str(running.state_dir)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert str(running.state_dir) in second.stderr
    assert "--state-dir" in second.stderr
    assert "Traceback" not in second.stderr
    with running.client() as client:
        client.methods()  # the first one is unharmed


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            command("up", "--port", str(port), "--state-dir", str(tmp_path / "state")),
            cwd=ROOT,
            env={**os.environ, MARK: str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"port {port} is in use" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert not marked({MARK: str(tmp_path)})
    assert not (tmp_path / "state" / "connection.json").exists()


def test_killed_postgres_and_valkey_are_started_again_and_the_rest_survives(running: Up, tmp_path: Path) -> None:
    def servers() -> set[int]:
        """PostgreSQL's first process, and Valkey's."""
        first = int((running.state_dir / "postgres" / "postmaster.pid").read_text().split()[0])
        return {first} | running_in(running.state_dir / "valkey", {"valkey-server"})

    def others() -> set[int]:
        return {pid for pid in running.living() if Path(f"/proc/{pid}/comm").read_text().strip() == "python"}

    before, beside = servers(), others()
    assert len(before) == 2
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until("both are there again", lambda: not servers() & before and len(servers()) == 2)
    archive = pictures.write_zip(tmp_path / "shapes.zip", pictures.by_class(6))
    with running.client() as client:
        until("the API is ready", lambda: httpx.get(f"{client.url}/readyz", trust_env=False).is_success)
        assert succeeded(client, client.push(archive, name="after", domain="simple shapes")).counts
    assert others() == beside, "nobody else died of it"
    assert running.process.poll() is None


def test_two_side_by_side_and_ctrl_c_leaves_nothing(
    running: Up, start: Callable[..., Up], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTUNE_DOCS", "off")
    other = start().ready()
    assert "docs" not in other.output.read_text(), "it does not send anybody to a page that is closed"
    assert other.connection["url"] != running.connection["url"]
    assert other.connection["api_key"] != running.connection["api_key"]
    assert len(other.living()) > len(EXPECTED)  # PostgreSQL and Valkey besides
    with other.client() as client:
        assert list(client.datasets()) == []
    assert other.end(signal.SIGINT) == 0
    assert other.living() == set()
    assert "Traceback" not in other.output.read_text()
    with running.client() as client:
        client.methods()


def test_after_a_sigkill_it_starts_again_with_its_key_and_goes_on(start: Callable[..., Up], tmp_path: Path) -> None:
    first = start().ready()
    archive = pictures.write_zip(tmp_path / "shapes.zip", pictures.by_class(6))
    with first.client() as client:
        dataset = succeeded(client, client.push(archive, name="shapes", domain="simple shapes"))
        job = client.caption(dataset_id=dataset.id)
        first.process.kill()
        first.process.wait(10)
    again = start(first.state_dir).ready()
    assert first.living() == set(), "what the first one left is cleared away"
    assert again.connection["api_key"] == first.connection["api_key"]
    with again.client() as client:
        job = finished(client, job, 90)
        assert job.status == "succeeded"
        train = sum(1 for _ in client.images(dataset.id, split="train"))
        assert len({c.id for c in client.captions(dataset.id)}) == 3 * train
    assert again.end(signal.SIGTERM) == 0
    assert again.living() == set()
