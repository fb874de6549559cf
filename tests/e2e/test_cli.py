"""The command line as a process of its own, against a running server: what it prints, and its exit codes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captune import Client
from services.embedded.stack import Stack
from shared.schemas.datasets import Dataset
from tests.e2e import pictures
from tests.e2e.waiting import succeeded, until

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(stack: Stack) -> Run:
    """Runs `captune ARGS`, told by the environment where the server is."""

    def call(*arguments: str, code: int = 0, **env: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [sys.executable, "-m", "captune.cli", *arguments],
            cwd=ROOT,
            env={**os.environ, "CAPTUNE_URL": stack.url, "CAPTUNE_API_KEY": stack.api_key, **env},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def as_json(done: "subprocess.CompletedProcess[str]") -> Any:
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def pushed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of a data set that the CLI uploaded."""
    folder = pictures.write_folder(tmp_path_factory.mktemp("cli") / "shapes", pictures.by_split(4, 1, 2))
    done = run("datasets", "push", str(folder), "--domain", "simple shapes", "--name", "by-cli", "--json")
    dataset = as_json(done)
    assert (dataset["status"], dataset["name"], dataset["counts"]["train"]["red_disc"]) == ("succeeded", "by-cli", 4)
    assert "storing images" in done.stderr, "progress, by stage"
    return str(dataset["id"])


@pytest.fixture(scope="module")
def captioned(run: Run, pushed: str) -> str:
    done = run("caption", pushed, "--characteristics", "visual,color", "--words", "10", "--json")
    job = as_json(done)
    assert (job["status"], job["result"]["captions"]) == ("succeeded", 24)
    assert job["request"]["domain"] == "simple shapes"
    return str(job["id"])


@pytest.fixture(scope="module")
def trained(run: Run, models: Path, client: Client, pushed: str, captioned: str) -> list[str]:
    """The lines printed for two seeds, and every evaluation done."""
    settings = ("--set", "epochs=2", "--set", "batch_size=6", "--model", str(models / "clip"))
    done = run("train", pushed, "--captions", captioned, "--seeds", "0,1", "--shots", "2", *settings)
    for job in [*client.jobs("ft", dataset_id=pushed)]:
        succeeded(client, job)
    for job in [*client.jobs("eval", dataset_id=pushed)]:
        succeeded(client, job)
    return done.stdout.splitlines()


def test_push_shows_what_was_refused_and_where(run: Run, tmp_path: Path) -> None:
    files = pictures.by_class(2) | {"red_disc/bad.png": b"no picture"}
    archive = pictures.write_zip(tmp_path / "some.zip", files)
    done = run("datasets", "push", str(archive), "--domain", "simple shapes")
    assert re.fullmatch(r"ds_\w+  succeeded\n", done.stdout)
    assert "refused: red_disc/bad.png: " in done.stderr


def test_a_failed_push_exits_with_1_and_its_reason(run: Run, tmp_path: Path) -> None:
    archive = pictures.write_zip(tmp_path / "one.zip", {"red_disc/1.png": pictures.png()})
    done = run("datasets", "push", str(archive), "--domain", "simple shapes", code=1)
    assert "failed: All images are of one class" in done.stdout


def test_list_show_and_rm(run: Run, tmp_path: Path) -> None:
    archive = pictures.write_zip(tmp_path / "gone.zip", pictures.by_class(2))
    dataset = as_json(run("datasets", "push", str(archive), "--domain", "shapes to remove", "--json"))
    assert re.search(rf"^{dataset['id']}  gone +shapes to remove +succeeded$", run("datasets", "list").stdout, re.M)
    shown = as_json(run("datasets", "show", dataset["id"]))
    assert shown["report"]["images"] == 6
    assert run("datasets", "rm", dataset["id"]).stdout == ""
    assert dataset["id"] not in {row["id"] for row in as_json(run("datasets", "list", "--json"))}
    assert f"there is no data set '{dataset['id']}'" in run("datasets", "show", dataset["id"], code=1).stderr


def test_one_job_per_seed(run: Run, trained: list[str]) -> None:
    assert [re.fullmatch(r"ft_\w+  succeeded", line) is not None for line in trained] == [True, True]
    seeds = [as_json(run("jobs", "show", line.split()[0]))["seed"] for line in trained]
    assert seeds == [0, 1]


def test_the_leaderboard_as_a_table_and_as_json(run: Run, pushed: str, trained: list[str]) -> None:
    table = run("leaderboard", pushed).stdout
    assert table.startswith("by-cli: top1 % on test, mean ± standard error over seeds")
    assert re.search(r"^ *\d+  mmft .* ± \d+\.\d\d\* +2 ", table, re.M), table
    assert re.search(r"^ *\d+  zero_shot ", table, re.M)
    board = as_json(run("leaderboard", pushed, "--metric", "nll", "--json"))
    assert board["metric"] == "nll"
    assert {row["method"]: row["n"] for row in board["rows"]} == {"mmft": 2, "zero_shot": 1, "zero_shot_ensemble": 1}
    full = as_json(run("leaderboard", pushed, "--shots", "full", "--json"))
    assert "mmft" not in {row["method"] for row in full["rows"]}


def test_jobs_list_filters(run: Run, pushed: str, captioned: str, trained: list[str]) -> None:
    found = as_json(run("jobs", "list", "--dataset-id", pushed, "--json"))
    kinds = sorted(job["id"].split("_")[0] for job in found)
    assert kinds == ["cap", "ds", *["eval"] * 4, *["ft"] * 4]
    assert [job["id"] for job in as_json(run("jobs", "list", "--kind", "cap", "--dataset-id", pushed, "--json"))] == [
        captioned
    ]
    none = run("jobs", "list", "--kind", "ft", "--dataset-id", pushed, "--status", "failed").stdout.splitlines()
    assert none[0].split() == ["id", "status", "attempt"]
    assert len(none) == 2, "a header and nothing below it"


@pytest.fixture(scope="module")
def swept(run: Run, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a sweep over its own data set printed, as JSON: methods on frozen features, fine-tunes and their soup."""
    archive = pictures.write_zip(tmp_path_factory.mktemp("sweep") / "swept.zip", pictures.by_split(4, 2, 2))
    dataset = as_json(run("datasets", "push", str(archive), "--domain", "simple shapes", "--json"))
    done = run(
        "sweep", dataset["id"], "--methods", "linear_probe,flyp", "--models", str(models / "clip"), "--shots", "1,2",
        "--seeds", "0,1", "--shot-seeds", "3", "--set", "epochs=1", "--set", "flyp.batch_size=4", "--name", "first",
        "--tag", "cli", "--soup", "--json",
    )  # fmt: skip
    return as_json(done)


def test_a_sweep_ends_with_its_leaderboard(run: Run, swept: Any) -> None:
    group = swept["group"]
    assert (group["name"], group["status"], group["counts"]) == ("first", "finished", {"succeeded": 8})
    assert group["scored"] == 8, "2 probes, 4 fine-tunes and 2 soups"
    rows = {(row["method"], row["shots"]): row["n"] for row in swept["leaderboard"]["rows"] if not row["pinned"]}
    assert rows == {
        ("linear_probe", 1): 1, ("linear_probe", 2): 1, ("flyp", 1): 2, ("flyp", 2): 2, ("soup", 1): 1, ("soup", 2): 1,
    }  # fmt: skip
    shown = run("groups", "show", group["id"]).stdout
    assert shown == f"{group['id']}  finished: 8 succeeded; 8 scored\n"
    assert group["id"] in run("groups", "list").stdout
    more = run("sweep", group["dataset_id"], "--group", group["id"], "--methods", "gda", "--no-wait", "--json")
    assert as_json(more)["runs"] == 9


def test_methods_are_listed_and_shown(run: Run) -> None:
    listed = run("methods").stdout
    assert re.search(r"^mmft +fine_tune +True ", listed, re.M)
    shown = run("methods", "mmft").stdout
    assert re.search(r"^learning_rate +1e-05 +> 0, ≤ 1 ", shown, re.M), shown
    assert "arXiv 2601.21426" in shown
    assert "there is no method 'magic'" in run("methods", "magic", code=2).stderr


def test_watch_tells_the_whole_story(run: Run, trained: list[str]) -> None:
    job_id = trained[0].split()[0]
    done = run("jobs", "watch", job_id)
    told = [line.split()[1].rstrip(":") for line in done.stderr.splitlines() if re.match(r" +\d+  ", line)]
    assert told[0] == "job.created"
    assert told.count("training.epoch") == 2
    assert told[-1] == "job.succeeded"
    assert done.stderr.splitlines()[-1] == f"{job_id}  succeeded"
    last = json.loads(run("jobs", "watch", job_id, "--json").stdout.splitlines()[-1])
    assert (last["object"], last["status"]) == ("fine_tuning.job", "succeeded")


def test_cancel_pause_and_resume(run: Run, client: Client, many: Dataset) -> None:
    done = run("caption", many.id, "--seed", "77", "--no-wait")
    job_id, status = done.stdout.split()
    assert status in ("queued", "running")
    run("jobs", "pause", job_id)
    until("the job pauses", lambda: client.job(job_id).status == "paused")
    assert "is paused; only a queued or running job can be paused" in run("jobs", "pause", job_id, code=1).stderr
    run("jobs", "resume", job_id)
    run("jobs", "cancel", job_id)
    assert run("jobs", "watch", job_id, code=1).stderr.splitlines()[-1] == f"{job_id}  cancelled"
    assert "nothing to cancel" in run("jobs", "cancel", job_id, code=1).stderr


def test_a_refused_request_exits_with_1_and_its_reason(run: Run, pushed: str) -> None:
    done = run("caption", pushed, "--engine", "nobody", code=1)
    assert "nobody" in done.stderr


def test_a_failed_job_exits_with_1_and_its_reason(run: Run, pushed: str, tmp_path: Path) -> None:
    (tmp_path / "strangers.json").write_text('{"nobody/knows.png": "A stranger."}')
    done = run("captions", "import", pushed, str(tmp_path / "strangers.json"), code=1)
    assert "failed:" in done.stdout
    assert "nobody/knows.png" in done.stdout


def test_keys(run: Run, stack: Stack) -> None:
    made = as_json(run("keys", "create", "--owner", "local", "--name", "for the CLI", "--scopes", "read", "--json"))
    limited = {"CAPTUNE_API_KEY": made["key"]}
    run("datasets", "list", **limited)
    assert "scope 'admin'" in run("keys", "list", code=1, **limited).stderr
    assert made["id"] in run("keys", "list").stdout
    assert made["key"] not in run("keys", "list", "--json").stdout
    run("keys", "revoke", made["id"])
    assert "revoked" in run("datasets", "list", code=1, **limited).stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "COMMAND"),
        (("fly",), "fly"),
        (("caption", "ds_x", "--words", "many"), "--words"),
        (("caption", "ds_x", "--words", "2"), "words"),
        (("train", "ds_x", "--seeds", "one"), "--seeds"),
        (("train", "ds_x", "--set", "epochs"), "NAME=VALUE"),
        (("jobs", "show", "job_1"), "job_1"),
        (("datasets", "push", "/nowhere/at/all", "--domain", "x"), "/nowhere/at/all"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], named: str, run: Run) -> None:
    assert named in run(*arguments, code=2).stderr


def test_no_server_exits_with_3(run: Run, tmp_path: Path) -> None:
    gone = run("datasets", "list", code=3, CAPTUNE_URL="http://127.0.0.1:9")
    assert "does not answer" in gone.stderr
    unknown = run("datasets", "list", code=3, CAPTUNE_URL="", CAPTUNE_STATE_DIR=str(tmp_path))
    assert "captune up" in unknown.stderr


def test_an_unknown_id_exits_with_1(run: Run) -> None:
    assert "there is no caption job 'cap_none'" in run("jobs", "show", "cap_none", code=1).stderr
