"""Real child processes: restarted when they die, gone when the supervisor is, however either ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.embedded import processes, supervisor
from services.embedded.processes import in_session, marked
from services.embedded.supervisor import Supervisor
from shared.errors import Conflict

ROOT = Path(__file__).parents[3]
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
# A worker with a child in a process group and another in a session of its own, as forking workers have.
PARENT = """
import os, subprocess, time
a = subprocess.Popen(["sleep", "60"], process_group=0)
b = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(a.pid, b.pid, flush=True)
time.sleep(60)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def output(state: Path, name: str) -> str:
    path = state / "logs" / f"{name}.log"
    return path.read_text() if path.exists() else ""


def ours(state: Path) -> set[int]:
    return marked({"CAPTUNE_SUPERVISED": str(state)})


def test_dead_child_is_started_again_with_the_reason_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Supervisor(tmp_path) as running:
        running.add("steady", python(SLEEP), {"GREETING": "hello"})
        running.add(
            "killed",
            python("import os,time; print(os.environ['GREETING'], flush=True); time.sleep(60)"),
            {"GREETING": "hello"},
        )
        steady, killed = running.pids()["steady"], running.pids()["killed"]
        wait_until(lambda: output(tmp_path, "killed") == "hello\n")
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: running.pids().get("killed") not in (None, killed))
        wait_until(lambda: output(tmp_path, "killed") == "hello\nhello\n")
        assert running.pids()["steady"] == steady
    assert f"killed (pid {killed}) was killed by SIGKILL; starting it again in 0.5 s" in caplog.text


def test_restarts_back_off(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(supervisor, "LONGEST_DELAY", 0.2)
    with Supervisor(tmp_path) as running:
        running.add("broken", python("raise SystemExit(3)"))
        running.add("missing", ["/no/such/program"])
        wait_until(lambda: caplog.text.count("broken (pid") >= 4 and caplog.text.count("missing (pid") >= 1)
    told = [record.getMessage() for record in caplog.records if "broken" in record.getMessage()]
    assert all("exited with code 3" in message for message in told)
    assert [message.partition(" again in ")[2].split()[0] for message in told[:4]] == ["0.1", "0.1", "0.2", "0.2"]
    assert "No such file" in output(tmp_path, "missing")


def test_stop_ends_politely_then_by_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tidy = "import signal, sys, time\ndef end(*_): print('saved', flush=True); sys.exit(0)\n"
    tidy += "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    running = Supervisor(tmp_path, grace=0.5)
    running.add("tidy", python(tidy))
    running.add("stubborn", python(STUBBORN))
    pids = running.pids()
    wait_until(lambda: "up" in output(tmp_path, "tidy") and "up" in output(tmp_path, "stubborn"))
    running.stop()
    assert output(tmp_path, "tidy") == "up\nsaved\n"
    assert "stubborn" in caplog.text
    assert "tidy" not in caplog.text
    assert running.pids() == {}
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "a zombie or a process is left"
    running.stop()  # can be repeated
    with pytest.raises(RuntimeError, match="stopped"):
        running.add("late", python(SLEEP))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_a_child_started_goes_with_it(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as running:
        running.add("worker", python(PARENT))
        wait_until(lambda: len(output(tmp_path, "worker").split()) == 2)
        descendants = [int(word) for word in output(tmp_path, "worker").split()]
        assert set(descendants) < ours(tmp_path)
        os.kill(running.pids()["worker"], signal.SIGKILL)
        wait_until(lambda: not set(descendants) & ours(tmp_path))
        wait_until(lambda: len(output(tmp_path, "worker").split()) == 4)  # the next one's
    assert ours(tmp_path) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_killed_supervisor_takes_children_along_and_the_next_clears_the_rest(tmp_path: Path) -> None:
    code = "import sys, pathlib, time\nfrom services.embedded.supervisor import Supervisor\n"
    code += "s = Supervisor(pathlib.Path(sys.argv[1]))\n"
    for name, child in (("worker", PARENT), ("stubborn", STUBBORN)):
        code += f"s.add({name!r}, [sys.executable, '-c', {child!r}])\n"
    code += "print(*s.pids().values(), flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    children = {int(word) for word in holder.stdout.readline().split()}
    assert len(children) == 2
    wait_until(lambda: len(output(tmp_path, "worker").split()) == 2 and output(tmp_path, "stubborn"))
    with pytest.raises(Conflict, match=f"process {holder.pid} "):
        Supervisor(tmp_path)
    assert children < ours(tmp_path)  # the refused one killed nothing
    holder.kill()
    holder.communicate()
    wait_until(lambda: not children & ours(tmp_path))
    Supervisor(tmp_path).stop()
    assert ours(tmp_path) == set()


def test_two_state_directories_do_not_touch_each_other(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "a") as one:
        one.add("worker", python(SLEEP))
        pid = one.pids()["worker"]
        with Supervisor(tmp_path / "b") as two:
            two.add("worker", python(SLEEP))
        assert one.pids() == {"worker": pid}


def test_a_terminals_interrupt_does_not_reach_children(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as running:
        running.add("worker", python(SLEEP))
        pid = running.pids()["worker"]
        wait_until(lambda: output(tmp_path, "worker"))
        assert os.getsid(pid) == pid  # not in the terminal's session, so in none of its process groups
        if sys.platform == "linux":
            assert in_session(pid) == {pid}


def test_a_grown_log_is_rotated_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 10)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "worker.log").write_text("something long")
    with Supervisor(tmp_path) as running:
        running.add("worker", python(SLEEP))
        wait_until(lambda: output(tmp_path, "worker") == "up\n")
    assert (logs / "worker.log.1").read_text() == "something long"


def test_the_log_of_a_running_program_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 10_000)
    chatter = "import time\nfor i in range(10**9): print(f'line {i}', flush=True); time.sleep(0.001)"
    log = tmp_path / "logs" / "worker.log"
    with Supervisor(tmp_path) as running:
        running.add("worker", python(chatter))
        wait_until(log.with_name("worker.log.1").exists)
        kept = log.with_name("worker.log.1").read_text()
        assert kept.startswith("line 0\n")
        wait_until(lambda: log.with_name("worker.log.1").read_text() != kept)
        assert log.stat().st_size < 50_000
        assert "\0" not in log.read_text(), "written where it was emptied, not at the old end"
