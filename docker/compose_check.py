"""`make compose-check`: docker-compose.yml brought up for real, under podman, and the main job run through its gateway.

Needs root on a Debian machine whose apt and pip work. All it starts it removes again, but for the images, so that the
next run is short. `--keep` leaves the stack up.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypeVar

import httpx
from podman_stack import BASE_IMAGE, PROJECT, ROOT, Stack, install_tools, make_base, run, say

from captune import tables
from captune.client import Client
from captune.progress import ProgressBar
from shared.schemas.common import JobResource
from shared.schemas.fine_tuning import FineTuningJob

J = TypeVar("J", bound=JobResource)
SAMPLES = ROOT / "samples" / "clipart"


def check_exposure(stack: Stack) -> None:
    """One published port, no process of root's, and a queue that loses nothing."""
    for name, service in stack.config().items():
        if name == "migrate":
            continue
        assert stack.state(name)["Status"] == "running", f"{name} is {stack.state(name)}\n{stack.logs(name)}"
        container = stack.container(name)
        assert bool(run("podman", "port", container).strip()) == (name == "gateway"), f"{name} publishes a port"
        users = set(run("podman", "top", container, "huser").split()[1:])
        assert users.isdisjoint({"root", "0"}), f"{name} runs processes as {users}"
        assert service["read_only"]
    ask_redis = ["podman", "exec", stack.container("redis"), "redis-cli", "config", "get"]
    words = run(*ask_redis, "appendonly", "maxmemory-policy").split()
    options = dict(zip(words[::2], words[1::2], strict=True))  # Redis answers in an order of its own
    assert options == {"appendonly": "yes", "maxmemory-policy": "noeviction"}, options
    closed = httpx.get(f"{stack.url}/metrics")
    assert closed.status_code == 404
    assert closed.headers["X-Content-Type-Options"] == "nosniff"
    assert httpx.get(f"{stack.url}/v1/datasets").status_code == 401
    say("one port, no root, append-only queue: as written")


def stop_and_start_training(stack: Stack, client: Client, job: FineTuningJob) -> None:
    """What an upgrade does to a running job: the worker saves it and hands it back, the next one goes on with it."""
    while client.job(job.id).status == "queued":
        time.sleep(0.2)
    began = time.monotonic()
    run(*stack.compose, "stop", "trainer-worker")
    state = stack.state("trainer-worker")
    assert state["ExitCode"] == 0, f"trainer-worker ended with {state['ExitCode']}\n{stack.logs('trainer-worker')}"
    assert client.job(job.id).status == "queued", client.job(job.id)
    say(f"stopping the training worker took {time.monotonic() - began:.1f} s; the job is queued again")
    run(*stack.compose, "start", "trainer-worker")


def finish(client: Client, job: J, label: str) -> J:
    with ProgressBar(label) as bar:
        job = client.wait(job, bar)
    assert job.status == "succeeded", job
    return job


def main_job(stack: Stack, client: Client) -> str:
    """Returns the data set's id."""
    dataset = finish(client, client.push(SAMPLES, name="clipart", domain="clip art"), "ingest")
    captions = finish(client, client.caption(dataset_id=dataset.id, shots=4), "caption")
    runs = []
    for seed in range(2):
        spec = {"type": "mmft", "hyperparameters": {"epochs": 4, "batch_size": 16}}
        job = client.train(dataset_id=dataset.id, caption_job_id=captions.id, shots=4, seed=seed, method=spec)
        if seed == 1:
            stop_and_start_training(stack, client, job)
        runs.append(finish(client, job, f"train {seed}"))
    assert [job.attempt for job in runs] == [1, 2]
    for job in runs:
        assert job.evaluation_id is not None
        finish(client, client.job(job.evaluation_id), "evaluate")
    board = client.leaderboard(dataset.id)
    assert {"mmft", "zero_shot"} <= {row.method for row in board.rows}, board
    assert next(row.n for row in board.rows if row.method == "mmft") == 2
    print(tables.leaderboard(board))
    return dataset.id


def backup_and_restore(stack: Stack, client: Client, dataset_id: str) -> None:
    """As docs/operations.md has it, with everything removed in between."""
    before = client.leaderboard(dataset_id)
    dump, files, hold = stack.folder / "database.dump", stack.folder / "store.tar", f"{PROJECT}-hold"
    collector = ["collector", "python", "-m", "shared.store.collector"]
    run(*stack.compose, "run", "--no-deps", "--detach", f"--name={hold}", *collector, "hold")
    deadline = time.monotonic() + 60
    while "held" not in run("podman", "logs", hold):
        assert time.monotonic() < deadline, "deletions are not held back"
        time.sleep(0.5)
    database = [*stack.compose, "exec", "-T", "postgres"]
    tar = ["podman", "run", "--rm", "--interactive", f"--volume={PROJECT}_data:/data", BASE_IMAGE, "tar"]
    with dump.open("wb") as out:
        arguments = ["pg_dump", "--username", "captune", "--format", "custom", "captune"]
        subprocess.run([*database, *arguments], stdout=out, check=True, cwd=ROOT)
    with files.open("wb") as out:
        subprocess.run([*tar, "--create", "--directory", "/data", "."], stdout=out, check=True)
    run("podman", "rm", "--force", hold)
    say(f"backed up: {dump.stat().st_size >> 10} KiB of rows, {files.stat().st_size >> 20} MiB of files")
    stack.down()
    stack.up("postgres", "redis")
    with dump.open("rb") as given:
        arguments = ["pg_restore", "--username", "captune", "--dbname", "captune", "--exit-on-error"]
        subprocess.run([*database, *arguments], stdin=given, check=True, cwd=ROOT)
    with files.open("rb") as given:
        subprocess.run([*tar, "--extract", "--directory", "/data"], stdin=given, check=True)
    stack.up()
    say(run(*stack.compose, "run", "--no-deps", "--rm", *collector, "check").strip().splitlines()[-1])
    assert client.leaderboard(dataset_id) == before, "the restored leaderboard is another"
    say("restored: the leaderboard is what it was")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the stack running")
    keep = parser.parse_args().keep
    if os.geteuid() != 0:
        sys.exit("compose-check: run it as root; podman and debootstrap need it here")
    install_tools()
    make_base()
    with tempfile.TemporaryDirectory(prefix="captune-check") as folder:
        stack = Stack(Path(folder))
        stack.down()  # what an interrupted run left
        stack.build()
        try:
            stack.up()
            check_exposure(stack)
            with Client(stack.url, stack.api_key) as client:
                backup_and_restore(stack, client, main_job(stack, client))
        except BaseException:
            for name in stack.config():
                say(f"last lines of {name}:\n{stack.logs(name)}")
            raise
        finally:
            if keep:
                say(f"left running: {stack.url} with API key {stack.api_key}")
            else:
                stack.down()
        assert keep or not run("podman", "ps", "--all", "--quiet", "--filter", "name=captune-check")
    say("passed")


if __name__ == "__main__":
    main()
