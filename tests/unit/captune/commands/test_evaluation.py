"""`captune evaluate`, `predict` and `classifiers`, against a server that is a function."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from captune import Client, cli
from captune.commands import evaluation
from captune.packing import batched, new_folder, unpack

EVALUATION = {
    "id": "eval_1",
    "status": "succeeded",
    "created_at": 0,
    "dataset_id": "ds_1",
    "classifier_id": "clf_1",
    "split": "test",
    "scores": {"top1": 0.75, "nll": 1.25},
}
CLASSIFIER = {
    **{"id": "clf_1", "job_id": "ft_1", "dataset_id": "ds_1", "model": "starter", "method": "mmft", "shots": 4},
    **{"hyperparameters": {}, "shot_seed": 0, "seed": 0, "protocol": "full", "caption_job_id": None, "details": {}},
    **{"captioner": None, "suffix": None, "setting": "a", "data_fingerprint": "f", "storage_key": "k", "created_at": 0},
}
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    def put(answer: Answer) -> None:
        @contextmanager
        def client_of(_: Any) -> Iterator[Client]:
            connected = Client("http://server", "key")
            connected._http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
            yield connected

        monkeypatch.setattr(evaluation, "client_of", client_of)

    return put


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_option_reaches_its_field(serve: Callable[[Answer], None], capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            assert request.url.path == "/v1/evaluations"
            asked.append(json.loads(request.content))
        return httpx.Response(200, json=EVALUATION)

    serve(answer)
    assert run("evaluate", "clf_1") == 0
    assert "top1     0.75" in capsys.readouterr().out
    options = ("--dataset", "ds_2", "--split", "val", "--head", "zero_shot", "--corruptions")
    assert run("evaluate", "clf_1", *options, "--held-aside", "ds_3", "--captions", "cap_1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores"] == EVALUATION["scores"]
    assert run("evaluate", "--model", "starter", "--dataset", "ds_1") == 0
    plain = {"corruptions": False, "held_aside_dataset_id": None, "caption_job_id": None}
    plain |= {"model": None, "dataset_id": None, "split": "test", "head": "own"}
    assert asked == [
        plain | {"classifier_id": "clf_1"},
        {
            "classifier_id": "clf_1",
            "model": None,
            "dataset_id": "ds_2",
            "split": "val",
            "head": "zero_shot",
            "corruptions": True,
            "held_aside_dataset_id": "ds_3",
            "caption_job_id": "cap_1",
        },
        plain | {"classifier_id": None, "model": "starter", "dataset_id": "ds_1"},
    ]


def test_neither_or_both_subjects_are_wrong_usage(
    serve: Callable[[Answer], None], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(lambda _: httpx.Response(500))
    assert run("evaluate") == 2
    assert run("evaluate", "clf_1", "--model", "starter") == 2
    assert run("evaluate", "--model", "starter") == 2
    assert "give either classifier_id or model" in capsys.readouterr().err


def test_predictions_of_files_and_folders(
    serve: Callable[[Answer], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.png", "in/a.JPG", "in/notes.txt"):
        (tmp_path / name).write_bytes(b"x")

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/classifiers/clf_1/predict"
        assert request.url.params["top_k"] == "2"
        assert b"notes.txt" not in request.content
        classes = [{"class_name": c, "display_name": c, "probability": p} for c, p in (("cat", 0.9), ("dog", 0.1))]
        data = [{"file": "x", "class_name": "cat", "probability": 0.9, "classes": classes}] * request.content.count(
            b'name="images"'
        )
        return httpx.Response(200, json={"classifier_id": "clf_1", "data": data})

    serve(answer)
    assert run("predict", "clf_1", str(tmp_path / "b.png"), str(tmp_path / "in"), "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == [str(tmp_path / "b.png"), str(tmp_path / "in" / "a.JPG")]
    assert all(line.split()[1:] == ["cat", "0.900", "dog", "0.100"] for line in lines)
    (tmp_path / "empty").mkdir()
    assert run("predict", "clf_1", str(tmp_path / "empty")) == 2
    assert run("predict", "clf_1", str(tmp_path / "missing.png")) == 2


def test_a_classifier_is_tagged_and_pinned(serve: Callable[[Answer], None], capsys: pytest.CaptureFixture[str]) -> None:
    """What is not said stays as it is."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path, json.loads(request.content)))
        return httpx.Response(200, json=CLASSIFIER | asked[-1][2])

    serve(answer)
    assert run("classifiers", "tag", "clf_1", "best", "paper") == 0
    assert capsys.readouterr().out == "clf_1  not pinned  tags: best, paper\n"
    assert run("classifiers", "tag", "clf_1") == 0
    assert run("classifiers", "pin", "clf_1") == 0
    assert capsys.readouterr().out.endswith("clf_1  pinned  tags: none\n")
    assert run("classifiers", "unpin", "clf_1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pinned"] is False
    sent = [{"tags": ["best", "paper"]}, {"tags": []}, {"pinned": True}, {"pinned": False}]
    assert asked == [("PATCH", "/v1/classifiers/clf_1", body) for body in sent]


def archive_of(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name in names:
            packed.writestr(name, "{}")
    return out.getvalue()


def test_a_download_becomes_a_folder_or_stays_a_zip(
    serve: Callable[[Answer], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    serve(lambda _: httpx.Response(200, content=archive_of("captune.json", "README.md")))
    assert run("classifiers", "download", "clf_1", str(tmp_path / "c")) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"captune.json", "README.md"}
    assert run("classifiers", "download", "clf_1", str(tmp_path / "c.zip")) == 0
    assert zipfile.is_zipfile(tmp_path / "c.zip")
    assert run("classifiers", "download", "clf_1", str(tmp_path / "c")) == 2
    assert "is there already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"c", "c.zip"}


@pytest.mark.parametrize("name", ["../evil", "a/b", "/etc/x", "..", "a\\b"])
def test_an_archive_that_reaches_out_is_not_unpacked(tmp_path: Path, name: str) -> None:
    def download() -> None:
        with new_folder(tmp_path / "c") as folder:
            (folder / "classifier.zip").write_bytes(archive_of(name))
            unpack(folder / "classifier.zip")

    with pytest.raises(ValueError, match="strange name"):
        download()
    assert list(tmp_path.iterdir()) == []


def test_files_are_sent_in_runs_of_a_bounded_size(tmp_path: Path) -> None:
    files = []
    for i, size in enumerate([4, 4, 4, 20, 1, 1, 1]):
        files.append(tmp_path / str(i))
        files[-1].write_bytes(b"x" * size)
    runs = [[int(path.name) for path in run] for run in batched(files, most=3, most_bytes=10)]
    assert runs == [[0, 1], [2], [3], [4, 5, 6]]
    assert list(batched([])) == []
