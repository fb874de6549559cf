"""What the caption commands make of their options, before any server is asked."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from captune import cli
from captune.commands import captions
from shared.schemas.captions import CaptionJobRequest


def parsed(*arguments: str) -> Any:
    return cli._parser().parse_args(arguments)


def request(*options: str) -> dict[str, Any]:
    return captions.request_of(parsed("caption", "ds_1", *options))


def test_what_is_not_said_is_left_to_the_server() -> None:
    assert request() == {"dataset_id": "ds_1"}
    assert request("--redo", "cap_1") == {"dataset_id": "ds_1", "redo": {"caption_job_id": "cap_1"}}


def test_every_option_reaches_its_field() -> None:
    found = request(
        *("--engine", "qwen", "--characteristics", "visual,shape", "--template", "mood=The mood of {class_name}: a=b"),
        *("--samples", "3", "--temperature", "0.7", "--limit", "10", "--shots", "4", "--shot-seed", "2", "--seed", "0"),
        *("--words", "20", "--domain", "pets", "--split", "val", "--overwrite", "--agreement"),
        *("--clip-model", "ViT-B-32/openai", "--shear-tokens", "40"),
        *("--redo", "cap_1", "--redo-flag", "refusal", "--redo-class", "cat", "--redo-caption", "cpt_1"),
        *("--redo-excluded", "--reasks", "0", "--language", "any"),
    )
    assert found == {
        "dataset_id": "ds_1",
        "engine": "qwen",
        "characteristics": ["visual", "shape", {"name": "mood", "template": "The mood of {class_name}: a=b"}],
        "samples_per_prompt": 3,
        "temperature": 0.7,
        "limit": 10,
        "shots": 4,
        "shot_seed": 2,
        "seed": 0,
        "words": 20,
        "domain": "pets",
        "split": "val",
        "mode": "overwrite",
        "agreement": True,
        "clip_model": "ViT-B-32/openai",
        "shear_tokens": 40,
        "reasks": 0,
        "language": None,
        "redo": {
            **{"caption_job_id": "cap_1", "caption_ids": ["cpt_1"], "class_name": "cat", "flag": "refusal"},
            "excluded": True,
        },
    }
    CaptionJobRequest.model_validate(found)
    assert request("--language", "en")["language"] == "en"


def test_captions_are_listed_by_whether_they_have_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"object": "list", "data": [], "has_more": false, "last_id": null}')

    with HTTPServer(("127.0.0.1", 0), Empty) as server:
        Thread(target=server.handle_request).start()
        monkeypatch.setenv("CAPTUNE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("CAPTUNE_API_KEY", "key")
        with pytest.raises(SystemExit, match="0"):
            cli.main(["captions", "list", "ds_1", "--flagged", "none"])
    assert parse_qs(urlsplit(asked[0]).query)["flagged"] == ["none"]


def test_templates_alone_replace_the_default_characteristics() -> None:
    found = request("--template", "a=x", "--template", "b=y")
    assert [each["name"] for each in found["characteristics"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["caption", "ds_1", "--template", "no text"], "'no text' is not NAME=TEXT"),
        (["caption", "ds_1", "--redo-flag", "ugly"], "invalid choice: 'ugly'"),
        (["caption", "ds_1", "--redo-flag", "empty"], "select among the captions of --redo"),
        (["caption", "ds_1", "--redo-excluded"], "select among the captions of --redo"),
        (["caption", "ds_1", "--reasks", "3"], "invalid choice: 3"),
        (["captions", "list", "ds_1", "--flagged", "some"], "invalid choice: 'some'"),
        (["caption", "ds_1", "--live"], "--live captions one image of a --dry-run"),
        (["captions", "export", "cap_1", "captions.xls"], "'captions.xls' does not say its format"),
        (["captions", "import", "ds_1", "."], "is a folder; pack its .txt files"),
        (["captions", "import", "ds_1", "nothing.json"], "No such file"),
        (["captions", "list", "ds_1", "--excluded", "maybe"], "'maybe' is neither yes nor no"),
        (["captions", "edit", "cpt_1"], "--text"),
        (["captions", "edit", "cpt_1", "--text", ""], "text: String should have at least 1 character"),
        (["caption", "ds_1", "--samples", "11"], "samples_per_prompt: Input should be less than or equal to 10"),
        (["datasets", "rename-classes", "ds_1", "n01"], "'n01' is neither CODE=NAME nor a JSON file"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTUNE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("CAPTUNE_API_KEY", "key")
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_class_names_come_from_pairs_and_files(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"n02123045": "tabby", "n02099601": "golden retriever"}))
    found = parsed("datasets", "rename-classes", "ds_1", str(file), "n02123045=tabby cat").names
    assert found == [{"n02123045": "tabby", "n02099601": "golden retriever"}, {"n02123045": "tabby cat"}]
    file.write_text("[]")
    with pytest.raises(SystemExit):
        parsed("datasets", "rename-classes", "ds_1", str(file))


def test_marking_takes_many_captions() -> None:
    assert [parsed("captions", name, "cpt_1", "cpt_2").excluded for name in ("exclude", "include")] == [True, False]
    assert parsed("captions", "exclude", "cpt_1", "cpt_2").ids == ["cpt_1", "cpt_2"]
